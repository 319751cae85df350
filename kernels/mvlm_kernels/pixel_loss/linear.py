# pyright: reportArgumentType=false
"""Triton kernels of ``linear_pixel_loss`` and their launchers.

    forward          tile (rows, pixels): hidden @ weight.T + bias, minus the pixels of the image; the tile leaves the
                     chip as one partial loss a row and one slope a pixel (a byte for L1), never as predictions
    backward hidden  tile (rows, width): slope @ weight, scaled row by row at the end
    backward params  tile (pixels, width): slope.T @ hidden over a share of the rows, as float32 partials that a second
                     kernel adds in a fixed order; the bias's gradient is the column sums of the same slope tiles

Rows are the B*K masked patches, F = C*P*P pixels, D the width of hidden. Parameters take the type of hidden as they are
read, so float32 weights beside bfloat16 activations cost no cast pass.
"""

import functools
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mvlm_kernels import configs
from mvlm_kernels.dispatch import arch, launch
from mvlm_kernels.language import cast, dot, widen
from mvlm_kernels.patch_gather.triton import (
    accumulator,
    image_offsets,
    normalized_pixels,
    pixels_of_valid,
    tile_of,
)
from mvlm_kernels.pixel_loss.triton import (
    decode_slope,
    encode_slope,
    grad_strides,
    loss_and_slope,
    new_slope,
    patch_moments,
    total,
)
from mvlm_kernels.sizes import ceil_div

# Enough programs for the largest GPU in the table twice over; a constant, so that the order of summation depends on
# shapes alone and results agree bit for bit between machines of one architecture.
PARTIAL_PROGRAMS = 288
PARTIAL_ROWS = 1024


