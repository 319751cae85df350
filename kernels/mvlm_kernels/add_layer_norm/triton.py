# pyright: reportArgumentType=false, reportGeneralTypeIssues=false
"""Triton kernels of ``add_layer_norm`` and their launchers.

A tile is a few whole rows, one warp or more a row, and stays in registers: the moments need no second read. A width
that is no power of two is cut into equal parts that are (768 = 3 x 256), held in a tuple, so that no lane is idle.

Backward, a program walks over every n-th tile and keeps its share of the column sums (gradients of weight, bias and
y_bias) in registers. A second kernel adds the shares in the order of the programs.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mvlm_kernels import dispatch
from mvlm_kernels.add_layer_norm.reference import sum_dtype
from mvlm_kernels.arguments import compute_dtype
from mvlm_kernels.dispatch import ceil_div, power_of_two
from mvlm_kernels.language import accumulator, cast, sum_columns, walking, widen

WARPS = 4
WIDEST_PART = 256
"""Values of a part of a row, up to rows of eight such parts: a warp then holds a row of 4 x 256, and no warp waits for
another one's sums."""
FUSED = False
"""Fused multiply-adds would take the products into the sums over a row: fma(a, b, the other lane's a * b). That is not
symmetric. The lanes of a row would end with sums of different bits, and it would be left open which of them counts."""
# Most registers of a thread, (values that a lane holds, limit), and so the programs that a multiprocessor holds.
# Compiled with at most 255 (sm_90, bfloat16 beside a float32 stream, pre-norm / post-norm), by values and width:
#                 forward                    backward
#     12 (384)                               139 / 128: 4 programs by 128
#     16 (1024)                              178 / 168: 2 by 255
#     24 (768)    128 / 140: 3 by 168        225 / 228: 2 by 255
#     32 (1024)   167 / 165: 2 by 255        spills 48 bytes
# Forward, sm_100 takes more: 24 values spill 120 bytes by 128, and 32 values 168 bytes by 168.
FORWARD, BACKWARD = ((24, 168), (64, 255)), ((12, 128), (64, 255))
# Most values that a lane holds. Backward, parts up to 128 wide take less: their lanes hold more copies of what is a
# row's.
HELD, HELD_BACKWARD, HELD_NARROW = 32, 24, 12


@triton.jit
def columns(i, BLOCK_C: tl.constexpr):
    """Numbers of the columns of part i of a row, (1, BLOCK_C)."""
    return (i * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]


@triton.jit
def vector_part(ptr, i, C: tl.constexpr, ACC: tl.constexpr, BLOCK_C: tl.constexpr):
    """Part i of a vector (C,), as (1, BLOCK_C) in ACC, zeros past its end."""
    c = columns(i, BLOCK_C)
    return widen(tl.load(ptr + c, mask=c < C, other=0.0), ACC)


@triton.jit
def load_part(ptr, row, i, inside, C: tl.constexpr, BLOCK_C: tl.constexpr):
    """Part i of rows, (BLOCK_R, BLOCK_C). row: offsets of the rows. Rows not inside are zeros and are not accessed."""
    c = columns(i, BLOCK_C)
    return tl.load(ptr + row + c, mask=inside & (c < C), other=0.0)


@triton.jit
def store_part(ptr, row, i, inside, x, C: tl.constexpr, BLOCK_C: tl.constexpr):
    c = columns(i, BLOCK_C)
    tl.store(ptr + row + c, cast(x, ptr.dtype.element_ty), mask=inside & (c < C))


