# pyright: reportArgumentType=false
"""Triton kernels of ``masked_pixel_loss`` and their launchers. Those of ``linear_pixel_loss`` are in ``linear.py``.

Forward: one program owns one patch, reads its prediction and its pixels once, and writes one loss and the slope (the
derivative by the prediction, a sign byte for L1). One program adds the losses in a fixed order for the mean. Backward:
slope times the incoming gradient, so neither pixels nor predictions are read again.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mvlm_kernels import dispatch
from mvlm_kernels.dispatch import ceil_div, power_of_two
from mvlm_kernels.gather_patches.triton import (
    accumulator,
    image_offsets,
    normalized_pixels,
    readable_pixels,
    tile_of,
)
from mvlm_kernels.language import cast, widen

EPS = tl.constexpr(1e-6)


@triton.jit
def loss_and_slope(difference, KIND: tl.constexpr):
    """Loss of each pixel and its derivative. A NaN difference gives NaN in both."""
    # Neither comparison holds for NaN, so the sign of NaN is the difference itself: NaN.
    size = tl.abs(difference)
    sign = tl.where(difference > 0, 1.0, tl.where(difference < 0, -1.0, difference))
    if KIND == "l1":
        loss = size
        slope = sign
    elif KIND == "mse":
        loss = difference * difference
        slope = 2 * difference
    else:
        loss = tl.where(size < 1, 0.5 * difference * difference, size - 0.5)
        slope = tl.where(size < 1, difference, sign)
    return loss, slope


@triton.jit
def encode_slope(slope, DTYPE: tl.constexpr):
    """Slope in its saved form: int8 for L1, in which -128 stands for NaN, else rounded to DTYPE."""
    return tl.where(slope != slope, -128.0, slope).to(tl.int8) if tl.int8 == DTYPE else cast(slope, DTYPE)


@triton.jit
def decode_slope(slope, ACC: tl.constexpr):
    values = widen(slope, ACC)
    if slope.dtype == tl.int8:
        values = tl.where(slope == -128, float("nan"), values)
    return values


@triton.jit
def patch_moments(x, inside, F: tl.constexpr):
    """(mean, 1 / sqrt(var + eps)) of one patch, in two passes over registers: E[x^2] - E[x]^2 would cancel."""
    center = tl.sum(tl.sum(tl.where(inside, x, 0.0), axis=1), axis=0) * (1.0 / F)
    deviation = tl.where(inside, x - center, 0.0)
    var = tl.sum(tl.sum(deviation * deviation, axis=1), axis=0) * (1.0 / (F - 1))
    return center, 1.0 / tl.sqrt(var + EPS)


@triton.jit
def loss_kernel(
    pred_ptr, images_ptr, ids_ptr, mean_ptr, std_ptr, loss_ptr, slope_ptr,
    K, num_patches, grid_w,
    stride_pb, stride_pk, stride_pf, stride_ib, stride_ic, stride_iy, stride_ix, stride_kb, stride_kk,
    C: tl.constexpr, P: tl.constexpr, KIND: tl.constexpr, NORMALIZE_TARGET: tl.constexpr, HAS_SLOPE: tl.constexpr,
    HAS_IDS: tl.constexpr, IS_UINT8: tl.constexpr, HAS_MEAN: tl.constexpr, HAS_STD: tl.constexpr,
    ACC: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Loss (B, K) and slope (B, K, C*P*P) of one patch, both contiguous. Program (b*K + k)."""
    row = tl.program_id(0).to(tl.int64)
    b = row // K
    k = row % K
    c = tl.arange(0, BLOCK_C)[:, None]
    p = tl.arange(0, BLOCK_P)[None, :]
    inside = (c < C) & (p < P * P)
    f = c * (P * P) + p
    patch = tl.load(ids_ptr + b * stride_kb + k * stride_kk).to(tl.int64) if HAS_IDS else k
    readable = (c < C) & (p < readable_pixels(patch, num_patches, P))
    pred_offsets = b * stride_pb + k * stride_pk + f.to(tl.int64) * stride_pf
    pred = widen(tl.load(pred_ptr + pred_offsets, mask=inside, other=0.0), ACC)
    offsets = b * stride_ib + image_offsets(patch, c, p, grid_w, stride_ic, stride_iy, stride_ix, P)
    target = normalized_pixels(images_ptr, offsets, c, readable, mean_ptr, std_ptr, C, IS_UINT8, HAS_MEAN, HAS_STD, ACC)
    if NORMALIZE_TARGET:
        center, inverse_deviation = patch_moments(target, inside, C * P * P)
        target = (target - center) * inverse_deviation
    # A bad id has no readable pixel: its loss and its gradient are NaN.
    loss, slope = loss_and_slope(tl.where(readable, pred - target, float("nan")), KIND)
    total = tl.sum(tl.sum(tl.where(inside, loss, 0.0), axis=1), axis=0)
    tl.store(loss_ptr + row, total / (C * P * P))
    if HAS_SLOPE:
        tl.store(slope_ptr + row * (C * P * P) + f, encode_slope(slope, slope_ptr.dtype.element_ty), mask=inside)


