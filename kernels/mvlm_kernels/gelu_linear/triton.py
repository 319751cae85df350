# pyright: reportArgumentType=false
"""Triton kernels of ``gelu_linear``, for all but its matrix products, and their launchers.

A program owns a slice of the columns and walks over every n-th tile of rows. Backward it reads the gradient and h once,
writes the gradient of h and the GELU again, and keeps its share of the bias gradient in registers. A second kernel adds
the shares in the order of the programs.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mvlm_kernels import dispatch
from mvlm_kernels.dispatch import ceil_div
from mvlm_kernels.language import accumulator, cast, sum_columns, walking, widen

BLOCK_R, BLOCK_C, WARPS = 8, 256, 4
# Most registers of a thread, and so the programs that a multiprocessor holds. Compiled without a limit (sm_90):
#     kernel    16 bits  float32
#     forward   43       52        9 programs by 56
#     backward  80       96        5 by 96; 6 by 80 would spill 8 bytes on sm_100 and sm_120
FORWARD, BACKWARD = 56, 96


@triton.jit(do_not_specialize=["R"])
def gelu_kernel(
    h_ptr, bias_ptr, out_ptr, R, C, ACC: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """out = GELU(h + bias), (R, C), contiguous. Program (rows, columns)."""
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    bias = tl.zeros((BLOCK_C,), ACC)
    if bias_ptr is not None:
        bias += widen(tl.load(bias_ptr + c, mask=c < C, other=0.0), ACC)
    for first in range(tl.program_id(0) * BLOCK_R, R, tl.num_programs(0) * BLOCK_R):
        r = (first + tl.arange(0, BLOCK_R)).to(tl.int64)
        inside = (r < R)[:, None] & (c < C)[None, :]
        at = (r * C)[:, None] + c[None, :]
        x = widen(tl.load(h_ptr + at, mask=inside, other=0.0), ACC) + bias[None, :]
        below = 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)
        tl.store(out_ptr + at, cast(x * below, out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["R"])
def gelu_backward_kernel(
    grad_ptr, h_ptr, bias_ptr, dh_ptr, out_ptr, partial_ptr, R, C,
    ACC: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dh and the GELU again, (R, C), contiguous; partial (programs along rows, C). Program (rows, columns).

    The GELU is not written where out_ptr is None, nor the partial sums where partial_ptr is None.
    """
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    bias = tl.zeros((BLOCK_C,), ACC)
    if bias_ptr is not None:
        bias += widen(tl.load(bias_ptr + c, mask=c < C, other=0.0), ACC)
    total = tl.zeros((BLOCK_R, BLOCK_C), ACC)
    for first in range(tl.program_id(0) * BLOCK_R, R, tl.num_programs(0) * BLOCK_R):
        r = (first + tl.arange(0, BLOCK_R)).to(tl.int64)
        inside = (r < R)[:, None] & (c < C)[None, :]
        at = (r * C)[:, None] + c[None, :]
        g = widen(tl.load(grad_ptr + at, mask=inside, other=0.0), ACC)
        x = widen(tl.load(h_ptr + at, mask=inside, other=0.0), ACC) + bias[None, :]
        below = 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)
        density = tl.exp(-0.5 * x * x) * 0.3989422804014327
        dx = g * (below + x * density)
        if out_ptr is not None:
            tl.store(out_ptr + at, cast(x * below, out_ptr.dtype.element_ty), mask=inside)
        tl.store(dh_ptr + at, cast(dx, dh_ptr.dtype.element_ty), mask=inside)
        total += dx
    if partial_ptr is not None:
        tl.store(partial_ptr + tl.program_id(0).to(tl.int64) * C + c, tl.sum(total, axis=0), mask=c < C)


def _walking(kernel: Any, h: Tensor, registers: int) -> tuple[tuple[int, int], dict[str, Any]]:
    """Grid (programs along rows, slices of columns) and options of a kernel that goes over h (.., C)."""
    return walking(
        kernel, h.device, h.shape[:-1].numel(), ceil_div(h.shape[-1], BLOCK_C), ACC=accumulator(h.dtype),
        BLOCK_R=BLOCK_R, BLOCK_C=BLOCK_C, num_warps=WARPS, maxnreg=registers, enable_fp_fusion=True,
    )  # fmt: skip


def gelu(h: Tensor, h_bias: Tensor | None) -> Tensor:
    """Same contract as :func:`.reference.gelu`."""
    width, rows = h.shape[-1], h.shape[:-1].numel()
    out = h.new_empty(h.shape)
    grid, options = _walking(gelu_kernel, h, FORWARD)
    dispatch.launch(
        gelu_kernel, grid, h.contiguous(), None if h_bias is None else h_bias.contiguous(), out, rows, width, **options
    )
    return out


def gelu_backward(grad: Tensor, h: Tensor, h_bias: Tensor | None, again: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Same contract as :func:`.reference.gelu_backward`."""
    width, rows = h.shape[-1], h.shape[:-1].numel()
    dh, out = h.new_empty(h.shape), h.new_empty(h.shape if again else 0)
    wide = torch.float64 if h.dtype == torch.float64 else torch.float32
    grid, options = _walking(gelu_backward_kernel, h, BACKWARD)
    sums = h.new_empty(0 if h_bias is None else width, dtype=wide)
    partial_sums = None if h_bias is None else h.new_empty((grid[0], width), dtype=wide)
    dispatch.launch(
        gelu_backward_kernel, grid,
        grad.contiguous(), h.contiguous(), None if h_bias is None else h_bias.contiguous(), dh,
        out if again else None, partial_sums, rows, width, **options,
    )  # fmt: skip
    if partial_sums is not None:
        sum_columns(partial_sums, sums, grid[0], width)
    return dh, out, sums
