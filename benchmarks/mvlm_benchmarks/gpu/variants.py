"""Variants of a kernel's launch: other tiles, warps, stages and registers, and their cost as machine code.

    python -m mvlm_benchmarks.gpu.variants [--batch N] [--arch sm_90] [--jobs N] [--small]

Compiles every variant without a GPU, and prints a JSON line for each as soon as it is compiled. On a GPU the same
process fills the cache of compiled kernels, so that the sweep compiles nothing.
"""

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any, NamedTuple

import torch

from mvlm_benchmarks.kernels.cases import cases
from mvlm_benchmarks.unavailable import one_line
from mvlm_kernels import dispatch
from mvlm_kernels.case import Case, Inputs
from mvlm_kernels.cases import small as small_cases
from mvlm_kernels.cross_attention import tiles
from mvlm_kernels.cross_attention.arguments import short_side, short_sides_up_to
from mvlm_kernels.cross_attention.cases import longest

Options = dict[str, int | None]
Row = dict[str, Any]

# Kernels that add partial results. They take microseconds, and their tiles do not matter.
HELPERS = ("sum_", "column_sum", "reader_lists", "short_q_combine", "scale_slope", "moments")
TILES = {  # kernel -> the tile size that may vary: the other sizes hold a whole side, or fix the order of a sum
    "short_kv_forward": "BLOCK_M",
    "short_kv_backward": "BLOCK_M",
    "long_kv_backward": "BLOCK_N",
    "short_q_forward": "BLOCK_N",
    "short_q_backward": "BLOCK_N",
    "short_q_backward_dq": "BLOCK_N",
    "add_norm_kernel": "BLOCK_R",
    "add_norm_backward_kernel": "BLOCK_R",
    "gelu_kernel": "BLOCK_R",
    "gelu_backward_kernel": "BLOCK_R",
    "place_kernel": "BLOCK_B",
    "place_backward_kernel": "BLOCK_B",
}


class Target(NamedTuple):
    """A kernel that a pass of a case launches."""

    case: Case
    pass_name: str
    kernel: str
    options: Options
    """Tiles, warps and stages of the launch."""
    key: str = ""
    """Key of the launch in the op's table of tiles; empty if the op has no table."""

    @property
    def name(self) -> str:
        return f"{self.case.op}, {self.case.label}, {self.pass_name}: {self.kernel}"


def chosen_cases(batch: int, dtype: torch.dtype, small: bool) -> list[Case]:
    """Cases whose kernels are swept: the core cases, text, ITM, image patches. small: tiny ones, for a rehearsal."""
    if small:
        return small_cases(dtype)
    wanted = ("packed self-attention", "drawn", "197x197")
    return [c for c in cases(batch, dtype) if c.has_kernels and (c.core or any(word in c.label for word in wanted))]


def long_sides(case: Case) -> contextlib.AbstractContextManager[Any]:
    """Context in which our kernels also take self-attention between image patches. By default SDPA runs there."""
    return short_sides_up_to(256 if "197x197" in case.label else 128)


def targets_of(case: Case, inputs: Inputs, arch: int) -> list[Target]:
    """Kernels of a case that are worth a sweep; none if the op has no kernel for it."""
    try:
        with long_sides(case):
            launches = case.launches(arch, inputs)
    except RuntimeError:
        return []
    found: dict[tuple[str, str], Target] = {}
    for launch in launches:
        name = launch.kernel.__name__
        if not name.startswith(HELPERS):
            target = Target(case, launch.pass_name, name, options_of(launch.meta), table_key(case, inputs, name))
            found.setdefault((launch.pass_name, name), target)
    return list(found.values())


def table_key(case: Case, inputs: Inputs, kernel: str) -> str:
    """Key of a kernel's tiles in the table of cross-attention, which alone has one; "" for other ops."""
    if case.op != "cross_attention":
        return ""
    q, lengths = inputs.leaves["q"], longest(inputs)
    with long_sides(case):
        short, long = lengths[::-1] if short_side(*lengths) == "kv" else lengths
    return tiles.table_key(kernel, q.dtype, q.device.type, q.shape[-1], short, long)


