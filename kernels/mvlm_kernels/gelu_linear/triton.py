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
from mvlm_kernels.language import accumulator, cast, reciprocal, sum_columns, walking, widen

BLOCK_R, BLOCK_C, WARPS = 8, 256, 4
# Most registers of a thread, and so the programs that a multiprocessor holds. 9 and 6 programs, by 56 and 80 registers,
# would spill on sm_100.
FORWARD, BACKWARD = 64, 96


@triton.jit
def normal(x):
    """Distribution and density of the standard normal at x.

    In float32 both come from one exponential: below zero the distribution is q(u) exp(-x^2 / 2) with
    u = |x| / (1 + p |x|), as in Abramowitz and Stegun 7.1.26. There q is a polynomial in 1 - p u; in u it rounds less,
    because u is small where q is large. p and q, of degree 7, are a minimax fit over |x| <= 13: the distribution is off
    by at most 8e-10, and by 8e-6 of itself down to x = -6.
    """
    if x.dtype == tl.float64:
        below = 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)
        density = tl.exp(-0.5 * x * x) * 0.3989422804014327
    else:
        power = tl.exp2(x * x * -0.7213475204444817)
        size = tl.minimum(tl.abs(x), 16.0)  # power is 0 from there on; infinity / infinity would be NaN
        u = size * reciprocal(1.0 + 0.3181980515339463 * size)
        q = 8.259688928884256e-05 - 1.590934793434284e-05 * u
        q = q * u + 0.00026202475531102664
        q = q * u - 0.001337024949170824
        q = q * u - 0.01428183734172398
        q = q * u + 0.12305854221386427
        q = q * u - 0.39894235595808375
        q = q * u + 0.5
        below = tl.where(x < size, q * power, 1.0 - q * power)  # where x is negative
        density = power * 0.3989422804014327
    return below, density


@triton.jit(do_not_specialize=["R"])
def gelu_kernel(
    h_ptr, bias_ptr, out_ptr, R, C, ACC: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """out = GELU(h + bias), (R, C), contiguous. Program (rows, columns)."""
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    r = tl.arange(0, BLOCK_R)
    at = (r * C)[:, None] + c[None, :]  # places in a tile, from its start
    bias = tl.zeros((BLOCK_C,), ACC)
    if bias_ptr is not None:
        bias += widen(tl.load(bias_ptr + c, mask=c < C, other=0.0), ACC)
    start = (tl.program_id(0) * BLOCK_R).to(tl.int64) * C
    for first in range(tl.program_id(0) * BLOCK_R, R, tl.num_programs(0) * BLOCK_R):
        inside = (r < R - first)[:, None] & (c < C)[None, :]
        x = widen(tl.load(h_ptr + start + at, mask=inside, other=0.0), ACC) + bias[None, :]
        below, _ = normal(x)
        tl.store(out_ptr + start + at, cast(x * below, out_ptr.dtype.element_ty), mask=inside)
        start += (tl.num_programs(0) * BLOCK_R).to(tl.int64) * C


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
        below, density = normal(x)
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