@triton.jit
def sum_kernel(x_ptr, out_ptr, n, divisor, ACC: tl.constexpr, BLOCK: tl.constexpr):
    """out = sum(x[:n]) / divisor. One program adds per lane and then across lanes, in the same order in every run."""
    total = tl.zeros((BLOCK,), ACC)
    for start in range(0, n, BLOCK):
        i = start + tl.arange(0, BLOCK)
        total += tl.load(x_ptr + i, mask=i < n, other=0.0)
    tl.store(out_ptr, tl.sum(total, axis=0) / divisor)


@triton.jit
def scale_slope_kernel(
    slope_ptr, grad_ptr, out_ptr, K, rows_of_mean, stride_gb, stride_gk,
    F: tl.constexpr, ACC: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """out = slope (B, K, F) * grad[b, k] / (F * rows_of_mean), both contiguous. Program (b*K + k, part of F)."""
    row = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    grad = widen(tl.load(grad_ptr + (row // K) * stride_gb + (row % K) * stride_gk), ACC)
    slope = decode_slope(tl.load(slope_ptr + row * F + f, mask=f < F, other=0), ACC)
    out = slope * (grad / rows_of_mean / F)
    tl.store(out_ptr + row * F + f, cast(out, out_ptr.dtype.element_ty), mask=f < F)


def new_slope(rows: tuple[int, int, int], kind: str, like: Tensor) -> Tensor:
    return like.new_empty(*rows, dtype=torch.int8 if kind == "l1" else like.dtype)


def grad_strides(grad: Tensor) -> tuple[int, int]:
    """Strides of the incoming gradient in b and k; 0 for a scalar, the gradient of a mean."""
    return (grad.stride(0), grad.stride(1)) if grad.ndim else (0, 0)


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
    batch, chosen, features = pred.shape
    channels, grid_w = images.shape[1], images.shape[3] // patch_size
    wide = torch.float64 if torch.float64 in (pred.dtype, images.dtype) else torch.float32
    losses = pred.new_empty(batch, chosen, dtype=wide)
    slope = new_slope((batch, chosen, features) if with_slope else (0, 0, 0), kind, pred)
    block_c, block_p, warps = tile_of(channels, patch_size)
    dispatch.launch(
        loss_kernel, (batch * chosen,),
        pred, images, patch_ids, mean, std, losses, slope,
        chosen, images.shape[2] // patch_size * grid_w, grid_w,
        *pred.stride(), *images.stride(), *(patch_ids.stride() if patch_ids is not None else (0, 0)),
        C=channels, P=patch_size, KIND=kind, NORMALIZE_TARGET=normalize_target, HAS_SLOPE=with_slope,
        HAS_IDS=patch_ids is not None, IS_UINT8=images.dtype == torch.uint8, HAS_MEAN=mean is not None,
        HAS_STD=std is not None, ACC=accumulator(wide), BLOCK_C=block_c, BLOCK_P=block_p,
        num_warps=warps, enable_fp_fusion=True,
    )  # fmt: skip
    return (total(losses, batch * chosen) if reduce else losses), slope


def masked_pixel_loss_backward(grad: Tensor, slope: Tensor, dtype: torch.dtype) -> Tensor:
    """grad (scalar or (B, K) of any strides), slope (B, K, F) -> gradient of pred (B, K, F) in ``dtype``."""
    batch, chosen, features = slope.shape
    out = slope.new_empty(slope.shape, dtype=dtype)
    block = min(1024, power_of_two(features))
    dispatch.launch(
        scale_slope_kernel, (batch * chosen, ceil_div(features, block)),
        slope, grad, out, chosen, 1 if grad.ndim else batch * chosen, *grad_strides(grad),
        F=features, ACC=accumulator(grad.dtype, dtype), BLOCK_F=block,
        num_warps=max(1, block // 256), enable_fp_fusion=True,
    )  # fmt: skip
    return out


def aot_cases() -> Iterable[tuple[str, Callable[[], Any]]]:
    """(label, call) of each case for :mod:`mvlm_kernels.aot`, on meta tensors at the paper's shapes."""
    ids = torch.empty(64, 116, dtype=torch.int32, device="meta")
    values = torch.empty(3, device="meta")

    def both(images: Tensor, dtype: torch.dtype, patch_size: int, kind: str, normalize_target: bool) -> None:
        pred = torch.empty(64, 116, 3 * patch_size**2, dtype=dtype, device="meta")
        loss, slope = masked_pixel_loss(
            pred, images, ids, patch_size, values, values, kind, normalize_target, True, True
        )
        masked_pixel_loss_backward(loss, slope, dtype)

    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)):
        for kind in ("l1", "mse", "smooth_l1"):
            images = torch.empty(64, 3, 224, 224, dtype=torch.uint8 if kind == "l1" else dtype, device="meta")
            yield f"{name}/{kind}/p16", partial(both, images, dtype, 16, kind, False)
    for patch_size in (14, 32):
        images = torch.empty(64, 3, 224, 224, dtype=torch.uint8, device="meta")
        yield f"bf16/mse/p{patch_size}/normalized", partial(both, images, torch.bfloat16, patch_size, "mse", True)
