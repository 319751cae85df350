# pyright: reportArgumentType=false
"""Forward of ``linear_pixel_loss``: Triton kernels and their launcher.

A program computes one tile (rows, pixels) of the predictions, hidden @ weight.T + bias, and subtracts the pixels of the
images. It stores one partial loss per row and one slope per pixel (a byte for L1). Predictions never reach memory.

Rows are the B*K masked patches, F = C*P*P the pixels of a patch, D the width of hidden. Weight and bias are cast to
hidden's dtype as they are loaded, so float32 parameters with bfloat16 activations need no cast kernel. Gradients are in
:mod:`.linear_backward`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mvlm_kernels import dispatch
from mvlm_kernels.dispatch import ceil_div
from mvlm_kernels.gather_patches.triton import (
    accumulator,
    image_offsets,
    normalized_pixels,
    readable_pixels,
    tile_of,
)
from mvlm_kernels.language import cast, dot, widen
from mvlm_kernels.pixel_loss.shared import sum_partials, tiles
from mvlm_kernels.pixel_loss.triton import encode_slope, loss_and_slope, new_slope, patch_moments, total


@triton.jit
def moments_kernel(
    images_ptr, ids_ptr, mean_ptr, std_ptr, moments_ptr,
    K, num_patches, grid_w, stride_ib, stride_ic, stride_iy, stride_ix, stride_kb, stride_kk,
    C: tl.constexpr, P: tl.constexpr,
    HAS_IDS: tl.constexpr, IS_UINT8: tl.constexpr, HAS_MEAN: tl.constexpr, HAS_STD: tl.constexpr,
    ACC: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Store (mean, 1 / sqrt(var + eps)) of each target patch in moments (B*K, 2).

    A program reads one patch; the grid is (B*K,). The loss kernel needs precomputed moments, because one of its tiles
    holds only part of a patch.
    """
    row = tl.program_id(0).to(tl.int64)
    b = row // K
    k = row % K
    c = tl.arange(0, BLOCK_C)[:, None]
    p = tl.arange(0, BLOCK_P)[None, :]
    patch = tl.load(ids_ptr + b * stride_kb + k * stride_kk).to(tl.int64) if HAS_IDS else k
    readable = (c < C) & (p < readable_pixels(patch, num_patches, P))
    offsets = b * stride_ib + image_offsets(patch, c, p, grid_w, stride_ic, stride_iy, stride_ix, P)
    x = normalized_pixels(images_ptr, offsets, c, readable, mean_ptr, std_ptr, C, IS_UINT8, HAS_MEAN, HAS_STD, ACC)
    center, inverse_deviation = patch_moments(x, (c < C) & (p < P * P), C * P * P)
    tl.store(moments_ptr + row * 2, center)
    tl.store(moments_ptr + row * 2 + 1, inverse_deviation)


