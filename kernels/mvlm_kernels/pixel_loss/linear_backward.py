# pyright: reportArgumentType=false
"""Gradients of ``linear_pixel_loss``: Triton kernels and their launcher.

    hidden gradient  tile (rows, width): slope @ weight, scaled row by row at the end
    weight gradient  tile (pixels, width): slope.T @ hidden over one part of the rows, stored as a float32 partial sum
    bias gradient    column sums of slope, stored as float32 partial sums by the programs of the weight gradient
    sums             ``sum_partials_kernel`` in :mod:`.shared` adds the partial sums in a fixed order

Rows are the B*K masked patches, F = C*P*P the pixels of a patch, D the width of hidden.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mvlm_kernels import dispatch
from mvlm_kernels.dispatch import ceil_div
from mvlm_kernels.gather_patches.triton import accumulator
from mvlm_kernels.language import cast, dot, widen
from mvlm_kernels.pixel_loss.shared import sum_partials, tiles
from mvlm_kernels.pixel_loss.triton import decode_slope, grad_strides

# Programs of the weight gradient: about two for each SM of the largest GPU. A constant, so that the order of summation
# depends on shapes alone and machines of one architecture give equal bits.
PARTIAL_PROGRAMS = 288
# Minimum rows per part.
PARTIAL_ROWS = 1024


@triton.jit
def hidden_gradient_kernel(
    slope_ptr, weight_ptr, grad_ptr, out_ptr,
    M, K, D, rows_of_mean, stride_wf, stride_wd, stride_gb, stride_gk,
    F: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Gradient of hidden: out (M, D), contiguous, = grad[row] / (F * rows_of_mean) * slope @ weight.

    A program computes one tile; the grid is (width tiles, row tiles).
    """
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
        # The cast is exact: slopes are signs (L1), or were saved in hidden's type.
        a = cast(decode_slope(slope, ACC), out_ptr.dtype.element_ty)
        acc = dot(a, cast(widen(w, ACC), out_ptr.dtype.element_ty), acc, PRECISION)
    grad = tl.load(grad_ptr + (m // K) * stride_gb + (m % K) * stride_gk, mask=m < M, other=0.0)
    acc = acc * (widen(grad, ACC) / rows_of_mean / F)[:, None]
    out_offsets = m[:, None] * D + d[None, :]
    tl.store(out_ptr + out_offsets, cast(acc, out_ptr.dtype.element_ty), mask=(m < M)[:, None] & (d < D)[None, :])


@triton.jit
def scaled_slopes(
    slope_ptr, grad_ptr, largest_ptr, m, f, end, K, stride_gb, stride_gk,
    F: tl.constexpr, PER_ROW: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Slopes (rows m, pixels f) in ACC, zero for rows at or past end. PER_ROW multiplies row m by grad[m] / largest."""
    offsets = m.to(tl.int64)[:, None] * F + f[None, :]
    slope = tl.load(slope_ptr + offsets, mask=(m < end)[:, None] & (f < F)[None, :], other=0)
    values = decode_slope(slope, ACC)
    if PER_ROW:
        b = (m // K).to(tl.int64)
        k = (m % K).to(tl.int64)
        grad = tl.load(grad_ptr + b * stride_gb + k * stride_gk, mask=m < end, other=0.0)
        values = values * (widen(grad, ACC) / widen(tl.load(largest_ptr), ACC))[:, None]
    return values


@triton.jit
def weight_gradient_kernel(
    slope_ptr, hidden_ptr, grad_ptr, largest_ptr, weight_partial_ptr, bias_partial_ptr,
    M, K, D, rows_per_part, stride_hb, stride_hk, stride_hd, stride_gb, stride_gk,
    F: tl.constexpr, HAS_BIAS: tl.constexpr, PER_ROW: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Partial gradients in ACC: weight_partial (parts, F, D) and bias_partial (parts * width tiles, F).

    A program computes one tile of weight_partial; the grid is (width tiles, pixel tiles, parts).

    The incoming gradient of a mean loss is one scalar, and ``sum_partials_kernel`` multiplies by it. The incoming
    gradients of (B, K) losses (PER_ROW) differ by row, so this kernel multiplies each row by its gradient divided by
    the largest of them. Without the division, a scaled loss would overflow float16. ``sum_partials_kernel`` multiplies
    by the largest.
    """
    # Row numbers stay int32, because the loop divides them by K, and an int64 division costs several times as much.
    # They fit, because the forward's grid has at most 65,535 row tiles.
    d = (tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)
    f = (tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)).to(tl.int64)
    part = tl.program_id(2)
    end = tl.minimum((part + 1) * rows_per_part, M)
    if HAS_BIAS:
        # The sums do not reuse the tiles that the product below loads. Where slope has hidden's type, the product reads
        # such a tile in shared memory. If registers read it too, Triton's pipeliner (3.6 to 3.9, sm_90) reserves one
        # buffer too few, and a later copy overwrites what the asynchronous wgmma is still reading.
        # The programs of one pixel tile and part share its rows, so that slope is read only once more in total.
        # The sums come before the product, because they need fewer registers there. Two programs then fit an SM on
        # sm_90 and sm_100.
        share = tl.cdiv(tl.cdiv(rows_per_part, BLOCK_M), tl.num_programs(0)) * BLOCK_M
        first = part * rows_per_part + tl.program_id(0) * share
        last = tl.minimum(first + share, end)
        sums = tl.zeros((BLOCK_M, BLOCK_F), ACC)
        for start in range(first, last, BLOCK_M):
            m = start + tl.arange(0, BLOCK_M)
            sums += scaled_slopes(
                slope_ptr, grad_ptr, largest_ptr, m, f, last, K, stride_gb, stride_gk, F, PER_ROW, ACC
            )
        partial = (part * tl.num_programs(0) + tl.program_id(0)).to(tl.int64)
        tl.store(bias_partial_ptr + partial * F + f, tl.sum(sums, axis=0), mask=f < F)
    acc = tl.zeros((BLOCK_F, BLOCK_D), ACC)
    for start in range(part * rows_per_part, end, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        a = scaled_slopes(slope_ptr, grad_ptr, largest_ptr, m, f, end, K, stride_gb, stride_gk, F, PER_ROW, ACC)
        b = (m // K).to(tl.int64)
        k = (m % K).to(tl.int64)
        h = tl.load(
            hidden_ptr + (b * stride_hb + k * stride_hk)[:, None] + d[None, :] * stride_hd,
            mask=(m < end)[:, None] & (d < D)[None, :],
            other=0.0,
        )
        acc = dot(tl.trans(cast(a, h.dtype)), h, acc, PRECISION)
    offsets = (part.to(tl.int64) * F + f)[:, None] * D + d[None, :]
    tl.store(weight_partial_ptr + offsets, acc, mask=(f < F)[:, None] & (d < D)[None, :])


def linear_pixel_loss_backward(
    grad: Tensor, slope: Tensor, hidden: Tensor, weight: Tensor, needs: tuple[bool, bool, bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden (B, K, D), weight (F, D) and bias (F,), each in its own dtype, empty where not needed.

    grad is the incoming gradient, a scalar or (B, K); slope (B, K, F) is the forward's.
    """
    batch, chosen, width = hidden.shape
    features, rows = weight.shape[0], batch * chosen
    acc, wide = accumulator(grad.dtype), grad.dtype
    rows_of_mean = 1 if grad.ndim else max(rows, 1)
    hidden_grad = hidden.new_empty(hidden.shape if needs[0] else (0,))
    weight_grad = weight.new_empty(weight.shape if needs[1] else (0,))
    bias_grad = weight.new_empty((features,) if needs[2] else (0,))
    if needs[0]:
        tile = tiles("backward_hidden", hidden.dtype, dispatch.arch(hidden.device))
        dispatch.launch(
            hidden_gradient_kernel, (ceil_div(width, tile["BLOCK_D"]), ceil_div(rows, tile["BLOCK_M"])),
            slope, weight, grad, hidden_grad, rows, chosen, width, rows_of_mean,
            *weight.stride(), *grad_strides(grad),
            F=features, ACC=acc, PRECISION="tf32", **tile, enable_fp_fusion=True,
        )  # fmt: skip
    if needs[1] or needs[2]:
        tile = tiles("backward_weight", hidden.dtype, dispatch.arch(hidden.device))
        across, down = ceil_div(width, tile["BLOCK_D"]), ceil_div(features, tile["BLOCK_F"])
        parts = parts_of(rows, across * down)
        weight_partial = hidden.new_empty(parts, features, width, dtype=wide)
        bias_partial = hidden.new_empty(parts * across, features, dtype=wide) if needs[2] else None
        # With no rows there is no largest gradient, and the partials are zeros.
        per_row = grad.ndim > 0 and rows > 0
        largest = grad.abs().amax().clamp_min(torch.finfo(grad.dtype).tiny) if per_row else None
        dispatch.launch(
            weight_gradient_kernel, (across, down, parts),
            slope, hidden, grad, largest, weight_partial, bias_partial, rows, chosen, width,
            ceil_div(rows, parts), *hidden.stride(), *grad_strides(grad),
            F=features, HAS_BIAS=needs[2], PER_ROW=per_row, ACC=acc, PRECISION="tf32",
            **tile, enable_fp_fusion=True,
        )  # fmt: skip
        factor = largest if grad.ndim else grad
        if needs[1]:
            sum_partials(weight_partial, weight_grad, factor, rows_of_mean * features)
        if bias_partial is not None:
            sum_partials(bias_partial, bias_grad, factor, rows_of_mean * features)
    return hidden_grad, weight_grad, bias_grad


def parts_of(rows: int, tiles_of_a_part: int) -> int:
    """Number of parts that the rows are summed in: enough to fill a GPU, PARTIAL_ROWS rows or more each, at least 1."""
    return max(1, min(PARTIAL_PROGRAMS // tiles_of_a_part, rows // PARTIAL_ROWS))
