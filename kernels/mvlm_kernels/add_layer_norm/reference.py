"""Specification of ``add_layer_norm`` in plain torch, and its implementation without the kernels.

Legend: R rows, C width.
"""

import torch
from torch import Tensor

from mvlm_kernels.arguments import compute_dtype


def sum_dtype(x: Tensor, y: Tensor | None) -> torch.dtype:
    """Dtype of the sum: what torch promotes the two to, float32 for a float32 stream and a bfloat16 addend."""
    return x.dtype if y is None else torch.promote_types(x.dtype, y.dtype)


def add_layer_norm(
    x: Tensor,
    y: Tensor | None,
    y_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    out_dtype: torch.dtype,
    post_norm: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """total = x + y + y_bias, and its LayerNorm. x and y (.., C); y_bias, weight and bias (C,).

    Returns total, empty (0,) without y; the LayerNorm in total's dtype, empty unless post_norm and out_dtype is
    another; the LayerNorm in out_dtype; mean and 1 / standard deviation of each row, (R,).
    """
    dtype = sum_dtype(x, y)
    wide = compute_dtype(dtype)
    if y is None:
        total = x
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
    normalised, mean, rstd = torch.native_layer_norm(
        total.to(wide), total.shape[-1:], weight.to(wide), bias.to(wide), eps
    )
    return (
        x.new_empty(0, dtype=dtype) if y is None else total,
        normalised.to(dtype) if post_norm and out_dtype != dtype else x.new_empty(0, dtype=dtype),
        normalised.to(out_dtype),
        mean.flatten(),
        rstd.flatten(),
    )


def add_layer_norm_backward(
    grad_normalised: Tensor,
    grad_residual: Tensor | None,
    total: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    x_dtype: torch.dtype,
    y_dtype: torch.dtype,
    post_norm: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x and of y, (.., C), and of weight, bias and, with needs_bias, y_bias: (2 or 3, C).

    grad_residual is the gradient of the sum, or with post_norm that of the LayerNorm in the sum's dtype. The gradient
    of y is empty (0,) if y_dtype is x_dtype: then it is that of x.
    """
    wide = compute_dtype(total.dtype)
    grad = grad_normalised.to(wide)
    if grad_residual is not None and post_norm:
        grad = grad + grad_residual if grad is grad_normalised else grad.add_(grad_residual)
    moments = [m.to(wide).view(*total.shape[:-1], 1) for m in (mean, rstd)]
    dx, dw, db = torch.ops.aten.native_layer_norm_backward(
        grad.contiguous(), total.to(wide), total.shape[-1:], *moments, weight.to(wide), weight.to(wide), [True] * 3
    )
    if grad_residual is not None and not post_norm:
        dx += grad_residual
    sums = [dw, db, dx.reshape(-1, dx.shape[-1]).sum(0)] if needs_bias else [dw, db]
    dy = dx.to(y_dtype) if y_dtype != x_dtype else dx.new_empty(0, dtype=y_dtype)
    return dx.to(x_dtype), dy, torch.stack(sums)