@triton.jit
def moments_kernel(
    images_ptr, ids_ptr, mean_ptr, std_ptr, moments_ptr,
    K, num_patches, grid_w, stride_ib, stride_ic, stride_iy, stride_ix, stride_kb, stride_kk,
    C: tl.constexpr, P: tl.constexpr,
    HAS_IDS: tl.constexpr, IS_UINT8: tl.constexpr, HAS_MEAN: tl.constexpr, HAS_STD: tl.constexpr,
    ACC: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Program (b*K + k): moments (B*K, 2) of one target patch, for tiles that hold a part of a patch only."""
    row = tl.program_id(0).to(tl.int64)
    b = row // K
    k = row % K
    c = tl.arange(0, BLOCK_C)[:, None]
    p = tl.arange(0, BLOCK_P)[None, :]
    patch = tl.load(ids_ptr + b * stride_kb + k * stride_kk).to(tl.int64) if HAS_IDS else k
    readable = (c < C) & (p < pixels_of_valid(patch, num_patches, P))
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
    """Program (pixel tile, row tile): partial (tiles, M) sums of loss, slope (M, F). Pixel tiles run first, so that one
    row tile of hidden and of the image stays in the cache while they pass."""
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
    inside = (m < M)[:, None] & (f < F)[None, :]
    readable = (f < F)[None, :] & (f[None, :] < pixels_of_valid(patch, num_patches, P)[:, None] * C)
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


@triton.jit
def sum_partials_kernel(
    partial_ptr, out_ptr, grad_ptr, n, num_partials, divisor,
    HAS_GRAD: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """partial (num_partials, n) -> out (n), added in rising order, over divisor, times grad where there is one."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), ACC)
    # A pointer that moves on needs no product of two ints, which could pass 2^31.
    partial_ptrs = partial_ptr + i
    for _ in range(0, num_partials):
        total += tl.load(partial_ptrs, mask=i < n, other=0.0)
        partial_ptrs += n
    total = total / divisor
    if HAS_GRAD:
        total = total * widen(tl.load(grad_ptr), ACC)
    tl.store(out_ptr + i, cast(total, out_ptr.dtype.element_ty), mask=i < n)


@triton.jit
def hidden_gradient_kernel(
    slope_ptr, weight_ptr, grad_ptr, out_ptr,
    M, K, D, rows_of_mean, stride_wf, stride_wd, stride_gb, stride_gk,
    F: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Program (width tile, row tile): out (M, D) contiguous = grad[row] / (F * rows_of_mean) * slope @ weight."""
    d = (tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)
    m = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    acc = tl.zeros((BLOCK_M, BLOCK_D), ACC)
    for start in range(0, F, BLOCK_F):
        f = start + tl.arange(0, BLOCK_F)
        slope = tl.load(slope_ptr + m[:, None] * F + f[None, :], mask=(m < M)[:, None] & (f < F)[None, :], other=0)
        w = tl.load(
            weight_ptr + (f.to(tl.int64) * stride_wf)[:, None] + d[None, :] * stride_wd,
            mask=(f < F)[:, None] & (d < D)[None, :],
            other=0.0,
        )
        # A sign is exact in every type, and so are the other slopes in the type they were saved in, that of hidden.
        a = cast(decode_slope(slope, ACC), out_ptr.dtype.element_ty)
        acc = dot(a, cast(widen(w, ACC), out_ptr.dtype.element_ty), acc, PRECISION)
    grad = tl.load(grad_ptr + (m // K) * stride_gb + (m % K) * stride_gk, mask=m < M, other=0.0)
    acc = acc * (widen(grad, ACC) / rows_of_mean / F)[:, None]
    out_offsets = m[:, None] * D + d[None, :]
    tl.store(out_ptr + out_offsets, cast(acc, out_ptr.dtype.element_ty), mask=(m < M)[:, None] & (d < D)[None, :])


@triton.jit
def weight_gradient_kernel(
    slope_ptr, hidden_ptr, grad_ptr, largest_ptr, weight_partial_ptr, bias_partial_ptr,
    M, K, D, rows_per_part, stride_hb, stride_hk, stride_hd, stride_gb, stride_gk,
    F: tl.constexpr, HAS_BIAS: tl.constexpr, PER_ROW: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Program (width tile, pixel tile, part): weight_partial (parts, F, D) and bias_partial (parts, F) of one part's
    rows, in ACC. The gradient of one mean is a scalar and is left to the summation. That of (B, K) losses comes in here
    (PER_ROW), row by row, over the largest of them, which is left to the summation too: a scaled loss's would overflow
    float16."""
    d = (tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)
    f = (tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)).to(tl.int64)
    part = tl.program_id(2).to(tl.int64)
    acc = tl.zeros((BLOCK_F, BLOCK_D), ACC)
    column_sums = tl.zeros((BLOCK_F,), ACC)
    end = tl.minimum((part + 1) * rows_per_part, M)
    for start in range(part * rows_per_part, end, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M).to(tl.int64)
        b = m // K
        k = m % K
        slope = tl.load(slope_ptr + m[:, None] * F + f[None, :], mask=(m < end)[:, None] & (f < F)[None, :], other=0)
        h = tl.load(
            hidden_ptr + (b * stride_hb + k * stride_hk)[:, None] + d[None, :] * stride_hd,
            mask=(m < end)[:, None] & (d < D)[None, :],
            other=0.0,
        )
        a = decode_slope(slope, ACC)
        if PER_ROW:
            grad = tl.load(grad_ptr + b * stride_gb + k * stride_gk, mask=m < end, other=0.0)
            a = a * (widen(grad, ACC) / widen(tl.load(largest_ptr), ACC))[:, None]
        if HAS_BIAS:
            column_sums += tl.sum(a, axis=0)
        acc = dot(tl.trans(cast(a, h.dtype)), h, acc, PRECISION)
    offsets = (part * F + f)[:, None] * D + d[None, :]
    tl.store(weight_partial_ptr + offsets, acc, mask=(f < F)[:, None] & (d < D)[None, :])
    if HAS_BIAS and tl.program_id(0) == 0:
        tl.store(bias_partial_ptr + part * F + f, column_sums, mask=f < F)


@functools.cache
def tiles(kernel: str, dtype: torch.dtype, target: int) -> dict[str, int]:
    """Tile of a kernel by the width of its operands; float64 exists interpreted only and takes float32's."""
    bits = "16" if dtype in (torch.float16, torch.bfloat16) else "32"
    return configs.lookup("linear_pixel_loss", target, f"{kernel}/{bits}")


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
    """hidden (B, K, D), weight (F, D), bias (F,) -> (loss scalar or (B, K), slope (B, K, F) or empty)."""
    batch, chosen, width = hidden.shape
    features, rows = weight.shape[0], batch * chosen
    channels, grid_w = images.shape[1], images.shape[3] // patch_size
    num_patches = images.shape[2] // patch_size * grid_w
    wide = torch.float64 if torch.float64 in (hidden.dtype, images.dtype) else torch.float32
    acc = accumulator(wide)
    id_strides = patch_ids.stride() if patch_ids is not None else (0, 0)
    pixels = {
        "C": channels, "P": patch_size, "HAS_IDS": patch_ids is not None, "IS_UINT8": images.dtype == torch.uint8,
        "HAS_MEAN": mean is not None, "HAS_STD": std is not None, "ACC": acc,
    }  # fmt: skip
    moments = None
    if normalize_target:
        moments = hidden.new_empty(rows, 2, dtype=wide)
        block_c, block_p, warps = tile_of(channels, patch_size)
        launch(
            moments_kernel, (rows,), images, patch_ids, mean, std, moments,
            chosen, num_patches, grid_w, *images.stride(), *id_strides,
            **pixels, BLOCK_C=block_c, BLOCK_P=block_p, num_warps=warps, enable_fp_fusion=True,
        )  # fmt: skip
    tile = tiles("forward", hidden.dtype, arch(hidden.device))
    num_tiles = ceil_div(features, tile["BLOCK_F"])
    partial = hidden.new_empty(num_tiles, rows, dtype=wide)
    slope = new_slope((batch, chosen, features) if with_slope else (0, 0, 0), kind, hidden)
    launch(
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


def sum_partials(partial: Tensor, out: Tensor, grad: Tensor | None, divisor: int) -> None:
    """out (n elements) = sum over the first dimension of partial (parts, n) over divisor, times grad."""
    n = out.numel()
    launch(
        sum_partials_kernel, (ceil_div(n, 1024),), partial, out, grad, n, partial.shape[0], divisor,
        HAS_GRAD=grad is not None, ACC=accumulator(partial.dtype), BLOCK=1024, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip


def linear_pixel_loss_backward(
    grad: Tensor, slope: Tensor, hidden: Tensor, weight: Tensor, needs: tuple[bool, bool, bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden (B, K, D), weight (F, D) and bias (F,), each in its own type, empty where not needed."""
    batch, chosen, width = hidden.shape
    features, rows = weight.shape[0], batch * chosen
    acc, wide = accumulator(grad.dtype), grad.dtype
    rows_of_mean = 1 if grad.ndim else max(rows, 1)
    hidden_grad = hidden.new_empty(hidden.shape if needs[0] else (0,))
    weight_grad = weight.new_empty(weight.shape if needs[1] else (0,))
    bias_grad = weight.new_empty((features,) if needs[2] else (0,))
    if needs[0]:
        tile = tiles("backward_hidden", hidden.dtype, arch(hidden.device))
        launch(
            hidden_gradient_kernel, (ceil_div(width, tile["BLOCK_D"]), ceil_div(rows, tile["BLOCK_M"])),
            slope, weight, grad, hidden_grad, rows, chosen, width, rows_of_mean,
            *weight.stride(), *grad_strides(grad),
            F=features, ACC=acc, PRECISION="tf32", **tile, enable_fp_fusion=True,
        )  # fmt: skip
    if needs[1] or needs[2]:
        tile = tiles("backward_weight", hidden.dtype, arch(hidden.device))
        across, down = ceil_div(width, tile["BLOCK_D"]), ceil_div(features, tile["BLOCK_F"])
        parts = parts_of(rows, across * down)
        weight_partial = hidden.new_empty(parts, features, width, dtype=wide)
        bias_partial = hidden.new_empty(parts, features, dtype=wide) if needs[2] else None
        largest = None
        if grad.ndim and rows:
            largest = grad.abs().amax().clamp_min(torch.finfo(grad.dtype).tiny)
        launch(
            weight_gradient_kernel, (across, down, parts),
            slope, hidden, grad, largest, weight_partial, bias_partial, rows, chosen, width,
            ceil_div(rows, parts), *hidden.stride(), *grad_strides(grad),
            F=features, HAS_BIAS=needs[2], PER_ROW=grad.ndim > 0, ACC=acc, PRECISION="tf32",
            **tile, enable_fp_fusion=True,
        )  # fmt: skip
        if needs[1]:
            sum_partials(weight_partial, weight_grad, largest if grad.ndim else grad, rows_of_mean * features)
        if bias_partial is not None:
            sum_partials(bias_partial, bias_grad, largest if grad.ndim else grad, rows_of_mean * features)
    return hidden_grad, weight_grad, bias_grad


def parts_of(rows: int, tiles_of_a_part: int) -> int:
    """In how many parts the rows are summed: enough to fill a GPU, at least PARTIAL_ROWS rows each, at least one."""
    return max(1, min(PARTIAL_PROGRAMS // tiles_of_a_part, rows // PARTIAL_ROWS))


def aot_cases() -> Iterable[tuple[str, Callable[[], Any]]]:
    """Launches to compile ahead of time: (label, function) with meta tensors of the paper's shapes. float32 weights
    beside 16-bit activations are what autocast passes."""
    ids = torch.empty(64, 116, dtype=torch.int32, device="meta")
    values = torch.empty(3, device="meta")

    def both(dtype: torch.dtype, weight_dtype: torch.dtype, kind: str, reduce: bool, normalize_target: bool) -> None:
        images = torch.empty(64, 3, 224, 224, dtype=torch.uint8, device="meta")
        hidden = torch.empty(64, 116, 768, dtype=dtype, device="meta")
        weight = torch.empty(768, 768, dtype=weight_dtype, device="meta")
        bias = torch.empty(768, dtype=weight_dtype, device="meta")
        loss, slope = linear_pixel_loss(
            hidden, weight, bias, images, ids, 16, values, values, kind, normalize_target, reduce, True
        )
        linear_pixel_loss_backward(loss, slope, hidden, weight, (True, True, True))

    types = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    for name, dtype in types.items():
        for kind in ("l1", "mse"):
            yield f"{name}/{kind}", partial(both, dtype, dtype, kind, True, False)
        yield f"{name}/smooth_l1/rows/normalized", partial(both, dtype, dtype, "smooth_l1", False, True)
    yield "bf16/l1/fp32-weight", partial(both, torch.bfloat16, torch.float32, "l1", True, False)