def options_of(meta: dict[str, Any]) -> Options:
    """Tiles, warps, stages and register limit among the options of a launch."""
    names = ("num_warps", "num_stages", "maxnreg")
    return {key: value for key, value in meta.items() if key.startswith("BLOCK") or key in names}


def variants(kernel: str, options: Options, few: bool = False) -> list[Options]:
    """Changes to a kernel's options that are tried, the empty one first. Each is one change, or two that belong.

    few: three of them, for a rehearsal.
    """
    warps, stages = options.get("num_warps") or 4, options.get("num_stages") or 1
    changes: list[Options] = [{"num_stages": n} for n in (1, 2, 3) if n != stages]
    changes.extend({"num_warps": n} for n in (2, 4, 8) if n != warps)
    # A default with a limit of registers is also tried without it.
    if limit := options.get("maxnreg"):
        changes.extend({"maxnreg": n} for n in (None, 128, 168) if n != limit)
    else:
        changes.append({"maxnreg": 128})
        changes.append({"num_stages": 2, "maxnreg": 128})
    tile = TILES.get(kernel, "")
    if size := options.get(tile):
        for other in (size // 2, 2 * size):
            if 16 <= other <= 256 or (tile in ("BLOCK_B", "BLOCK_R") and 1 <= other <= 64):
                changes.append({tile: other})
        if 32 <= 2 * size <= 256 and warps < 8:
            changes.append({tile: 2 * size, "num_warps": 8})
    if few:
        return [{}, changes[-1], changes[0]]
    return [{}, *changes]


def compile_case(batch: int, small: bool, arch: str, number: int, part: int = 0, parts: int = 1) -> Iterator[Row]:
    """Compile the variants of all kernels of one case. Yields a row of each: registers, spills, or an error.

    Of every `parts` variants the one numbered `part` is compiled.
    """
    # Imported here: it takes TRITON_INTERPRET out of the environment, and a sweep on a CPU interprets kernels.
    from mvlm_kernels import aot

    case = chosen_cases(batch, torch.bfloat16, small)[number]
    inputs, capability = case.make("meta"), aot.capability_of(arch)
    work = [
        (target, change)
        for target in targets_of(case, inputs, capability)
        for change in variants(target.kernel, target.options, few=small)
    ]
    for target, change in work[part::parts]:
        row: Row = {"target": target.name, "change": change}
        try:
            with dispatch.override_launch(target.kernel, **change), long_sides(case):
                launches = case.launches(capability, inputs)
            launch = next(x for x in launches if (x.pass_name, x.kernel.__name__) == (target.pass_name, target.kernel))
            cost = aot.row(case.op, launch, arch)
            row |= {key: cost[key] for key in ("registers", "spill_bytes", "shared")}
        except Exception as error:
            row["error"] = one_line(error)
        yield row


def _compiled(work: tuple[int, bool, str, int, int, int]) -> list[Row]:
    return list(compile_case(*work))


PARTS = 3
"""Pieces into which the variants of a case are divided among processes."""


def compile_all(batch: int, small: bool, arch: str, jobs: int) -> Iterator[Row]:
    """Rows of all variants of all cases, in the order of the cases. jobs: processes."""
    numbers = range(len(chosen_cases(batch, torch.bfloat16, small)))
    if jobs == 1:
        for number in numbers:
            yield from compile_case(batch, small, arch, number)
        return
    work = [(batch, small, arch, number, part, PARTS) for number in numbers for part in range(PARTS)]
    # A forked process could not use the GPU that its parent has opened.
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        for rows in pool.map(_compiled, work):
            yield from rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--arch", default="sm_90", help="such as sm_90")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args()
    for row in compile_all(options.batch, options.small, options.arch, options.jobs):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    sys.exit(main())
