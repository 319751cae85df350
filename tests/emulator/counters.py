"""Traffic of the kernels of ``mvlm_kernels``, counted while they are emulated.

    PYTHONPATH=tests TRITON_INTERPRET=0 python -m emulator.counters sm_80 [--select REGEX] [--inefficient]

The cases are those of `mvlm bench kernels` for one image. A Markdown table has one
row a launch: grid, bytes asked for and sectors (32 bytes) a request of global memory, passes over the banks of shared
memory against the fewest possible, warp instructions, and operations of the tensor cores. There are no caches: every
request counts. A full request of 16 bytes a lane touches 16 sectors.
"""

import argparse
import re
from collections.abc import Iterator

import torch

from emulator.library import on_gpu
from mvlm_benchmarks.kernels.cases import cases
from mvlm_benchmarks.kernels.peers import ours
from mvlm_kernels.case import Case, as_results
from triton_proof.driver import ARCHS, recorded
from triton_proof.report import SPACES, Launch

COLUMNS = (
    "case", "kernel", "grid", "shared B", "load B", "sectors/request", "efficiency", "store B", "sectors/request",
    "efficiency", "bank passes/fewest, load", "store", "warp instructions", "tensor-core Mflop",
)  # fmt: skip


def launches_of(case: Case, arch: str) -> list[Launch]:
    """Launches of the forward and the backward pass of a case."""
    with on_gpu(arch), recorded(checks=False) as launches:
        inputs = case.make("cpu")
        outs = as_results(ours(case, inputs)(*inputs.leaves.values()))
        if inputs.leaves:
            torch.autograd.grad(outs, list(inputs.leaves.values()), [torch.ones_like(out) for out in outs])
    return launches


def row(case: Case, launch: Launch) -> str:
    cells: list[object] = [f"{case.op} {case.label}", launch.kernel, "x".join(map(str, launch.grid)), launch.shared]
    for space in SPACES[:2]:
        x = launch.total(space)
        cells += [x.bytes, f"{x.units / max(x.requests, 1):.1f}", f"{x.efficiency(space):.0%}"]
    cells += [f"{launch.total(space).units}/{launch.total(space).ideal}" for space in SPACES[2:]]
    cells += [sum(launch.instructions.values()), f"{launch.flops / 1e6:.1f}"]
    return f"| {' | '.join(map(str, cells))} |"


def table(arch: str, select: str, inefficient: bool) -> Iterator[str]:
    """Lines of the table. inefficient: each row is followed by the source lines that read or write badly."""
    yield f"| {' | '.join(COLUMNS)} |"
    yield "|---" * len(COLUMNS) + "|"
    for case in cases(1, torch.bfloat16):
        if case.has_kernels and not case.left_to_torch and re.search(select, f"{case.op} {case.label}"):
            for launch in launches_of(case, arch):
                yield row(case, launch)
                if inefficient:
                    yield from (f"    {line}" for line in launch.inefficient())


def main() -> None:
    arguments = argparse.ArgumentParser(prog="python -m emulator.counters", description=(__doc__ or "").split("\n")[0])
    arguments.add_argument("arch", choices=list(ARCHS))
    arguments.add_argument("--select", default="", help='regex over "op shape"')
    arguments.add_argument("--inefficient", action="store_true", help="also list the source lines that move data badly")
    options = arguments.parse_args()
    torch.set_num_threads(1)
    for line in table(options.arch, options.select, options.inefficient):
        print(line, flush=True)


if __name__ == "__main__":
    main()