@triton.jit(do_not_specialize=["R"])
def add_norm_kernel(
    x_ptr, y_ptr, y_bias_ptr, weight_ptr, bias_ptr, total_ptr, wide_ptr, out_ptr, mean_ptr, rstd_ptr,
    R, eps,
    C: tl.constexpr, ACC: tl.constexpr, PARTS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """All of (R, C), contiguous; mean and rstd (R,). Program n takes tiles n, n + programs, ...

    Pointers that are None are not used.
    """
    weights = ()
    biases = ()
    y_biases = ()
    for i in tl.static_range(PARTS):
        weights += (vector_part(weight_ptr, i, C, ACC, BLOCK_C),)
        biases += (vector_part(bias_ptr, i, C, ACC, BLOCK_C),)
        if y_bias_ptr is not None:
            y_biases += (vector_part(y_bias_ptr, i, C, ACC, BLOCK_C),)
    for first in range(tl.program_id(0) * BLOCK_R, R, tl.num_programs(0) * BLOCK_R):
        r = (first + tl.arange(0, BLOCK_R)).to(tl.int64)
        inside = (r < R)[:, None]
        row = (r * C)[:, None]
        xs = ()
        ys = ()
        for i in tl.static_range(PARTS):
            xs += (load_part(x_ptr, row, i, inside, C, BLOCK_C),)
            if y_ptr is not None:
                ys += (load_part(y_ptr, row, i, inside, C, BLOCK_C),)
        summed = tl.zeros((BLOCK_R, BLOCK_C), ACC)
        parts = ()
        for i in tl.static_range(PARTS):
            s = widen(xs[i], ACC)
            if y_ptr is not None:
                s += widen(ys[i], ACC)
                if y_bias_ptr is not None:
                    s += y_biases[i]
                store_part(total_ptr, row, i, inside, s, C, BLOCK_C)
                s = widen(cast(s, total_ptr.dtype.element_ty), ACC)  # backward computes from the stored sum
            summed += s
            parts += (s,)
        mean = tl.sum(summed, axis=1) / C
        squares = tl.zeros((BLOCK_R, BLOCK_C), ACC)
        for i in tl.static_range(PARTS):
            centred = tl.where(columns(i, BLOCK_C) < C, parts[i] - mean[:, None], 0.0)
            squares += centred * centred
        rstd = 1 / tl.sqrt(tl.sum(squares, axis=1) / C + eps)
        for i in tl.static_range(PARTS):
            n = (parts[i] - mean[:, None]) * rstd[:, None] * weights[i] + biases[i]
            store_part(out_ptr, row, i, inside, n, C, BLOCK_C)
            if wide_ptr is not None:
                store_part(wide_ptr, row, i, inside, n, C, BLOCK_C)
        tl.store(mean_ptr + r, mean, mask=r < R)
        tl.store(rstd_ptr + r, rstd, mask=r < R)


@triton.jit(do_not_specialize=["R"])
def add_norm_backward_kernel(
    grad_ptr, residual_ptr, total_ptr, mean_ptr, rstd_ptr, weight_ptr, dx_ptr, dy_ptr, partial_ptr,
    R,
    C: tl.constexpr, POST: tl.constexpr, SUMS: tl.constexpr, ACC: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """All of (R, C), contiguous; partial (programs, SUMS, C). Program n takes tiles n, n + programs, ..."""
    dw = ()
    db = ()
    dc = ()
    weights = ()
    for i in tl.static_range(PARTS):
        weights += (vector_part(weight_ptr, i, C, ACC, BLOCK_C),)
        zero = tl.zeros((BLOCK_R, BLOCK_C), ACC)
        dw += (zero,)
        db += (zero,)
        dc += (zero,)
    for first in range(tl.program_id(0) * BLOCK_R, R, tl.num_programs(0) * BLOCK_R):
        r = (first + tl.arange(0, BLOCK_R)).to(tl.int64)
        inside = (r < R)[:, None]
        row = (r * C)[:, None]
        mean = tl.load(mean_ptr + r, mask=r < R, other=0.0)[:, None]
        rstd = tl.load(rstd_ptr + r, mask=r < R, other=0.0)[:, None]
        grads = ()
        totals = ()
        residuals = ()
        for i in tl.static_range(PARTS):
            grads += (load_part(grad_ptr, row, i, inside, C, BLOCK_C),)
            totals += (load_part(total_ptr, row, i, inside, C, BLOCK_C),)
            if residual_ptr is not None:
                residuals += (load_part(residual_ptr, row, i, inside, C, BLOCK_C),)
        along_one = tl.zeros((BLOCK_R, BLOCK_C), ACC)
        along_norm = tl.zeros((BLOCK_R, BLOCK_C), ACC)
        scaled = ()
        norms = ()
        next_dw = ()
        next_db = ()
        for i in tl.static_range(PARTS):
            g = widen(grads[i], ACC)
            if POST and residual_ptr is not None:
                g += widen(residuals[i], ACC)
            norm = tl.where(inside & (columns(i, BLOCK_C) < C), (widen(totals[i], ACC) - mean) * rstd, 0.0)
            next_dw += (dw[i] + g * norm,)
            next_db += (db[i] + g,)
            gw = g * weights[i]
            along_one += gw
            along_norm += gw * norm
            scaled += (gw,)
            norms += (norm,)
        dw = next_dw
        db = next_db
        one = (tl.sum(along_one, axis=1) / C)[:, None]
        along = (tl.sum(along_norm, axis=1) / C)[:, None]
        next_dc = ()
        for i in tl.static_range(PARTS):
            ds = (scaled[i] - one - norms[i] * along) * rstd
            if not POST and residual_ptr is not None:
                ds += widen(residuals[i], ACC)
            store_part(dx_ptr, row, i, inside, ds, C, BLOCK_C)
            if dy_ptr is not None:
                store_part(dy_ptr, row, i, inside, ds, C, BLOCK_C)
            next_dc += (dc[i] + ds,)  # rows past the end have ds = 0, as their rstd is
        dc = next_dc
    share = partial_ptr + tl.program_id(0).to(tl.int64) * SUMS * C
    for i in tl.static_range(PARTS):
        c = i * BLOCK_C + tl.arange(0, BLOCK_C)
        tl.store(share + c, tl.sum(dw[i], axis=0), mask=c < C)
        tl.store(share + C + c, tl.sum(db[i], axis=0), mask=c < C)
        if SUMS == 3:
            tl.store(share + 2 * C + c, tl.sum(dc[i], axis=0), mask=c < C)


def parts_of(width: int) -> tuple[int, int]:
    """(PARTS, BLOCK_C): at most eight equal parts, powers of two, with the fewest values beyond the width."""
    choices = [(parts, power_of_two(ceil_div(width, parts))) for parts in range(1, 9)]
    return min(choices, key=lambda choice: (choice[0] * choice[1], choice[1] > WIDEST_PART, choice[0]))


def _walking(
    kernel: Any, x: Tensor, held: int, limits: tuple[tuple[int, int], ...], **more: Any
) -> tuple[tuple[int, int], dict[str, Any]]:
    """Grid and options of a kernel that goes over the rows of x (.., C). held: most values of a lane, if a row fits."""
    width, rows = x.shape[-1], x.shape[:-1].numel()
    parts, block = parts_of(width)
    block_r = power_of_two(max(1, 32 * WARPS * held // (parts * block)) + 1) // 2  # the largest that fits
    values = parts * block * block_r // (32 * WARPS)
    registers = next((limit for most, limit in limits if values <= most), limits[-1][1])
    return walking(
        kernel, x.device, rows, C=width, **more, PARTS=parts, BLOCK_C=block, BLOCK_R=block_r, num_warps=WARPS,
        maxnreg=registers, enable_fp_fusion=FUSED,
    )  # fmt: skip


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
    dtype = sum_dtype(x, y)
    rows, wide_dtype = x.shape[:-1].numel(), compute_dtype(dtype)
    x, y = x.contiguous(), None if y is None else y.contiguous()
    total = x.new_empty(x.shape if y is not None else (0,), dtype=dtype)
    both = post_norm and out_dtype != dtype
    wide = x.new_empty(x.shape if both else (0,), dtype=dtype)
    normalised = x.new_empty(x.shape, dtype=out_dtype)
    mean, rstd = x.new_empty(rows, dtype=wide_dtype), x.new_empty(rows, dtype=wide_dtype)
    weight, bias, y_bias = weight.contiguous(), bias.contiguous(), None if y_bias is None else y_bias.contiguous()
    grid, options = _walking(add_norm_kernel, x, HELD, FORWARD, ACC=accumulator(dtype))
    dispatch.launch(
        add_norm_kernel, grid, x, y, y_bias, weight, bias, total, wide if both else None, normalised, mean, rstd, rows,
        eps, **options,
    )  # fmt: skip
    return total, wide, normalised, mean, rstd


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
    width, rows = total.shape[-1], total.shape[:-1].numel()
    grad, total, weight = grad_normalised.contiguous(), total.contiguous(), weight.contiguous()
    residual = None if grad_residual is None else grad_residual.contiguous()
    dx = total.new_empty(total.shape, dtype=x_dtype)
    dy = total.new_empty(total.shape if y_dtype != x_dtype else (0,), dtype=y_dtype)
    sums, wide = 3 if needs_bias else 2, compute_dtype(total.dtype)
    held = HELD_NARROW if parts_of(width)[1] <= 128 else HELD_BACKWARD
    more = {"POST": post_norm, "SUMS": sums, "ACC": accumulator(total.dtype)}
    grid, options = _walking(add_norm_backward_kernel, total, held, BACKWARD, **more)
    partial_sums = total.new_empty((grid[0], sums, width), dtype=wide)
    result = total.new_empty((sums, width), dtype=wide)
    dispatch.launch(
        add_norm_backward_kernel, grid, grad, residual, total, mean, rstd, weight, dx,
        dy if y_dtype != x_dtype else None, partial_sums, rows, **options,
    )  # fmt: skip
    sum_columns(partial_sums, result, grid[0], sums * width)
    return dx, dy, result
