"""Residual sum and LayerNorm in one pass; see :func:`add_layer_norm`.

The backward pass is one kernel and a small sum of partial results, in ``triton.py``.
"""

import math
from typing import Any

import torch
from torch import Tensor

from mvlm_kernels import dispatch, registration
from mvlm_kernels.add_layer_norm import reference
from mvlm_kernels.arguments import check_dtype, check_flag, check_number, check_tensor, compute_dtype
from mvlm_kernels.dispatch import FLOAT64, Refusal, refusal

__all__ = ["add_layer_norm"]

WIDEST = 8192
"""Largest C of the kernels: a row has to fit in registers."""


def _checked(
    x: Tensor, y: Tensor | None, y_bias: Tensor | None, weight: Tensor, bias: Tensor, eps: float, out_dtype: Any,
    post_norm: bool,
) -> tuple[float, torch.dtype, bool]:  # fmt: skip
    """Check the arguments, and return eps, the dtype of the norm and post_norm."""
    check_tensor("x", x)
    shape, device = x.shape, x.device
    if not shape or not shape[-1]:
        raise ValueError(f"x must have shape (.., C) with C at least 1, got {tuple(shape)}")
    if y is not None:
        check_tensor("y", y, device=device)
        if y.shape != shape:
            raise ValueError(f"y must have the shape of x, {tuple(shape)}, got {tuple(y.shape)}")
    elif y_bias is not None:
        raise ValueError(f"y_bias must be None where y is None, got {type(y_bias).__name__}")
    for name, row in (("weight", weight), ("bias", bias), ("y_bias", y_bias)):
        if row is None and name == "y_bias":
            continue
        check_tensor(name, row, device=device)
        assert row is not None
        if row.shape != shape[-1:]:
            raise ValueError(f"{name} must have shape ({shape[-1]},), got {tuple(row.shape)}")
    if out_dtype is None:
        out_dtype = x.dtype if y is None else y.dtype
    else:
        check_dtype("out_dtype", out_dtype)
    return check_number("eps", eps, 0.0), out_dtype, check_flag("post_norm", post_norm)


def _reasons(x: Tensor) -> tuple[Refusal, ...]:
    """Every reason against the kernels."""
    found = dispatch.reasons_for("add_layer_norm", x.device)
    if x.shape[-1] > WIDEST:
        reason = f"a row has {x.shape[-1]} values, the kernels hold at most {WIDEST} in registers"
        found = (*found, refusal(reason, "torch runs; use rows of at most that width"))
    if x.dtype == torch.float64 and x.device.type == "cuda":
        found = (*found, FLOAT64)
    return found


@dispatch.explained_by(_reasons, _checked)
def add_layer_norm(
    x: Tensor,
    y: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    *,
    y_bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    post_norm: bool = False,
) -> tuple[Tensor, Tensor]:
    """Residual sum of a transformer block and the LayerNorm after it: ``s = x + y + y_bias``, ``n = LayerNorm(s)``.

    Under autocast a block reads and writes its float32 stream for the sum, again for the norm, and once more for the
    copy in 16 bits. Here each tensor is read or written once, forward and backward.

    Args:
        x: the residual stream (.., C), usually float32.
        y: (.., C), what a sub-layer adds to it, usually bfloat16 or float16. None adds nothing.
        weight, bias: (C,), of the norm.
        eps: added to the variance.
        y_bias: (C,), the bias of the linear layer that made y, if that layer has not added it. Its gradient, the
            column sums of y's, then costs no pass of its own.
        out_dtype: dtype of n; None for the dtype of y, or of x without y.
        post_norm: the stream continues with n and not with s.

    Returns:
        The stream and n, both (.., C). The stream is s, or with post_norm n, in the dtype that torch promotes x and y
        to. It is x itself if nothing is added, and n if both are n in one dtype.

    Differentiable in all tensors, once. Sums and moments are in float32 (float64 for float64); gradients of the four
    vectors are summed over rows in a fixed order, without atomics.

    Raises:
        ValueError: for an argument of another kind, a wrong shape, dtype or device, a y_bias without y, and an eps that
            is negative or not finite.
    """
    eps, out_dtype, post_norm = _checked(x, y, y_bias, weight, bias, eps, out_dtype, post_norm)
    tensors = [t for t in (x, y, y_bias, weight, bias) if t is not None]
    total, wide, normalised, _, _ = _op.on(*tensors)(x, y, y_bias, weight, bias, eps, out_dtype, post_norm)
    if post_norm:
        return (normalised if out_dtype == reference.sum_dtype(x, y) else wide), normalised
    return (x if y is None else total), normalised


