# pyright: reportArgumentType=false, reportGeneralTypeIssues=false
"""Triton kernels of ``masked_pixel_loss`` and their launchers.

Forward: a program owns a few patches, reads their predictions and pixels once, and writes the slope (the derivative by
the prediction, a sign byte for L1) and one loss for each patch, or for the mean only their sum. One program adds the
sums in a fixed order. Backward: slope times the incoming gradient, so neither pixels nor predictions are read again.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from mvlm_kernels import dispatch
from mvlm_kernels.arguments import compute_dtype
from mvlm_kernels.language import SIZES, accumulator, cast, load_patches, pixel_source, row_grid, widen
from mvlm_kernels.pixel_loss.reference import slope_dtype

EPS = tl.constexpr(1e-6)
loss_dtype = cache(compute_dtype)


@triton.jit
def loss_and_slope(difference, KIND: tl.constexpr):
    """Loss of each pixel and its derivative; for L1 an integer, -128 where the difference is NaN."""
    if KIND == "l1":
        loss = tl.abs(difference)
        no_more, no_less = difference <= 0, difference >= 0  # both at 0, neither for NaN
        slope = tl.where(no_more, tl.where(no_less, 0, -1), tl.where(no_less, 1, -128))
    else:
        loss = difference * difference
        slope = 2 * difference
    return loss, slope


@triton.jit
def decode_slope(slope, ACC: tl.constexpr):
    values = widen(slope, ACC)
    if slope.dtype == tl.int8:
        values = tl.where(slope == -128, float("nan"), values)
    return values


@triton.jit
def normalized_by_moments(tiles, F: tl.constexpr, BLOCK_F: tl.constexpr):
    """Rows (tuple of tiles (BLOCK_R, BLOCK_F)) as (x - mean) / sqrt(var + eps), with the unbiased variance.

    In two passes over registers, because E[x^2] - E[x]^2 would cancel.
    """
    total = tl.zeros_like(tiles[0])
    for i in tl.static_range(0, F, BLOCK_F):  # pyright: ignore[reportGeneralTypeIssues]
        f = i + tl.arange(0, BLOCK_F)[None, :]
        total += tl.where(f < F, tiles[i // BLOCK_F], 0.0)
    center = (tl.sum(total, axis=1) * (1.0 / F))[:, None]
    squares = tl.zeros_like(total)
    for i in tl.static_range(0, F, BLOCK_F):  # pyright: ignore[reportGeneralTypeIssues]
        f = i + tl.arange(0, BLOCK_F)[None, :]
        deviation = tl.where(f < F, tiles[i // BLOCK_F] - center, 0.0)
        squares += deviation * deviation
    inverse = (1.0 / tl.sqrt(tl.sum(squares, axis=1) * (1.0 / (F - 1)) + EPS))[:, None]
    out = ()
    for i in tl.static_range(0, F, BLOCK_F):  # pyright: ignore[reportGeneralTypeIssues]
        out += ((tiles[i // BLOCK_F] - center) * inverse,)
    return out


@triton.jit(do_not_specialize=SIZES)
def loss_kernel(
    pred_ptr, loss_ptr, slope_ptr, stride_pr, stride_pf,
    images, norm, ids_ptr, stride_kb, stride_kk, rows, K, num_patches, grid_w,
    C: tl.constexpr, P: tl.constexpr, KIND: tl.constexpr, NORMALIZE_TARGET: tl.constexpr, REDUCE: tl.constexpr,
    ACC: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """Losses and slopes of BLOCK_R patches.

    loss: with REDUCE one sum for each program, else (B*K,). slope: contiguous
    (B*K, C*P*P), or None. The arguments from images on are those of ``pixel_source``.
    """
    F: tl.constexpr = C * P * P
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    ids, sizes = (ids_ptr, stride_kb, stride_kk), (rows, K, num_patches, grid_w)
    targets = load_patches(row, images, norm, ids, sizes, C, P, ACC, BLOCK_F)
    preds = ()
    pred_rows = pred_ptr + (row.to(tl.int64) * stride_pr)[:, None]
    for i in tl.static_range(0, F, BLOCK_F):  # pyright: ignore[reportGeneralTypeIssues]
        f = (i + tl.arange(0, BLOCK_F))[None, :]
        inside = (row < rows)[:, None] & (f < F)
        preds += (tl.load(pred_rows + f.to(tl.int64) * stride_pf, mask=inside, other=0.0),)
    if NORMALIZE_TARGET:
        targets = normalized_by_moments(targets, F, BLOCK_F)
    losses = tl.zeros((BLOCK_R, BLOCK_F), ACC)
    for i in tl.static_range(0, F, BLOCK_F):  # pyright: ignore[reportGeneralTypeIssues]
        f = (i + tl.arange(0, BLOCK_F))[None, :]
        inside = (row < rows)[:, None] & (f < F)
        # A bad id has no readable pixel: its target is NaN, and so are its loss and its gradient. Compiled, the last
        # product of the target is fused into the difference and not rounded: equal values may differ by half an ulp.
        pred = widen(preds[i // BLOCK_F], ACC)
        loss, slope = loss_and_slope(pred - targets[i // BLOCK_F], KIND)
        losses += tl.where(inside, loss, 0.0)
        if slope_ptr is not None:
            slope = cast(slope, slope_ptr.dtype.element_ty)
            tl.store(slope_ptr + (row.to(tl.int64) * F)[:, None] + f, slope, mask=inside)
    loss_of_row = tl.sum(losses, axis=1) / F
    if REDUCE:
        tl.store(loss_ptr + tl.program_id(0), tl.sum(loss_of_row, axis=0))
    else:
        tl.store(loss_ptr + row, loss_of_row, mask=row < rows)


@triton.jit(do_not_specialize=["n", "divisor"])
def sum_kernel(x_ptr, out_ptr, n, divisor, ACC: tl.constexpr, BLOCK: tl.constexpr):
    """out = sum(x[:n]) / divisor. One program adds per lane and then across lanes, in the same order in every run."""
    total = tl.zeros((BLOCK,), ACC)
    for start in range(0, n, BLOCK):
        i = start + tl.arange(0, BLOCK)
        total += tl.load(x_ptr + i, mask=i < n, other=0.0)
    tl.store(out_ptr, tl.sum(total, axis=0) / divisor)


@triton.jit(do_not_specialize=["rows", "divisor"])
def scale_slope_kernel(
    slope_ptr, grad_ptr, out_ptr, rows, divisor, stride_g,
    F: tl.constexpr, ACC: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """out = slope * grad / divisor, both (rows, F) and contiguous. grad (rows,)."""
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    at = (row.to(tl.int64) * F)[:, None]
    slopes = ()
    for i in tl.static_range(0, F, BLOCK_F):  # pyright: ignore[reportGeneralTypeIssues]
        f = (i + tl.arange(0, BLOCK_F))[None, :]
        slopes += (tl.load(slope_ptr + at + f, mask=(row < rows)[:, None] & (f < F), other=0),)
    factor = widen(tl.load(grad_ptr + row.to(tl.int64) * stride_g, mask=row < rows, other=0.0), ACC)
    factor = (factor / divisor)[:, None]
    for i in tl.static_range(0, F, BLOCK_F):  # pyright: ignore[reportGeneralTypeIssues]
        f = (i + tl.arange(0, BLOCK_F))[None, :]
        value = cast(decode_slope(slopes[i // BLOCK_F], ACC) * factor, out_ptr.dtype.element_ty)
        tl.store(out_ptr + at + f, value, mask=(row < rows)[:, None] & (f < F))


def total(losses: Tensor, divisor: int) -> Tensor:
    """sum(losses) / divisor as a scalar tensor; 0 for no losses."""
    out = losses.new_empty(())
    dispatch.launch(
        sum_kernel, (1,), losses, out, losses.numel(), max(divisor, 1),
        ACC=accumulator(losses.dtype), BLOCK=8192, num_warps=16, enable_fp_fusion=True,
    )  # fmt: skip
    return out


def masked_pixel_loss(
    pred: Tensor,
    images: Tensor,
    patch_ids: Tensor | None,
    patch_size: int,
    mean: Tensor | None,
    std: Tensor | None,
    kind: str,
    normalize_target: bool,
    reduce: bool,
    with_slope: bool,
) -> tuple[Tensor, Tensor]:
    """pred (B, K, F), images (B, C, H, W), both of any strides -> loss (scalar or (B, K)), slope (B, K, F) or empty."""
    rows = pred.flatten(0, 1)
    grid, tile = row_grid(*rows.shape)
    # In its final shape: autograd forbids to write to a view that a Function made.
    shape = grid if reduce else pred.shape[:2]
    losses = pred.new_empty(shape, dtype=loss_dtype(pred.dtype, images.dtype))
    slope = pred.new_empty(pred.shape if with_slope else (0, 0, 0), dtype=slope_dtype(kind, pred.dtype))
    dispatch.launch(
        loss_kernel, grid, rows, losses, slope if with_slope else None, *rows.stride(),
        *pixel_source(images, patch_ids, patch_size, mean, std),
        C=images.shape[1], P=patch_size, KIND=kind, NORMALIZE_TARGET=normalize_target, REDUCE=reduce,
        ACC=accumulator(losses.dtype), **tile, enable_fp_fusion=True,
    )  # fmt: skip
    return (total(losses, len(rows)) if reduce else losses), slope


def masked_pixel_loss_backward(grad: Tensor, slope: Tensor, dtype: torch.dtype) -> Tensor:
    """grad (scalar or (B, K) of any strides), slope (B, K, F) -> gradient of pred (B, K, F) in ``dtype``."""
    batch, chosen, features = slope.shape
    grid, tile = row_grid(batch * chosen, features)
    out, divisor, stride = slope.new_empty(slope.shape, dtype=dtype), features * max(1, batch * chosen), 0
    if grad.ndim:
        grad, divisor = grad.flatten(), features
        stride = grad.stride(0)
    dispatch.launch(
        scale_slope_kernel, grid, slope, grad, out, batch * chosen, divisor, stride,
        F=features, ACC=accumulator(dtype, grad.dtype), **tile, enable_fp_fusion=True,
    )  # fmt: skip
    return out
