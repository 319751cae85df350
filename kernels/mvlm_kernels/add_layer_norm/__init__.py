"""Residual sum and LayerNorm or RMSNorm in one pass, with gate, scale and shift; see :func:`add_layer_norm`.

The backward pass is one kernel and a small sum of partial results, in ``triton.py``.
"""

import math
from typing import Any, Literal

import torch
from torch import Tensor

from mvlm_kernels import dispatch, registration
from mvlm_kernels.add_layer_norm import reference
from mvlm_kernels.arguments import check_choice, check_dtype, check_flag, check_number, check_tensor, compute_dtype
from mvlm_kernels.dispatch import FLOAT64, Refusal, refusal

__all__ = ["add_layer_norm"]

WIDEST = 8192
"""Largest C of the kernels: a row has to fit in registers."""
OF_SAMPLES = "gate", "scale", "shift"
"""Arguments that may hold one vector for each sample, (B, C), in place of one for all rows, (C,)."""


def _checked(
    x: Tensor, y: Tensor | None, y_bias: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float,
    out_dtype: Any, post_norm: bool, gate: Tensor | None, scale: Tensor | None, shift: Tensor | None, kind: str,
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
    of_all = shape[-1:]
    for name, vector in (
        ("weight", weight), ("bias", bias), ("y_bias", y_bias), ("gate", gate), ("scale", scale), ("shift", shift)
    ):  # fmt: skip
        if vector is None:
            continue
        check_tensor(name, vector, device=device)
        if y is None and name in ("y_bias", "gate"):
            raise ValueError(f"{name} must be None where y is None, got {type(vector).__name__}")
        if vector.shape != of_all:
            wanted = [(*of_all,), (shape[0], *of_all)] if name in OF_SAMPLES and len(shape) > 1 else [(*of_all,)]
            if (*vector.shape,) not in wanted:
                raise ValueError(f"{name} must have shape {' or '.join(map(str, wanted))}, got {(*vector.shape,)}")
    check_choice("kind", kind, ("layer", "rms"))
    if out_dtype is None:
        out_dtype = x.dtype if y is None else y.dtype
    else:
        check_dtype("out_dtype", out_dtype)
    return check_number("eps", eps, 0.0), out_dtype, check_flag("post_norm", post_norm)


def _reasons(x: Tensor) -> tuple[Refusal, ...]:
    """Every reason why no fused kernel runs for a residual stream x (.., C); empty if one does."""
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
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float = 1e-5,
    *,
    y_bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    post_norm: bool = False,
    gate: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    kind: Literal["layer", "rms"] = "layer",
) -> tuple[Tensor, Tensor]:
    """Residual sum of a transformer block and the norm after it, modulated as in adaptive LayerNorm (AdaLN).

    ``s = x + gate (y + y_bias)`` and ``n = (1 + scale) (normalised(s) weight + bias) + shift``.

    Under autocast a block reads and writes its float32 stream for the sum, again for the norm, and once more for the
    copy in 16 bits. Here each tensor is read or written once, forward and backward.

    Args:
        x: the residual stream (B, .., C), usually float32.
        y: (B, .., C), what a sub-layer adds to it, usually bfloat16 or float16. None adds nothing.
        weight, bias: (C,), of the norm. None for 1 and for 0.
        eps: added to the variance, or to the mean square.
        y_bias: (C,), the bias of the linear layer that made y, if that layer has not added it. Its gradient, the
            column sums of y's, then costs no pass of its own.
        out_dtype: dtype of n; None for the dtype of y, or of x without y.
        post_norm: the stream continues with n and not with s.
        gate, scale, shift: (B, C), one vector for the rows of a sample, as of AdaLN, or (C,), as of LayerScale. Vectors
            of a sample may be slices of one tensor (B, 6 C). None for 1, 0 and 0.
        kind: "layer" divides deviations from the row's mean by the standard deviation, "rms" the row by its root mean
            square.

    Returns:
        The stream and n, both (B, .., C). The stream is s, or with post_norm n, in the dtype that torch promotes x and
        y to. It is x itself if nothing is added, and n if both are n in one dtype.

    Differentiable in all tensors, once. Sums and moments are in float32 (float64 for float64); gradients of the
    vectors are summed over rows in a fixed order, without atomics.

    Raises:
        ValueError: for an argument of another kind, a wrong shape, dtype or device, a y_bias or a gate without y, and
            an eps that is negative or not finite.
    """
    eps, out_dtype, post_norm = _checked(
        x, y, y_bias, weight, bias, eps, out_dtype, post_norm, gate, scale, shift, kind
    )
    tensors = [t for t in (x, y, y_bias, weight, bias, gate, scale, shift) if t is not None]
    total, wide, normalised, _, _ = _op.on(*tensors)(
        x, y, y_bias, weight, bias, gate, scale, shift, eps, out_dtype, post_norm, kind == "rms"
    )
    if post_norm:
        return (normalised if out_dtype == reference.sum_dtype(x, y) else wide), normalised
    return (x if y is None else total), normalised


def _forward(x, *args):
    if dispatch.choose(_reasons(x)) == "torch":
        return reference.add_layer_norm(x, *args)
    from mvlm_kernels.add_layer_norm import triton

    call = "add_layer_norm", x.device
    return dispatch.run_kernels(call, triton.add_layer_norm, reference.add_layer_norm, x, *args)


