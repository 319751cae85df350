"""Cases of the byte counter (:mod:`mvlm_kernels.cases`), emulated at the small sizes at which it counts.

Values are compared with the op's torch code. An op that has a counted case is emulated with nothing written here.
"""

from functools import partial

import torch
from torch import Tensor

from emulator.cases import Cases
from mvlm_kernels import use_backend
from mvlm_kernels.cases import Case
from mvlm_kernels.cases import cases as counted_cases

# An L1 slope flips where the prediction, rounded, meets the pixel: one flip in a hundred would be 20 % of the RMS.
RMS = 3e-2


def check(case: Case) -> None:
    sizes = {**case.sizes, **{name: small for name, (_, small) in case.samples.items()}}
    results = []
    for backend in ("triton", "torch"):
        torch.manual_seed(0)
        leaves, op = case.run(sizes, "cpu")
        with torch.no_grad():
            for x in leaves:
                x.normal_()
        with use_backend(backend):
            out = op(*leaves)
            grad = torch.randn(out.shape).to(out)
            results.append([out, *(torch.autograd.grad(out, leaves, grad) if leaves else ())])
    for i, (got, want) in enumerate(zip(*results, strict=True)):
        _assert_close("output" if i == 0 else f"gradient {i}", got.detach().double(), want.detach().double())


def _assert_close(name: str, got: Tensor, want: Tensor) -> None:
    assert torch.equal(got.isnan(), want.isnan()), f"{name}: NaN"
    error = (got - want).nan_to_num().square().mean().sqrt()
    scale = want.nan_to_num().square().mean().sqrt()
    assert error <= RMS * scale, f"{name}: relative RMS error {float(error / scale):.2e}"


def cases() -> Cases:
    for case in counted_cases():
        yield f"{case.op}/{case.shape}", partial(check, case)
