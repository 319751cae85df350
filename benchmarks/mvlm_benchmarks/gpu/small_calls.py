"""One forward and backward pass of each small case, for compute-sanitizer: `python -m mvlm_benchmarks.gpu.small_calls`.

    python -m mvlm_benchmarks.gpu.small_calls [--op NAME] [--kernel NAME] [--paper] [--rehearse]

Prints a line per case. Exits with 1 after a wrong value, so that a tool that finds nothing in a wrong kernel is not
believed. With --kernel only the first case that launches it, and with --paper the cases at the paper's sizes, for
Nsight Compute: drawing the inputs of all takes longer than the profile of one.
"""

import argparse
import contextlib
import itertools
import sys

import torch

from mvlm_benchmarks.clock import make_clock
from mvlm_benchmarks.kernels.cases import cases
from mvlm_benchmarks.kernels.measure import LocalContender
from mvlm_benchmarks.kernels.peers import ours
from mvlm_benchmarks.kernels.reference import CaseData
from mvlm_benchmarks.machine import gpu_arch
from mvlm_kernels import use_backend
from mvlm_kernels.case import Case
from mvlm_kernels.cases import small as small_cases


def check(case: Case, device: str) -> str:
    """Run a case on our kernels. Returns "ok", or the first problem."""
    data = CaseData.make(case, device)
    with use_backend("triton"):
        local = LocalContender(data, [ours(case, inputs) for inputs in data.sets], make_clock(device, True))
        for outcome in local.check().values():
            if outcome.status != "ok":
                return f"{outcome.status}: {outcome.note}"
    return "ok"


def chosen_cases(op: str, kernel: str, paper: bool, dtype: torch.dtype) -> list[Case]:
    """Cases of an op, or of all if it is empty. With a kernel, the first one that launches it, or none.

    paper: core cases at the paper's sizes, in place of the small ones.
    """
    found = [c for c in cases(256, dtype) if c.core] if paper else small_cases(dtype)
    found = [case for case in found if op in ("", case.op)]
    if not kernel:
        return found
    arch = gpu_arch() if torch.cuda.is_available() else 90  # the same kernels run on a later one
    launching = (case for case in found if kernel in {x.kernel.__name__ for x in case.launches(arch)})
    return list(itertools.islice(launching, 1))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--op", default="", help="only this op")
    parser.add_argument("--kernel", default="", help="only the first case that launches it")
    parser.add_argument("--paper", action="store_true", help="the paper's sizes: core cases only")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU")
    options = parser.parse_args()
    dtype = torch.float32 if options.rehearse else torch.bfloat16
    bad = 0
    for case in chosen_cases(options.op, options.kernel, options.paper, dtype):
        with contextlib.redirect_stdout(sys.stderr):
            found = check(case, "cpu" if options.rehearse else "cuda")
        print(f"{case.op}, {case.label}: {found}", flush=True)
        bad += found != "ok"
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