def _forward(x, y, y_bias, weight, bias, eps, out_dtype, post_norm):
    args = x, y, y_bias, weight, bias, eps, out_dtype, post_norm
    if dispatch.choose(_reasons(x)) == "torch":
        return reference.add_layer_norm(*args)
    from mvlm_kernels.add_layer_norm import triton

    return dispatch.run_kernels(("add_layer_norm", x.device), triton.add_layer_norm, reference.add_layer_norm, *args)


def _forward_fake(x, y, y_bias, weight, bias, eps, out_dtype, post_norm):
    dtype = reference.sum_dtype(x, y)
    total = x.new_empty(x.shape if y is not None else (0,), dtype=dtype)
    wide = x.new_empty(x.shape if post_norm and out_dtype != dtype else (0,), dtype=dtype)
    rows = math.prod(x.shape[:-1])  # the shape's own numel() would be a constant of an exported program
    moments = (x.new_empty(rows, dtype=compute_dtype(dtype)) for _ in range(2))
    return total, wide, x.new_empty(x.shape, dtype=out_dtype), *moments


def _backward(grad_normalised, grad_residual, total, mean, rstd, weight, x_dtype, y_dtype, post_norm, needs_bias):
    args = grad_normalised, grad_residual, total, mean, rstd, weight, x_dtype, y_dtype, post_norm, needs_bias
    if dispatch.choose(_reasons(total)) == "torch":
        return reference.add_layer_norm_backward(*args)
    from mvlm_kernels.add_layer_norm import triton

    by_triton, by_torch = triton.add_layer_norm_backward, reference.add_layer_norm_backward
    return dispatch.run_kernels(("add_layer_norm", total.device), by_triton, by_torch, *args)


def _backward_fake(grad_normalised, grad_residual, total, mean, rstd, weight, x_dtype, y_dtype, post_norm, needs_bias):
    sums = total.new_empty((3 if needs_bias else 2, total.shape[-1]), dtype=compute_dtype(total.dtype))
    dy = total.new_empty(total.shape if y_dtype != x_dtype else (0,), dtype=y_dtype)
    return total.new_empty(total.shape, dtype=x_dtype), dy, sums


class _AddLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, forward, x, y, y_bias, weight, bias, eps, out_dtype, post_norm):
        outputs = forward(x, y, y_bias, weight, bias, eps, out_dtype, post_norm)
        total, wide, normalised, mean, rstd = outputs
        ctx.save_for_backward(x if y is None else total, mean, rstd, weight)
        ctx.dtypes = x.dtype, x.dtype if y is None else y.dtype
        ctx.parameters = [None if p is None else p.dtype for p in (y_bias, weight, bias)]
        ctx.post_norm = post_norm
        ctx.set_materialize_grads(False)
        unused = [mean, rstd]
        if y is None:
            unused.append(total)
        if wide.ndim != normalised.ndim:
            unused.append(wide)
        ctx.mark_non_differentiable(*unused)
        return outputs

    @staticmethod
    def backward(ctx, grad_total, grad_wide, grad, *_):
        total, mean, rstd, weight = ctx.saved_tensors
        grad_residual = grad_wide if ctx.post_norm else grad_total
        if grad is None:
            if grad_residual is None:
                return (None,) * 9
            grad = torch.zeros_like(total)
        x_dtype, y_dtype = ctx.dtypes
        needs_bias = ctx.needs_input_grad[3]
        dx, dy, sums = _backward_op.in_function(grad)(
            grad, grad_residual, total, mean, rstd, weight, x_dtype, y_dtype, ctx.post_norm, needs_bias
        )
        bias_dtype, *norm_dtypes = ctx.parameters
        dw, db = (s.to(dtype) for s, dtype in zip(sums, norm_dtypes, strict=False))
        dx_or_none, dy_or_none = (
            g if need else None
            for g, need in zip((dx, dx if y_dtype == x_dtype else dy), ctx.needs_input_grad[1:3], strict=True)
        )
        return None, dx_or_none, dy_or_none, sums[2].to(bias_dtype) if needs_bias else None, dw, db, None, None, None


_backward_op = registration.define(
    "add_layer_norm_backward(Tensor grad_normalised, Tensor? grad_residual, Tensor total, Tensor mean, Tensor rstd, "
    "Tensor weight, ScalarType x_dtype, ScalarType y_dtype, bool post_norm, bool needs_bias) "
    "-> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
    registration.no_second_derivative("add_layer_norm", "torch.nn.functional.layer_norm of the sum"),
)
_op = registration.define(
    "add_layer_norm(Tensor x, Tensor? y, Tensor? y_bias, Tensor weight, Tensor bias, float eps, "
    "ScalarType out_dtype, bool post_norm) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
    _AddLayerNorm,
)
