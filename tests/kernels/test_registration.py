"""Registration, shown on a small op: gradients, fake tensors, opcheck and full-graph compilation."""

import pytest
import torch

import mvlm_kernels  # noqa: F401, registers the ops
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


@pytest.mark.slow
def test_registered_op_has_a_gradient_and_compiles():
    for f in (OP, torch.compile(OP, fullgraph=True, dynamic=True, backend="aot_eager")):
        x = torch.randn(5, requires_grad=True)
        f(x, 3.0).sum().backward()
        torch.testing.assert_close(x.grad, torch.full((5,), 3.0))


def test_every_device_has_an_implementation():
    # Other devices than CPU and CUDA run torch. The suite has none of them, so it asks the dispatcher.
    names = ["test_scale", "cross_attention", "cross_attention_backward", "gather_patches", "place_tokens_backward"]
    for name in names:
        for device in ("CPU", "CUDA", "XPU", "MPS", "HPU", "PrivateUse1"):
            for key in (device, f"Autograd{device}"):
                assert torch._C._dispatch_has_computed_kernel_for_dispatch_key(f"mvlm_kernels::{name}", key), (
                    name,
                    key,
                )


def test_second_derivative_of_a_backward_op_is_refused_by_name():
    refusal = registration.no_second_derivative("an_op", "another")
    op = registration.define(
        "test_refusal(Tensor grad) -> Tensor", lambda grad: grad * 2, lambda grad: torch.empty_like(grad), refusal
    )
    x = torch.randn(3, requires_grad=True)
    with pytest.raises(RuntimeError, match="an_op has no second derivative; use another"):
        torch.autograd.grad(op(x).sum(), x, allow_unused=True)
