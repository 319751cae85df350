"""Tiles, constants and number of splits of a launch, chosen from shapes."""

import functools
from typing import Any

import torch
import triton.language as tl

from mvlm_kernels import configs, dispatch
from mvlm_kernels.cross_attention.arguments import bucket
from mvlm_kernels.dispatch import ceil_div, power_of_two
from mvlm_kernels.overrides import overridable

_TYPE_NAMES = {torch.bfloat16: "16bit", torch.float16: "16bit", torch.float32: "tf32"}
_MOST_SPLITS = 16
# Compute capabilities with 99 KiB of shared memory per block. Others have 163 or more; the widest tiles take 144.
_SMALL_SHARED_MEMORY = (86, 89, 120, 121)
# Tile size of the short side, which a kernel keeps on chip as a whole. It is computed from the longest sequence, so the
# tables do not list it.
_WHOLE_SIDE = {
    "short_kv_forward": "BLOCK_N",
    "short_kv_backward": "BLOCK_N",
    "short_q_forward": "BLOCK_M",
    "short_q_backward": "BLOCK_M",
}


def has_tiles(dtype: torch.dtype, width: int, short: int, arch: int) -> bool:
    """True if tiles without register spills exist for this dtype, head width and longest sequence of the short side."""
    block_d = power_of_two(width)
    if arch in _SMALL_SHARED_MEMORY and block_d * bucket(short) > 64 * 128:
        return False
    return configs.has("cross_attention", arch, _key("short_kv_backward", dtype, "cuda", block_d, short))


def kernel_has_tiles(kernel: str, dtype: torch.dtype, device: str, width: int, short: int, arch: int) -> bool:
    return configs.has("cross_attention", arch, _key(kernel, dtype, device, power_of_two(width), short))


@overridable
@functools.lru_cache(maxsize=1024)
def meta(kernel: str, dtype: torch.dtype, device: str, width: int, short: int, arch: int) -> dict[str, Any]:
    """Constexprs and compile options of a kernel: head width, dtypes, tiles from the table.

    device: a device type ("cuda", "cpu"). short: longest sequence of the short side. The dict is cached: do not change
    it. Raises KeyError if the table has no tiles for the kernel.
    """
    block_d = power_of_two(width)
    tiles = dict(configs.lookup("cross_attention", arch, _key(kernel, dtype, device, block_d, short)))
    if kernel in _WHOLE_SIDE:
        tiles[_WHOLE_SIDE[kernel]] = bucket(short)
    return {
        "D": width,
        "BLOCK_D": block_d,
        "ACC": tl.float64 if dtype == torch.float64 else tl.float32,
        "PRECISION": "tf32" if dtype == torch.float32 else "ieee",
        "enable_fp_fusion": True,
        **tiles,
    }


def _key(kernel: str, dtype: torch.dtype, device: str, block_d: int, short: int) -> str:
    # The interpreter has no registers to spill, so every dtype takes the 16-bit tiles there.
    kind = "16bit" if device == "cpu" else _TYPE_NAMES[dtype]
    return f"{kernel}/{kind}/{block_d}/{bucket(short)}"


def splits(programs: int, work: int, device: torch.device) -> int:
    """Number of splits of each program's work, enough for two programs per multiprocessor and at most 16.

    programs: programs of the launch without splits. work: tiles of one program, the most that it can be split into.
    The number depends on shape and device only, so every sum is taken in the same order in every run.
    """
    wanted = ceil_div(2 * dispatch.multiprocessors(device), programs or 1)
    return max(1, min(wanted, work, _MOST_SPLITS))


def long_tiles(rows: int, seqs: int, longest: int, block: int) -> int:
    """Number of tiles for one sequence of the long side.

    rows: rows per sequence of a dense side, all rows of a packed side. longest: the longest sequence; negative if
    unknown, and then the mean length of the packed sequences counts.
    """
    return ceil_div(min(longest, rows) if longest >= 0 else ceil_div(rows, seqs or 1), block)
