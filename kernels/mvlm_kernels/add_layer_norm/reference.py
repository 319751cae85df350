"""Specification of ``add_layer_norm`` in plain torch, and its implementation without the kernels.

Legend: B samples, R rows, C width. A group is the rows of a sample if a vector differs between samples, else all rows.
"""

import torch
from torch import Tensor

from mvlm_kernels.arguments import compute_dtype


def sum_dtype(x: Tensor, y: Tensor | None) -> torch.dtype:
    """Dtype of the sum: what torch promotes the two to, float32 for a float32 stream and a bfloat16 addend."""
    return x.dtype if y is None else torch.promote_types(x.dtype, y.dtype)


def groups_of(*vectors: Tensor | None) -> int:
    """Number of groups of rows: of samples B if one of the vectors is (B, C), else 1."""
    return next((v.shape[0] for v in vectors if v is not None and v.ndim == 2), 1)


def sums_of(y: Tensor | None, weight: Tensor | None, scale: Tensor | None, shifted: bool, branched: bool) -> int:
    """Number of sums over rows that the backward pass takes."""
    return (weight is not None or scale is not None) + shifted + branched + (y is not None)


def beside(vector: Tensor, axes: int, dtype: torch.dtype) -> Tensor:
    """A vector (C,) or (B, C) in a dtype, and in the shape that broadcasts with rows (B, .., C) of so many axes."""
    wide = vector.to(dtype)
    return wide if vector.ndim == 1 else wide.reshape(vector.shape[0], *[1] * (axes - 2), vector.shape[1])


def add_layer_norm(
    x: Tensor, y: Tensor | None, y_bias: Tensor | None, weight: Tensor | None, bias: Tensor | None, gate: Tensor | None,
    scale: Tensor | None, shift: Tensor | None, eps: float, out_dtype: torch.dtype, post_norm: bool, rms: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """total = x + gate (y + y_bias), and (1 + scale) norm(total) + shift, whose norm is LayerNorm, or RMSNorm if rms.

    x and y (B, .., C); y_bias, weight and bias (C,); gate, scale and shift (B, C) or (C,).

    Returns total, empty (0,) without y; the norm in total's dtype, empty unless post_norm and out_dtype is another; the
    norm in out_dtype; mean, empty if rms, and 1 / standard deviation, or 1 / root mean square, of each row, (R,).
    """
    dtype = sum_dtype(x, y)
    wide = compute_dtype(dtype)
    if y is None:
        total = x
    elif gate is not None:
        branch = y.to(wide) if y_bias is None else y.to(wide) + y_bias.to(wide)
        total = (x.to(wide) + beside(gate, x.ndim, wide) * branch).to(dtype)
    elif dtype == wide:
        # A sum of two dtypes copies one of them first, so the sum is written into this copy.
        narrow, other = (x, y) if y.dtype == dtype else (y, x)
        total = narrow + other if narrow.dtype == dtype else narrow.to(dtype).add_(other)
        if y_bias is not None:
            total += y_bias
    else:
        total = x.to(wide) + y.to(wide)
        total = (total if y_bias is None else total + y_bias.to(wide)).to(dtype)
    total = total.contiguous()  # as the kernel's
    values, (weight, bias) = total.to(wide), (None if v is None else v.to(wide) for v in (weight, bias))
    if rms:
        rstd = (values.square().mean(-1, keepdim=True) + eps).rsqrt()
        normalised, mean = values * rstd, x.new_empty(0, dtype=wide)
        normalised = normalised if weight is None else normalised * weight
        normalised = normalised if bias is None else normalised + bias
    else:
        normalised, mean, rstd = torch.native_layer_norm(values, values.shape[-1:], weight, bias, eps)
    if scale is not None:
        normalised = normalised * (1 + beside(scale, x.ndim, wide))
    if shift is not None:
        normalised = normalised + beside(shift, x.ndim, wide)
    return (
        x.new_empty(0, dtype=dtype) if y is None else total,
        normalised.to(dtype) if post_norm and out_dtype != dtype else x.new_empty(0, dtype=dtype),
        normalised.to(out_dtype),
        mean.flatten(),
        rstd.flatten(),
    )


def add_layer_norm_backward(
    grad_normalised: Tensor, grad_residual: Tensor | None, total: Tensor, mean: Tensor, rstd: Tensor, y: Tensor | None,
    weight: Tensor | None, gate: Tensor | None, scale: Tensor | None, x_dtype: torch.dtype, y_dtype: torch.dtype,
    post_norm: bool, shifted: bool, branched: bool, groups: int, rms: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x and of y, (B, .., C), and sums over the rows of each group, (number of sums, groups, C).

    grad_residual is the gradient of the sum, or with post_norm that of the norm in the sum's dtype. The gradient of y
    is empty (0,) if it is that of x: if y_dtype is x_dtype, and gate None. The sums are, in this order, those of

    - grad * norm before weight and scale, if there is a weight or a scale;
    - grad, if shifted: if there is a bias or a shift;
    - the gradient of the sum, if branched;
    - the gradient of the sum times y, if y is given.
    """
    wide = compute_dtype(total.dtype)
    grad = grad_normalised.to(wide)
    if grad_residual is not None and post_norm:
        grad = grad + grad_residual if grad is grad_normalised else grad.add_(grad_residual)
    values, weight = total.to(wide), None if weight is None else weight.to(wide)
    one_each = *total.shape[:-1], 1
    mean, rstd = rstd.new_zeros(()) if rms else mean.to(wide).view(one_each), rstd.to(wide).view(one_each)

    def summed(x: Tensor) -> Tensor:
        return x.reshape(groups, total.shape[:-1].numel() // max(groups, 1), total.shape[-1]).sum(1)

    if weight is not None and shifted and scale is None and groups == 1 and not rms:
        dx, *of_norm = torch.ops.aten.native_layer_norm_backward(
            grad.contiguous(), values, total.shape[-1:], mean, rstd, weight, weight, [True] * 3
        )
        sums = [x[None] for x in of_norm]
    else:
        norm = (values - mean) * rstd
        factors = grad if weight is None else grad * weight
        factors = factors if scale is None else factors * (1 + beside(scale, total.ndim, wide))
        dx = factors - norm * (factors * norm).mean(-1, keepdim=True)
        dx = (dx if rms else dx - factors.mean(-1, keepdim=True)) * rstd
        sums = [] if weight is None and scale is None else [summed(grad * norm)]
        sums += [summed(grad)] if shifted else []
    if grad_residual is not None and not post_norm:
        dx += grad_residual
    dy = dx if gate is None else dx * beside(gate, total.ndim, wide)
    sums += [summed(dx)] if branched else []
    sums += [] if y is None else [summed(dx * y)]
    return (
        dx.to(x_dtype),
        dx.new_empty(0, dtype=y_dtype) if gate is None and y_dtype == x_dtype else dy.to(y_dtype),
        torch.stack(sums) if sums else dx.new_empty(0, groups, total.shape[-1]),
    )
