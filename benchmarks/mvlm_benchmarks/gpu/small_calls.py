"""One forward and backward pass of each small case, for compute-sanitizer: `python -m mvlm_benchmarks.gpu.small_calls`.

    python -m mvlm_benchmarks.gpu.small_calls [--op NAME] [--paper] [--rehearse]

Prints a line per case. Exits with 1 after a wrong value, so that a tool that finds nothing in a wrong kernel is not
believed. With --paper, the first case of each op at the paper's sizes, for Nsight Compute.
"""

import argparse
import contextlib
import sys

import torch

from mvlm_benchmarks.clock import make_clock
from mvlm_benchmarks.gpu.small_cases import small_cases
from mvlm_benchmarks.kernels.cases import cases
from mvlm_benchmarks.kernels.inputs import Case
from mvlm_benchmarks.kernels.measure import LocalContender
from mvlm_benchmarks.kernels.peers import ours
from mvlm_benchmarks.kernels.reference import CaseData
from mvlm_kernels import use_backend


def check(case: Case, device: str) -> str:
    """Run a case on our kernels. Returns "ok", or the first problem."""
    data = CaseData.make(case, device)
    with use_backend("triton"):
        local = LocalContender(data, [ours(case, inputs) for inputs in data.sets], make_clock(device, True))
        for outcome in local.check().values():
            if outcome.status != "ok":
                return f"{outcome.status}: {outcome.note}"
    return "ok"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--op", default="", help="only this op")
    parser.add_argument("--paper", action="store_true", help="the paper's sizes: core cases only")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU")
    options = parser.parse_args()
    dtype = torch.float32 if options.rehearse else torch.bfloat16
    chosen = [c for c in cases(256, dtype) if c.core] if options.paper else small_cases(dtype)
    bad = 0
    for case in chosen:
        if options.op in ("", case.op):
            with contextlib.redirect_stdout(sys.stderr):
                found = check(case, "cpu" if options.rehearse else "cuda")
            print(f"{case.op}, {case.shape}: {found}", flush=True)
            bad += found != "ok"
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
