"""The small cases of the benchmarks, emulated.

Values are compared with the op's torch code. An op that has a small case is emulated with nothing written here.
"""

from functools import partial

import torch
from torch import Tensor

from emulator.cases import Cases
from mvlm_benchmarks.kernels.cases import small_cases
from mvlm_benchmarks.kernels.inputs import Case
from mvlm_benchmarks.kernels.peers import ours
from mvlm_benchmarks.kernels.reference import as_results
from mvlm_kernels import use_backend

# An L1 slope flips where the prediction, rounded, meets the pixel: one flip in a hundred would be 20 % of the RMS.
RMS = 3e-2


def check(case: Case) -> None:
    results = []
    for backend in ("triton", "torch"):
        inputs = case.make("cpu")
        torch.manual_seed(0)
        leaves = list(inputs.leaves.values())
        with use_backend(backend):
            outs = as_results(ours(case, inputs)(*leaves))
            grads = [torch.randn(out.shape).to(out) for out in outs]
            results.append([*outs, *(torch.autograd.grad(outs, leaves, grads) if leaves else ())])
    for i, (got, want) in enumerate(zip(*results, strict=True)):
        _assert_close(f"result {i}", got.detach().double(), want.detach().double())


def _assert_close(name: str, got: Tensor, want: Tensor) -> None:
    assert torch.equal(got.isnan(), want.isnan()), f"{name}: NaN"
    error = (got - want).nan_to_num().square().mean().sqrt()
    scale = want.nan_to_num().square().mean().sqrt()
    assert error <= RMS * scale, f"{name}: relative RMS error {float(error / scale):.2e}"


def cases() -> Cases:
    for number, case in enumerate(small_cases(torch.bfloat16)):
        # pytest replaces ids of more than 100 characters, and -k would not find their cases.
        yield f"{case.op}/{number}: {case.shape:.40}", partial(check, case)
