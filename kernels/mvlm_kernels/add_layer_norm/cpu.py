"""``add_layer_norm`` and its gradient on CPU tensors, a few rows at a time, for speed.

The mathematics is that of ``reference.py``, and tests compare the two. Between two torch ops the rows stay in the
cache, and no temporary has the size of a tensor: on a CPU fresh memory costs more than the arithmetic.
"""

from typing import Any

import torch
from torch import Tensor

from mvlm_kernels.add_layer_norm import reference
from mvlm_kernels.add_layer_norm.reference import compute_dtype, sum_dtype

VALUES = 1 << 18
"""Values of the rows that are processed at a time: 1 MiB in float32."""


def _split(width: int, *tensors: Tensor | None) -> list[tuple[Any, ...]]:
    """Views of a few rows of all tensors, (.., C) or (R,). An absent tensor stays absent."""
    rows = max(1, VALUES // width)
    pieces = [None if t is None else t.view(-1, width).split(rows) for t in tensors]
    count = max(len(p) for p in pieces if p is not None)
    return [tuple(None if p is None else p[i] for p in pieces) for i in range(count)]


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
    """Same contract as :func:`.reference.add_layer_norm`."""
    dtype, width = sum_dtype(x, y), x.shape[-1]
    if dtype != compute_dtype(dtype) or x.numel() <= VALUES:
        return reference.add_layer_norm(x, y, y_bias, weight, bias, eps, out_dtype, post_norm)
    x, y = x.contiguous(), None if y is None else y.contiguous()
    weight, bias = weight.to(dtype), bias.to(dtype)
    total = x if y is None else torch.empty(x.shape, dtype=dtype)
    both = post_norm and out_dtype != dtype
    wide = torch.empty(x.shape if both else (0,), dtype=dtype)
    normalised = torch.empty(x.shape, dtype=out_dtype)
    moments = []
    for x_, y_, total_, wide_, normalised_ in _split(width, x, y, total, wide if both else None, normalised):
        if y_ is not None:
            torch.add(x_, y_, out=total_)
            if y_bias is not None:
                total_ += y_bias
        n, *moments_ = torch.native_layer_norm(total_, (width,), weight, bias, eps)
        moments.append(moments_)
        normalised_.copy_(n)
        if wide_ is not None:
            wide_.copy_(n)
    mean, rstd = (torch.cat(parts).flatten() for parts in zip(*moments, strict=True))
    return x.new_empty(0, dtype=dtype) if y is None else total, wide, normalised, mean, rstd


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
    """Same contract as :func:`.reference.add_layer_norm_backward`."""
    dtype, width = total.dtype, total.shape[-1]
    if dtype != compute_dtype(dtype) or x_dtype != dtype or total.numel() <= VALUES:
        return reference.add_layer_norm_backward(
            grad_normalised, grad_residual, total, mean, rstd, weight, x_dtype, y_dtype, post_norm, needs_bias
        )
    weight, rows = weight.to(dtype), total.numel() // width
    dx = torch.empty(total.shape, dtype=dtype)
    dy = torch.empty(total.shape if y_dtype != x_dtype else (0,), dtype=y_dtype)
    sums = torch.zeros(3 if needs_bias else 2, width, dtype=dtype)
    residual = None if grad_residual is None else grad_residual.contiguous()
    tensors = grad_normalised.contiguous(), residual, total.contiguous(), dx, dy if dy.numel() else None
    moments = [m.view(rows, 1).split(max(1, VALUES // width)) for m in (mean, rstd)]
    for pieces, mean_, rstd_ in zip(_split(width, *tensors), *moments, strict=True):
        grad, residual_, total_, dx_, dy_ = pieces
        if residual_ is not None and post_norm:
            grad = residual_ + grad
        ds, dw, db = torch.ops.aten.native_layer_norm_backward(
            grad.to(dtype), total_, (width,), mean_, rstd_, weight, weight, [True] * 3
        )
        if residual_ is not None and not post_norm:
            torch.add(ds, residual_, out=dx_)
        else:
            dx_.copy_(ds)
        if dy_ is not None:
            dy_.copy_(dx_)
        sums[0] += dw
        sums[1] += db
        if needs_bias:
            sums[2] += dx_.sum(0)
    return dx, dy, sums
