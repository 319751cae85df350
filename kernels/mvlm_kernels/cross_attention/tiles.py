"""Tiles, constants and number of splits of a launch: rules over the shapes, and a table of exceptions.

A rule holds for every architecture. ``configs/cross_attention.json`` overrides it where a GPU has measured better
tiles, or where a compiler needs others to spill nothing; ``MVLM_KERNELS_CONFIGS=<folder>`` reads that file there.

    {"sm_90": {"short_kv_backward/16bit/128/128": {"BLOCK_M": 32}}}

A key is kernel/dtype/head width/short length. The dtype is ``16bit`` or ``tf32``, the head width is rounded up to a
power of two from 16, and the short length is 16, 32, 64 or 128. A key that ends in ``/text`` holds where both sides are
text of at most 32 rows. An exception names the fields of the rule that it replaces.

Tiles are chosen by shape and never by timing. Bitwise repeatability needs the same tiles in every run, the interpreter
has no autotuner, and an autotuner would compile every candidate.
"""

import functools
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import triton.language as tl

from mvlm_kernels import dispatch
from mvlm_kernels.cross_attention.arguments import bucket
from mvlm_kernels.dispatch import ceil_div, power_of_two

_MOST_SPLITS = 16
# Compute capabilities with 99 KiB of shared memory per block. Others have 163 or more; the widest tiles take 144.
_SMALL_SHARED_MEMORY = (86, 89, 120, 121)


def tile_width(width: int) -> int:
    """Columns of a tile that holds heads of this width: a power of two from 16, which a matrix instruction needs.

    Columns past the width are zeros in registers. They are neither loaded nor stored.
    """
    return max(16, power_of_two(width))


def has_tiles(dtype: torch.dtype, width: int, short: int, arch: int, extras: int = 0) -> bool:
    """True if tiles without register spills exist for this dtype, head width and longest sequence of the short side.

    extras: how many of a dropout and grouped heads the call has; they take registers too.
    """
    size = tile_width(width) * bucket(short)
    if size > 64 * 128 and arch in _SMALL_SHARED_MEMORY:
        return False
    if bucket(short) > 128 and (size > 64 * 256 or not _has_wgmma(arch)):
        return False
    if (extras and size > 64 * 128 and not _has_wgmma(arch)) or (extras > 1 and bucket(short) > 64):
        return False
    return dtype != torch.float32 or size <= (64 * 32 if extras else 64 * 64)


def single_pass(dtype: torch.dtype, device: str, width: int, short: int, arch: int) -> bool:
    """True if ``short_q_backward`` has tiles without register spills, so that one pass computes all three gradients."""
    return _tiles("short_q_backward", dtype, device, tile_width(width), bucket(short), 0, arch) is not None


@functools.lru_cache(maxsize=1024)
def meta(kernel: str, dtype: torch.dtype, device: str, width: int, short: int, long: int, arch: int) -> dict[str, Any]:
    """Constexprs and compile options of a kernel: head width, dtypes, tiles.

    device: a device type ("cuda", "cpu"). short: longest sequence of the short side. long: that of the long side,
    negative if unknown. The dict is cached: do not change it.
    """
    block_d = tile_width(width)
    tiles = _tiles(kernel, dtype, device, block_d, bucket(short), long, arch)
    assert tiles is not None, "a caller asks for a single pass only where there is one"
    return {
        "D": width,
        "BLOCK_D": block_d,
        "ACC": tl.float64 if dtype == torch.float64 else tl.float32,
        "PRECISION": "tf32" if dtype == torch.float32 else "ieee",
        "enable_fp_fusion": True,
        **tiles,
    }


def exceptions(arch: int) -> dict[str, dict[str, int]]:
    """Tiles that differ from the rules, by key, for a compute capability (90).

    9.x reads the table ``sm_90``, 10.x and 11.x read ``sm_100``, 12.x reads ``sm_120``. All others read ``sm_80``, as
    do those whose table a file lacks.
    """
    found = _table(_folder())
    return found.get(_table_arch(arch), found["sm_80"])


def with_exceptions(arch: int, found: Mapping[str, Mapping[str, int | None]]) -> dict[str, Any]:
    """A copy of the table in which the `found` options of an architecture replace those of the same key."""
    table: dict[str, Any] = {name: dict(rows) for name, rows in _table(_folder()).items()}
    rows = table.setdefault(_table_arch(arch), dict(table["sm_80"]))
    rows |= {key: {**rows.get(key, {}), **options} for key, options in found.items()}
    return table


def _table_arch(arch: int) -> str:
    first = next((first for first in (120, 100, 90) if arch >= first), 80)
    return f"sm_{first}"


def _folder() -> str:
    return os.environ.get("MVLM_KERNELS_CONFIGS", "")


@functools.cache
def _table(folder: str) -> dict[str, dict[str, dict[str, int]]]:
    path = (Path(folder) if folder else Path(__file__).parents[1] / "configs") / "cross_attention.json"
    return json.loads(path.read_text())


