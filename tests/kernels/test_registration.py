"""Registration, shown on a small op: gradients, fake tensors, opcheck and full-graph compilation."""

import pytest
import torch

from mvlm_kernels import registration


def _scale(x: torch.Tensor, factor: float) -> torch.Tensor:
    return x * factor


class _Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx, forward, x, factor):
        ctx.factor = factor
        return forward(x, factor)

    @staticmethod
    def backward(ctx, grad):
        return None, OP(grad, ctx.factor), None


OP = registration.define(
    "test_scale(Tensor x, float factor) -> Tensor", _scale, lambda x, f: torch.empty_like(x), _Scale
)


@pytest.mark.slow
@pytest.mark.plain_empty
def test_registered_op_passes_opcheck():
    torch.library.opcheck(OP, (torch.randn(3, requires_grad=True), 2.0))


def test_registered_op_has_a_gradient_and_compiles():
    for f in (OP, torch.compile(OP, fullgraph=True, dynamic=True, backend="aot_eager")):
        x = torch.randn(5, requires_grad=True)
        f(x, 3.0).sum().backward()
        torch.testing.assert_close(x.grad, torch.full((5,), 3.0))
