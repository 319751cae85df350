"""GELU and the linear layer after it, as in a feed-forward layer; see :func:`gelu_linear`.

Matrix products are torch's. The GELU, its gradient and the gradient of the bias in front are kernels, in ``triton.py``.
"""

from typing import Any

import torch
from torch import Tensor

from mvlm_kernels import dispatch, registration, shadows
from mvlm_kernels.arguments import check_tensor
from mvlm_kernels.dispatch import FLOAT64, Refusal, refusal
from mvlm_kernels.gelu_linear import reference, room
from mvlm_kernels.linear import linear

__all__ = ["gelu_linear"]

_TRANSFORMED = refusal(
    "transforms of torch.func and dual numbers have no kernel", "torch runs; call it outside of them"
)


def _check(h: Tensor, weight: Tensor, bias: Tensor | None, h_bias: Tensor | None) -> None:
    check_tensor("h", h)
    device = h.device
    check_tensor("weight", weight, device=device)
    if h.ndim < 2 or weight.ndim != 2 or weight.shape[1] != h.shape[-1]:
        raise ValueError(
            f"h and weight must have shapes (.., C) and (D, C), got {tuple(h.shape)} and {tuple(weight.shape)}"
        )
    for name, x, size in (("bias", bias, weight.shape[0]), ("h_bias", h_bias, weight.shape[1])):
        if x is None:
            continue
        check_tensor(name, x, device=device)
        if x.shape != (size,):
            raise ValueError(f"{name} must have shape ({size},), got {tuple(x.shape)}")


def _reasons_of_call(h: Tensor) -> tuple[Refusal, ...]:
    return (*_reasons(h), _TRANSFORMED) if registration.transformed() else _reasons(h)


def _reasons(h: Tensor) -> tuple[Refusal, ...]:
    found = dispatch.reasons_for("gelu_linear", h.device)
    if h.dtype == torch.float64 and h.device.type == "cuda":
        found = (*found, FLOAT64)
    return found


@dispatch.explained_by(_reasons_of_call, _check)
def gelu_linear(h: Tensor, weight: Tensor, bias: Tensor | None = None, *, h_bias: Tensor | None = None) -> Tensor:
    """Second half of a feed-forward layer: ``linear(gelu(h + h_bias), weight, bias)`` with the exact GELU.

    Backward, one kernel reads h and the gradient once, and writes the gradient of h and the column sums that are the
    gradient of h_bias. The gradient of weight needs the GELU: it is saved on a CPU, and on a GPU as long as earlier
    steps left memory free (:class:`mvlm_kernels.gelu_linear.room.Room`). Elsewhere the kernel writes it again.

    Args:
        h: floating (.., C), usually bfloat16 or float16.
        weight: (D, C), as nn.Linear; bias: (D,) or None.
        h_bias: (C,), the bias of the linear layer that made h, if that layer has not added it.

    Returns:
        (.., D) in h's dtype. Products are in h's dtype, under autocast too; parameters are converted to it, and their
        gradients come in their own dtypes.

    Differentiable in all tensors, once; under torch.func and with dual numbers, where plain torch runs, any number of
    times. The gradient of h_bias is summed in a fixed order, without atomics.

    Raises:
        ValueError: for an argument of another kind, and a wrong shape, dtype or device.
    """
    _check(h, weight, bias, h_bias)
    if registration.transformed():
        dispatch.refuse_if_forced(_TRANSFORMED)
        return _linear(reference.gelu(h, h_bias), weight, bias)
    return _GeluLinear.apply(h, weight, bias, h_bias, torch.is_grad_enabled())  # pyright: ignore[reportReturnType]


def _gelu(h, h_bias):
    if dispatch.choose(_reasons(h)) == "torch":
        return reference.gelu(h, h_bias)
    from mvlm_kernels.gelu_linear import triton

    return dispatch.run_kernels(("gelu_linear", h.device), triton.gelu, reference.gelu, h, h_bias)


def _gelu_backward(grad, h, h_bias, again):
    args = grad, h, h_bias, again
    if dispatch.choose(_reasons(h)) == "torch":
        return reference.gelu_backward(*args)
    from mvlm_kernels.gelu_linear import triton

    return dispatch.run_kernels(("gelu_linear", h.device), triton.gelu_backward, reference.gelu_backward, *args)


def _gelu_backward_fake(grad, h, h_bias, again):
    sums = h.new_empty(0 if h_bias is None else h.shape[-1], dtype=torch.promote_types(h.dtype, torch.float32))
    return h.new_empty(h.shape), h.new_empty(h.shape if again else 0), sums


def _linear(activated: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    dtype = activated.dtype
    weight, bias = shadows.converted(weight, dtype), None if bias is None else shadows.converted(bias, dtype)
    return linear(activated, weight, bias)  # in this dtype, as backward does


class _GeluLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, h: Tensor, weight: Tensor, bias: Tensor | None, h_bias: Tensor | None, differentiable: bool
    ) -> Tensor:
        ctx.bias_dtype = None if bias is None else bias.dtype
        activated = _gelu_op.in_function(h)(h, h_bias)
        wanted = differentiable and ctx.needs_input_grad[1]
        keep, ctx.held = room.save(activated) if wanted else (False, None)
        shadow = shadows.held(weight, h.dtype)
        ctx.save_for_backward(h, weight, h_bias, activated if keep else None, shadow)
        out = _linear(activated, weight, bias)
        # F.linear may give a view of its product, and autograd forbids to write to a view that a Function made.
        return torch.ops.aten._unsafe_view(out, out.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        h, weight, h_bias, activated, shadow = ctx.saved_tensors
        if torch.is_grad_enabled() and (h.requires_grad or (h_bias is not None and h_bias.requires_grad)):
            # With create_graph=True. The saved one has no graph, the op's result refuses to be differentiated.
            activated = None
        grad, trains_weight = grads[0].flatten(0, -2), ctx.needs_input_grad[1]
        if shadow is None or torch.is_grad_enabled():
            shadow = weight.to(h.dtype)
        by_activation = (grad @ shadow).view(h.shape)
        dh, recomputed, sums = _gelu_backward_op.in_function(by_activation)(
            by_activation, h, h_bias, trains_weight and activated is None
        )
        activated = recomputed if activated is None else activated
        dw = (grad.T @ activated.flatten(0, -2)).to(weight.dtype) if trains_weight else None
        db = None if ctx.bias_dtype is None else grad.sum(0).to(ctx.bias_dtype)
        if ctx.held is not None:
            ctx.held.release()
        return dh, dw, db, None if h_bias is None else sums.to(h_bias.dtype), None


_gelu_op = registration.define(
    "gelu(Tensor h, Tensor? h_bias) -> Tensor", _gelu, lambda h, h_bias: h.new_empty(h.shape)
)
_gelu_backward_op = registration.define(
    "gelu_backward(Tensor grad, Tensor h, Tensor? h_bias, bool again) -> (Tensor, Tensor, Tensor)",
    _gelu_backward,
    _gelu_backward_fake,
    registration.no_second_derivative("gelu_linear", "torch.nn.functional.gelu and linear"),
)