def _forward_fake(x, y, y_bias, weight, bias, gate, scale, shift, eps, out_dtype, post_norm, rms):
    dtype = reference.sum_dtype(x, y)
    total = x.new_empty(x.shape if y is not None else (0,), dtype=dtype)
    wide = x.new_empty(x.shape if post_norm and out_dtype != dtype else (0,), dtype=dtype)
    rows = math.prod(x.shape[:-1])  # the shape's own numel() would be a constant of an exported program
    moments = (x.new_empty(n, dtype=compute_dtype(dtype)) for n in (0 if rms else rows, rows))
    return total, wide, x.new_empty(x.shape, dtype=out_dtype), *moments


def _backward(grad_normalised, grad_residual, total, *args):
    args = grad_normalised, grad_residual, total, *args
    if dispatch.choose(_reasons(total)) == "torch":
        return reference.add_layer_norm_backward(*args)
    from mvlm_kernels.add_layer_norm import triton

    by_triton, by_torch = triton.add_layer_norm_backward, reference.add_layer_norm_backward
    return dispatch.run_kernels(("add_layer_norm", total.device), by_triton, by_torch, *args)


def _backward_fake(
    grad_normalised, grad_residual, total, mean, rstd, y, weight, gate, scale, x_dtype, y_dtype, post_norm, shifted,
    branched, groups, rms,
):  # fmt: skip
    count = reference.sums_of(y, weight, scale, shifted, branched)
    sums = total.new_empty((count, groups, total.shape[-1]), dtype=compute_dtype(total.dtype))
    dy = total.new_empty(total.shape if y_dtype != x_dtype or gate is not None else (0,), dtype=y_dtype)
    return total.new_empty(total.shape, dtype=x_dtype), dy, sums


class _AddLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, forward, x, y, *args):
        y_bias, weight, bias, gate, scale, shift, _, _, post_norm, rms = args
        outputs = forward(x, y, *args)
        total, wide, normalised, mean, rstd = outputs
        gate_trains = ctx.needs_input_grad[6]
        ctx.save_for_backward(
            x if y is None else total, mean, rstd, y if gate_trains else None, weight, gate, scale,
            y_bias if gate_trains else None, bias if ctx.needs_input_grad[7] else None,
        )  # fmt: skip
        ctx.dtypes = x.dtype, x.dtype if y is None else y.dtype
        ctx.vectors = [None if v is None else (v.ndim, v.dtype) for v in (y_bias, weight, bias, gate, scale, shift)]
        ctx.groups, ctx.post_norm, ctx.rms = reference.groups_of(gate, scale, shift), post_norm, rms
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
        total, mean, rstd, y, weight, gate, scale, y_bias, bias = ctx.saved_tensors
        grad_residual = grad_wide if ctx.post_norm else grad_total
        if grad is None:
            if grad_residual is None:
                return (None,) * 13
            grad = torch.zeros_like(total)
        x_dtype, y_dtype = ctx.dtypes
        needs_x, needs_y, *needs = ctx.needs_input_grad[1:9]
        shifted = ctx.vectors[2] is not None or ctx.vectors[5] is not None
        branched = needs[0] or y_bias is not None
        dx, dy, sums = _backward_op.in_function(grad)(
            grad, grad_residual, total, mean, rstd, y, weight, gate, scale, x_dtype, y_dtype, ctx.post_norm, shifted,
            branched, ctx.groups, ctx.rms,
        )  # fmt: skip
        given = weight is not None or scale is not None, shifted, branched, y is not None
        parts = iter(sums)
        of_norm, of_shift, of_sum, of_gate = (next(parts) if has else None for has in given)  # (groups, C)
        factor = None if scale is None else 1 + scale.to(sums.dtype)
        makers = (  # of y_bias, weight, bias, gate, scale and shift
            lambda: _times(of_sum, gate),
            lambda: _times(of_norm, factor),
            lambda: _times(of_shift, factor),
            lambda: of_gate if y_bias is None else of_gate + _times(of_sum, y_bias),
            lambda: _times(of_norm, weight) if bias is None else _times(of_norm, weight) + _times(of_shift, bias),
            lambda: of_shift,
        )
        vectors = (
            _of_vector(make(), *vector) if need else None
            for make, vector, need in zip(makers, ctx.vectors, needs, strict=True)
        )
        dy = dx if gate is None and y_dtype == x_dtype else dy
        return None, dx if needs_x else None, dy if needs_y else None, *vectors, None, None, None, None


def _times(sums: Any, factor: Tensor | None) -> Any:
    return sums if factor is None else sums * factor.to(sums.dtype)


def _of_vector(of_groups: Any, axes: int, dtype: torch.dtype) -> Tensor:
    """Gradient, in `dtype`, of a vector argument of `axes` axes, from the gradients of all groups of rows.

    of_groups: (groups, C). The result has its shape if axes is 2, and is its sum over the groups, (C,), if axes is 1.
    """
    if axes == 1:
        of_groups = of_groups[0] if of_groups.shape[0] == 1 else of_groups.sum(0)
    return of_groups.to(dtype)


_backward_op = registration.define(
    "add_layer_norm_backward(Tensor grad_normalised, Tensor? grad_residual, Tensor total, Tensor mean, Tensor rstd, "
    "Tensor? y, Tensor? weight, Tensor? gate, Tensor? scale, ScalarType x_dtype, ScalarType y_dtype, bool post_norm, "
    "bool shifted, bool branched, SymInt groups, bool rms) -> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
    registration.no_second_derivative("add_layer_norm", "torch.nn.functional.layer_norm of the sum"),
)
_op = registration.define(
    "add_layer_norm(Tensor x, Tensor? y, Tensor? y_bias, Tensor? weight, Tensor? bias, Tensor? gate, Tensor? scale, "
    "Tensor? shift, float eps, ScalarType out_dtype, bool post_norm, bool rms) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
    _AddLayerNorm,
)