@triton.jit
def linear_loss_kernel(
    hidden_ptr, weight_ptr, bias_ptr, images_ptr, ids_ptr, mean_ptr, std_ptr, moments_ptr, partial_ptr, slope_ptr,
    M, K, D, num_patches, grid_w,
    stride_hb, stride_hk, stride_hd, stride_wf, stride_wd, stride_bf,
    stride_ib, stride_ic, stride_iy, stride_ix, stride_kb, stride_kk,
    C: tl.constexpr, P: tl.constexpr, KIND: tl.constexpr, NORMALIZE_TARGET: tl.constexpr, HAS_SLOPE: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_IDS: tl.constexpr, IS_UINT8: tl.constexpr, HAS_MEAN: tl.constexpr,
    HAS_STD: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Store partial (pixel tiles, M), each row's loss summed over a tile and divided by F, and slope (M, F).

    A program computes one tile; the grid is (pixel tiles, row tiles). Pixel tiles vary fastest, so the hidden states
    and images of a row tile stay in the cache while its pixel tiles are computed.
    """
    F: tl.constexpr = C * P * P
    f = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    m = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    b = m // K
    k = m % K
    hidden_ptrs = hidden_ptr + (b * stride_hb + k * stride_hk)[:, None]
    weight_ptrs = weight_ptr + (f.to(tl.int64) * stride_wf)[:, None]
    pred = tl.zeros((BLOCK_M, BLOCK_F), ACC)
    for start in range(0, D, BLOCK_D):
        d = (start + tl.arange(0, BLOCK_D)).to(tl.int64)
        h = tl.load(hidden_ptrs + d[None, :] * stride_hd, mask=(m < M)[:, None] & (d < D)[None, :], other=0.0)
        w = tl.load(weight_ptrs + d[None, :] * stride_wd, mask=(f < F)[:, None] & (d < D)[None, :], other=0.0)
        pred = dot(h, tl.trans(cast(widen(w, ACC), h.dtype)), pred, PRECISION)
    if HAS_BIAS:
        pred += widen(tl.load(bias_ptr + f.to(tl.int64) * stride_bf, mask=f < F, other=0.0), ACC)[None, :]

    if HAS_IDS:
        patch = tl.load(ids_ptr + b * stride_kb + k * stride_kk, mask=m < M, other=-1).to(tl.int64)
    else:
        patch = tl.where(m < M, k, -1)
    c = (f // (P * P))[None, :]
    # Pixels of a patch outside the image are not read. Their difference is NaN, so a wrong id gives a NaN loss.
    inside = (m < M)[:, None] & (f < F)[None, :]
    readable = (f < F)[None, :] & (f[None, :] < readable_pixels(patch, num_patches, P)[:, None] * C)
    offsets = (b * stride_ib)[:, None] + image_offsets(
        patch[:, None], c, (f % (P * P))[None, :], grid_w, stride_ic, stride_iy, stride_ix, P
    )
    target = normalized_pixels(images_ptr, offsets, c, readable, mean_ptr, std_ptr, C, IS_UINT8, HAS_MEAN, HAS_STD, ACC)
    if NORMALIZE_TARGET:
        center = tl.load(moments_ptr + m * 2, mask=m < M, other=0.0)
        inverse_deviation = tl.load(moments_ptr + m * 2 + 1, mask=m < M, other=0.0)
        target = (target - center[:, None]) * inverse_deviation[:, None]
    loss, slope = loss_and_slope(tl.where(readable, pred - target, float("nan")), KIND)
    partial = tl.sum(tl.where(inside, loss, 0.0), axis=1) / F
    tl.store(partial_ptr + tl.program_id(0).to(tl.int64) * M + m, partial, mask=m < M)
    if HAS_SLOPE:
        slope_offsets = m[:, None] * F + f[None, :]
        tl.store(slope_ptr + slope_offsets, encode_slope(slope, slope_ptr.dtype.element_ty), mask=inside)


def linear_pixel_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
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
    """Loss and slope of hidden (B, K, D), weight (F, D), bias (F,) and images (B, C, H, W), of any strides.

    patch_ids is (B, K), or None for all patches; mean and std are (C,) or None. The loss is a scalar if reduce, else
    (B, K), in float32, or in float64 for float64 inputs. slope is (B, K, F), empty without with_slope.
    """
    batch, chosen, width = hidden.shape
    features, rows = weight.shape[0], batch * chosen
    _, channels, image_h, image_w = images.shape
    grid_w = image_w // patch_size
    num_patches = image_h // patch_size * grid_w
    dtype, pixel_dtype = hidden.dtype, images.dtype
    wide = torch.float64 if torch.float64 in (dtype, pixel_dtype) else torch.float32
    acc = accumulator(wide)
    id_strides = patch_ids.stride() if patch_ids is not None else (0, 0)
    pixels = {
        "C": channels, "P": patch_size, "HAS_IDS": patch_ids is not None, "IS_UINT8": pixel_dtype == torch.uint8,
        "HAS_MEAN": mean is not None, "HAS_STD": std is not None, "ACC": acc,
    }  # fmt: skip
    moments = None
    if normalize_target:
        moments = hidden.new_empty(rows, 2, dtype=wide)
        block_c, block_p, warps = tile_of(channels, patch_size)
        dispatch.launch(
            moments_kernel, (rows,), images, patch_ids, mean, std, moments,
            chosen, num_patches, grid_w, *images.stride(), *id_strides,
            **pixels, BLOCK_C=block_c, BLOCK_P=block_p, num_warps=warps, enable_fp_fusion=True,
        )  # fmt: skip
    tile = tiles("forward", dtype, dispatch.arch(hidden.device))
    num_tiles = ceil_div(features, tile["BLOCK_F"])
    partial = hidden.new_empty(num_tiles, rows, dtype=wide)
    slope = new_slope((batch, chosen, features) if with_slope else (0, 0, 0), kind, hidden)
    dispatch.launch(
        linear_loss_kernel, (num_tiles, ceil_div(rows, tile["BLOCK_M"])),
        hidden, weight, bias, images, patch_ids, mean, std, moments, partial, slope,
        rows, chosen, width, num_patches, grid_w,
        *hidden.stride(), *weight.stride(), bias.stride(0) if bias is not None else 0, *images.stride(), *id_strides,
        **pixels, KIND=kind, NORMALIZE_TARGET=normalize_target, HAS_SLOPE=with_slope, HAS_BIAS=bias is not None,
        PRECISION="tf32", **tile, enable_fp_fusion=True,
    )  # fmt: skip
    if reduce:
        return total(partial, rows), slope
    losses = hidden.new_empty(batch, chosen, dtype=wide)
    sum_partials(partial.view(num_tiles, rows), losses, None, 1)
    return losses, slope