def table_key(kernel: str, dtype: torch.dtype, device: str, width: int, short: int, long: int) -> str:
    """Key of a kernel's tiles in the table of exceptions, for the arguments of :func:`meta`."""
    kind, text = _kind(dtype, device), "/text" if _is_text(long) else ""
    return f"{kernel}/{kind}/{tile_width(width)}/{bucket(short)}{text}"


def _kind(dtype: torch.dtype, device: str) -> str:
    # The interpreter has no registers to spill, so every dtype takes the 16-bit tiles there.
    return "tf32" if dtype == torch.float32 and device != "cpu" else "16bit"


def _is_text(long: int) -> bool:
    return 0 <= long <= 32  # both sides are text


def _tiles(
    kernel: str, dtype: torch.dtype, device: str, block_d: int, short: int, long: int, arch: int
) -> dict[str, int] | None:
    key = table_key(kernel, dtype, device, block_d, short, long)
    rule = _rule(kernel, _kind(dtype, device), block_d, short, _is_text(long), _has_wgmma(arch))
    found = exceptions(arch)
    return {**(rule or {}), **found[key]} if key in found else rule


def _has_wgmma(arch: int) -> bool:
    """True for GPUs whose matrix instructions read operands from shared memory, which leaves more registers."""
    return 90 <= arch < 120


def _rule(kernel: str, kind: str, block_d: int, short: int, text: bool, wgmma: bool) -> dict[str, int] | None:
    """Tiles of a kernel; None: a single pass would spill registers.

    short: tile length of the short side. text: the long side is text of at most 32 rows. A tile of two stages loads the
    next one while it computes. maxnreg holds a kernel to the registers of one more block per multiprocessor.
    """
    small = block_d <= 64 and kind == "16bit"
    size = block_d * short
    most = 64 * 64 if kind == "16bit" else 64 * 64 - 1  # elements of the short side that four warps hold
    warps = 8 if size > most else 4
    staged = small and size <= 64 * 32 and short <= 64
    if kernel == "short_kv_forward":
        if text and small:
            return {"BLOCK_M": 16, "BLOCK_N": short, "num_warps": 1, "num_stages": 1}
        return {"BLOCK_M": 64 if small else 32, "BLOCK_N": short, "num_warps": warps, "num_stages": 1}
    if kernel == "short_kv_backward":
        if text and small:
            return {"BLOCK_M": 16, "BLOCK_N": short, "num_warps": 2, "num_stages": 1}
        if staged:
            return {"BLOCK_M": 32, "BLOCK_N": short, "num_warps": 4, "num_stages": 2, "maxnreg": 128}
        rows = 16 if block_d > 64 and short > 64 else 32
        return {"BLOCK_M": rows, "BLOCK_N": short, "num_warps": warps, "num_stages": 1}
    if kernel == "long_kv_backward":
        rows = min(short, 32)
        if small and wgmma:
            return {"BLOCK_M": rows, "BLOCK_N": 64, "num_warps": 4, "num_stages": 1, "maxnreg": 168}
        return {"BLOCK_M": rows, "BLOCK_N": 32, "num_warps": 8 if block_d > 64 else 4, "num_stages": 1}
    if kernel == "short_q_forward":
        stages = 2 if staged else 1
        return {"BLOCK_M": short, "BLOCK_N": 64 if small else 32, "num_warps": warps, "num_stages": stages}
    if kernel == "short_q_backward_dq":
        rows = min(short, 64 if kind == "16bit" else 32)
        return {"BLOCK_M": rows, "BLOCK_N": 32, "num_warps": 8 if block_d * rows > most else 4, "num_stages": 1}
    assert kernel == "short_q_backward", kernel
    if size > (64 * 128 if wgmma or block_d > 64 else 64 * 32):
        return None
    return {"BLOCK_M": short, "BLOCK_N": 32, "num_warps": warps, "num_stages": 2 if staged else 1}


def splits(programs: int, work: int, device: torch.device) -> int:
    """Number of splits of each program's work, enough for two programs per multiprocessor and at most 16.

    programs: programs of the launch without splits. work: tiles of one program, the most that it can be split into.
    The number depends on shape and device only, so every sum is taken in the same order in every run.
    """
    wanted = ceil_div(2 * dispatch.multiprocessors(device), programs or 1)
    return max(1, min(wanted, work, _MOST_SPLITS))


def long_tiles(rows: int, seqs: int, longest: int, block: int) -> int:
    """Number of tiles of `block` rows for one sequence of the side, queries or keys, that is cut into tiles.

    Args:
        rows: rows of one sequence if all have the same length; rows of all sequences if they are packed.
        seqs: number of sequences if they are packed, else 0.
        longest: rows of the longest sequence; negative if unknown, and then the mean length counts.
        block: rows of a tile.
    """
    return ceil_div(min(longest, rows) if longest >= 0 else ceil_div(rows, seqs or 1), block)
