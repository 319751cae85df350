# pyright: reportArgumentType=false
"""Gradients of ``linear_pixel_loss``: Triton kernels and their launcher, and what its forward shares with them.

    backward hidden  tile (rows, width): slope @ weight, scaled row by row at the end
    backward params  tile (pixels, width): slope.T @ hidden over a share of the rows, as float32 partials that a second
                     kernel adds in a fixed order; the bias's gradient is the column sums of the same slope tiles

Rows are the B*K masked patches, F = C*P*P pixels, D the width of hidden.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from mvlm_kernels import configs, dispatch
from mvlm_kernels.dispatch import ceil_div
from mvlm_kernels.gather_patches.triton import accumulator
from mvlm_kernels.language import cast, dot, widen
from mvlm_kernels.pixel_loss.triton import decode_slope, grad_strides

# Enough programs for the largest GPU in the table twice over; a constant, so that the order of summation depends on
# shapes alone and results agree bit for bit between machines of one architecture.
PARTIAL_PROGRAMS = 288
PARTIAL_ROWS = 1024


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


def sum_partials(partial: Tensor, out: Tensor, grad: Tensor | None, divisor: int) -> None:
    """out (n elements) = sum over the first dimension of partial (parts, n) over divisor, times grad."""
    n = out.numel()
    dispatch.launch(
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
        bias_partial = hidden.new_empty(parts, features, dtype=wide) if needs[2] else None
        largest = None
        if grad.ndim and rows:
            largest = grad.abs().amax().clamp_min(torch.finfo(grad.dtype).tiny)
        dispatch.launch(
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
