# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
"""Triton kernels of ``add_layer_norm`` and their launchers.

A tile is a few whole rows, one warp or more a row, and stays in registers: the moments need no second read. A width
that is no power of two is cut into equal parts that are (768 = 3 x 256), held in a tuple, so that no lane is idle.

A program walks over every n-th tile of one group: the rows of a sample, where a vector differs between samples, else
all rows. So it reads its vectors once. Backward, it keeps its share of the group's column sums in registers. A second
kernel adds the shares in the order of the programs, and the gradients of the vectors are made of these sums.
"""

import functools
import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mvlm_kernels import dispatch
from mvlm_kernels.add_layer_norm.reference import groups_of, sum_dtype, sums_of
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
GATED, MOST_WARPS = ((12, 168), (64, 255)), 8
"""Limits of a backward pass that sums the gradient of a gate too: a lane holds 12 values where eight warps hold the
row. Sixteen may have no more than 128 registers a thread."""


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


@triton.jit
def sum_part(ptr, i, x, C: tl.constexpr, BLOCK_C: tl.constexpr):
    """Store the column sums of part i of a tile."""
    c = i * BLOCK_C + tl.arange(0, BLOCK_C)
    tl.store(ptr + c, tl.sum(x, axis=0), mask=c < C)


@triton.jit
def affine_part(
    weight_ptr, bias_ptr, scale_ptr, shift_ptr, i, C: tl.constexpr, ACC: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """Part i of what multiplies a normalised row, weight (1 + scale), and is added to it, bias (1 + scale) + shift."""
    factor = tl.full((1, BLOCK_C), 1, ACC)
    summand = tl.zeros((1, BLOCK_C), ACC)
    if weight_ptr is not None:
        factor = vector_part(weight_ptr, i, C, ACC, BLOCK_C)
    if bias_ptr is not None:
        summand = vector_part(bias_ptr, i, C, ACC, BLOCK_C)
    if scale_ptr is not None:
        scale = 1 + vector_part(scale_ptr, i, C, ACC, BLOCK_C)
        factor *= scale
        summand *= scale
    if shift_ptr is not None:
        summand += vector_part(shift_ptr, i, C, ACC, BLOCK_C)
    return factor, summand


@triton.jit(do_not_specialize=["gate_stride", "scale_stride", "shift_stride", "R"])
def add_norm_kernel(
    x_ptr, y_ptr, y_bias_ptr, weight_ptr, bias_ptr, gate_ptr, scale_ptr, shift_ptr,
    total_ptr, wide_ptr, out_ptr, mean_ptr, rstd_ptr, gate_stride, scale_stride, shift_stride, R, eps,
    C: tl.constexpr, RMS: tl.constexpr, GROUPED: tl.constexpr, ACC: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Groups of R rows, (groups * R, C), contiguous; mean and rstd (groups * R,). Grid (programs,), or if GROUPED
    (groups, programs of a group). Program n takes tiles n, n + programs, ... of its group.

    Pointers that are None are not used. Strides are those between the vectors of two groups, 0 for one vector of all.
    """
    group = tl.program_id(0).to(tl.int64) if GROUPED else 0
    if gate_ptr is not None:
        gate_ptr += group * gate_stride
    if scale_ptr is not None:
        scale_ptr += group * scale_stride
    if shift_ptr is not None:
        shift_ptr += group * shift_stride
    weights = ()
    biases = ()
    y_biases = ()
    gates = ()
    for i in tl.static_range(PARTS):
        affine = affine_part(weight_ptr, bias_ptr, scale_ptr, shift_ptr, i, C, ACC, BLOCK_C)
        weights += (affine[0],)
        biases += (affine[1],)
        if y_bias_ptr is not None:
            y_biases += (vector_part(y_bias_ptr, i, C, ACC, BLOCK_C),)
        if gate_ptr is not None:
            gates += (vector_part(gate_ptr, i, C, ACC, BLOCK_C),)
    for first in range(tl.program_id(GROUPED) * BLOCK_R, R, tl.num_programs(GROUPED) * BLOCK_R):
        r = (first + tl.arange(0, BLOCK_R)).to(tl.int64)
        exists = r < R
        inside = exists[:, None]
        r += group * R
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
                if gate_ptr is None:
                    s += widen(ys[i], ACC)
                    if y_bias_ptr is not None:
                        s += y_biases[i]
                else:
                    branch = widen(ys[i], ACC)
                    if y_bias_ptr is not None:
                        branch += y_biases[i]
                    s += branch * gates[i]
                store_part(total_ptr, row, i, inside, s, C, BLOCK_C)
                s = widen(cast(s, total_ptr.dtype.element_ty), ACC)  # backward computes from the stored sum
            if not RMS:
                summed += s
            parts += (s,)
        mean = tl.sum(summed, axis=1) / C
        squares = tl.zeros((BLOCK_R, BLOCK_C), ACC)
        for i in tl.static_range(PARTS):
            centred = parts[i]
            if not RMS:
                centred = tl.where(columns(i, BLOCK_C) < C, centred - mean[:, None], 0.0)
            squares += centred * centred
        rstd = 1 / tl.sqrt(tl.sum(squares, axis=1) / C + eps)
        for i in tl.static_range(PARTS):
            centred = parts[i]
            if not RMS:
                centred -= mean[:, None]
            n = centred * rstd[:, None] * weights[i]
            if bias_ptr is not None or shift_ptr is not None:
                n += biases[i]
            store_part(out_ptr, row, i, inside, n, C, BLOCK_C)
            if wide_ptr is not None:
                store_part(wide_ptr, row, i, inside, n, C, BLOCK_C)
        if not RMS:
            tl.store(mean_ptr + r, mean, mask=exists)
        tl.store(rstd_ptr + r, rstd, mask=exists)


@triton.jit(do_not_specialize=["gate_stride", "scale_stride", "R"])
def add_norm_backward_kernel(
    grad_ptr, residual_ptr, total_ptr, mean_ptr, rstd_ptr, weight_ptr, gate_ptr, scale_ptr, y_ptr,
    dx_ptr, dy_ptr, partial_ptr, gate_stride, scale_stride, R,
    C: tl.constexpr, POST: tl.constexpr, RMS: tl.constexpr, SHIFTED: tl.constexpr, BRANCHED: tl.constexpr,
    SUMS: tl.constexpr, GROUPED: tl.constexpr, ACC: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Groups, grid and strides are those of the forward kernel; partial (programs of a group, SUMS, groups, C).

    SUMS sums over rows in this order: grad * norm, with weight or scale; grad, if SHIFTED; the gradient of the sum, if
    BRANCHED; its product with y, if y_ptr is not None.
    """
    group = tl.program_id(0).to(tl.int64) if GROUPED else 0
    if gate_ptr is not None:
        gate_ptr += group * gate_stride
    if scale_ptr is not None:
        scale_ptr += group * scale_stride
    dw = ()
    db = ()
    dc = ()
    dg = ()
    weights = ()
    gates = ()
    for i in tl.static_range(PARTS):
        weights += (affine_part(weight_ptr, None, scale_ptr, None, i, C, ACC, BLOCK_C)[0],)
        if gate_ptr is not None:
            gates += (vector_part(gate_ptr, i, C, ACC, BLOCK_C),)
        zero = tl.zeros((BLOCK_R, BLOCK_C), ACC)
        dw += (zero,)
        db += (zero,)
        dc += (zero,)
        dg += (zero,)
    for first in range(tl.program_id(GROUPED) * BLOCK_R, R, tl.num_programs(GROUPED) * BLOCK_R):
        r = (first + tl.arange(0, BLOCK_R)).to(tl.int64)
        exists = r < R
        inside = exists[:, None]
        r += group * R
        row = (r * C)[:, None]
        if not RMS:
            mean = tl.load(mean_ptr + r, mask=exists, other=0.0)[:, None]
        rstd = tl.load(rstd_ptr + r, mask=exists, other=0.0)[:, None]
        grads = ()
        totals = ()
        residuals = ()
        ys = ()
        for i in tl.static_range(PARTS):
            grads += (load_part(grad_ptr, row, i, inside, C, BLOCK_C),)
            totals += (load_part(total_ptr, row, i, inside, C, BLOCK_C),)
            if residual_ptr is not None:
                residuals += (load_part(residual_ptr, row, i, inside, C, BLOCK_C),)
            if y_ptr is not None:
                ys += (load_part(y_ptr, row, i, inside, C, BLOCK_C),)
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
            norm = widen(totals[i], ACC)
            if RMS:
                norm *= rstd
            else:
                norm = tl.where(inside & (columns(i, BLOCK_C) < C), (norm - mean) * rstd, 0.0)
            next_dw += (dw[i] + g * norm,)
            next_db += (db[i] + g,)
            gw = g * weights[i]
            if not RMS:
                along_one += gw
            along_norm += gw * norm
            scaled += (gw,)
            norms += (norm,)
        dw = next_dw
        db = next_db
        one = (tl.sum(along_one, axis=1) / C)[:, None]
        along = (tl.sum(along_norm, axis=1) / C)[:, None]
        next_dc = ()
        next_dg = ()
        for i in tl.static_range(PARTS):
            ds = scaled[i]
            if not RMS:
                ds -= one
            ds = (ds - norms[i] * along) * rstd
            if not POST and residual_ptr is not None:
                ds += widen(residuals[i], ACC)
            store_part(dx_ptr, row, i, inside, ds, C, BLOCK_C)
            dy = ds
            if gate_ptr is not None:
                dy = ds * gates[i]
            if dy_ptr is not None:
                store_part(dy_ptr, row, i, inside, dy, C, BLOCK_C)
            next_dc += (dc[i] + ds,)  # rows past the end have ds = 0, as their rstd is
            if y_ptr is not None:
                next_dg += (dg[i] + ds * widen(ys[i], ACC),)
        dc = next_dc
        if y_ptr is not None:
            dg = next_dg
    step = tl.num_programs(0).to(tl.int64) * C if GROUPED else C
    share = partial_ptr + tl.program_id(GROUPED).to(tl.int64) * SUMS * step + group * C
    for i in tl.static_range(PARTS):
        at = share
        if weight_ptr is not None or scale_ptr is not None:
            sum_part(at, i, dw[i], C, BLOCK_C)
            at += step
        if SHIFTED:
            sum_part(at, i, db[i], C, BLOCK_C)
            at += step
        if BRANCHED:
            sum_part(at, i, dc[i], C, BLOCK_C)
            at += step
        if y_ptr is not None:
            sum_part(at, i, dg[i], C, BLOCK_C)


def parts_of(width: int) -> tuple[int, int]:
    """(PARTS, BLOCK_C): at most eight equal parts, powers of two, with the fewest values beyond the width."""
    choices = [(parts, power_of_two(ceil_div(width, parts))) for parts in range(1, 9)]
    return min(choices, key=lambda choice: (choice[0] * choice[1], choice[1] > WIDEST_PART, choice[0]))


def _walking(
    kernel: Any, x: Tensor, groups: int, held: int, limits: tuple[tuple[int, int], ...], warps: int = WARPS, **more: Any
) -> tuple[tuple[int, ...], dict[str, Any]]:
    """Grid and launch options of a kernel whose programs go over the rows of x (.., C), several rows in a tile.

    Args:
        groups: number of groups of rows, each with vectors of its own.
        held: most values that a lane holds; a row that needs more is a tile of its own.
        limits: pairs of (values of a lane, registers of a thread); the first pair with enough values sets `maxnreg`.
        more: further compile-time constants.
    """
    width, rows = x.shape[-1], x.shape[:-1].numel()
    parts, block = parts_of(width)
    block_r = power_of_two(max(1, 32 * warps * held // (parts * block)) + 1) // 2  # the largest that fits
    values = parts * block * block_r // (32 * warps)
    registers = next((limit for most, limit in limits if values <= most), limits[-1][1])
    (programs, _), options = walking(
        kernel, x.device, rows, C=width, **more, GROUPED=groups > 1, PARTS=parts, BLOCK_C=block, BLOCK_R=block_r,
        num_warps=warps, maxnreg=registers, enable_fp_fusion=FUSED,
    )  # fmt: skip
    if groups < 2:
        return (programs,), options
    return (groups, programs_of_group(ceil_div(rows // groups, options["BLOCK_R"]), groups, max(1, programs))), options


@functools.lru_cache(maxsize=1024)
def programs_of_group(tiles: int, groups: int, running: int) -> int:
    """Number of programs that share the tiles of a group of rows, chosen so that the whole launch takes fewest steps.

    tiles: of one group. running: programs that the GPU runs at once.
    """
    fewest = max(1, running // groups)
    steps = {n: ceil_div(groups * n, running) * ceil_div(tiles, n) for n in range(fewest, fewest + 8)}
    return min(tiles, *(n for n, count in steps.items() if count == min(steps.values())))


def _vectors(*vectors: Tensor | None) -> tuple[tuple[Tensor | None, ...], tuple[int, ...]]:
    """Vectors (C,) or (groups, C), copied where their values do not lie side by side, and the stride between groups.

    The stride is in elements, and 0 for a vector (C,) or None.
    """
    made = tuple(v if v is None or v.stride(-1) == 1 else v.contiguous() for v in vectors)
    return made, tuple(0 if v is None or v.ndim == 1 else v.stride(0) for v in made)


def add_layer_norm(
    x: Tensor, y: Tensor | None, y_bias: Tensor | None, weight: Tensor | None, bias: Tensor | None, gate: Tensor | None,
    scale: Tensor | None, shift: Tensor | None, eps: float, out_dtype: torch.dtype, post_norm: bool, rms: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Same contract as :func:`.reference.add_layer_norm`."""
    dtype, groups = sum_dtype(x, y), groups_of(gate, scale, shift)
    rows, wide_dtype = x.shape[:-1].numel(), compute_dtype(dtype)
    x, y = x.contiguous(), None if y is None else y.contiguous()
    total = x.new_empty(x.shape if y is not None else (0,), dtype=dtype)
    both = post_norm and out_dtype != dtype
    wide = x.new_empty(x.shape if both else (0,), dtype=dtype)
    normalised = x.new_empty(x.shape, dtype=out_dtype)
    mean, rstd = x.new_empty(0 if rms else rows, dtype=wide_dtype), x.new_empty(rows, dtype=wide_dtype)
    (y_bias, weight, bias), _ = _vectors(y_bias, weight, bias)
    modulation, strides = _vectors(gate, scale, shift)
    grid, options = _walking(add_norm_kernel, x, groups, HELD, FORWARD, RMS=rms, ACC=accumulator(dtype))
    dispatch.launch(
        add_norm_kernel, grid, x, y, y_bias, weight, bias, *modulation, total, wide if both else None, normalised,
        None if rms else mean, rstd, *strides, rows // max(groups, 1), eps, **options,
    )  # fmt: skip
    return total, wide, normalised, mean, rstd


def add_layer_norm_backward(
    grad_normalised: Tensor, grad_residual: Tensor | None, total: Tensor, mean: Tensor, rstd: Tensor, y: Tensor | None,
    weight: Tensor | None, gate: Tensor | None, scale: Tensor | None, x_dtype: torch.dtype, y_dtype: torch.dtype,
    post_norm: bool, shifted: bool, branched: bool, groups: int, rms: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Same contract as :func:`.reference.add_layer_norm_backward`."""
    width, rows = total.shape[-1], total.shape[:-1].numel()
    grad, total, y = grad_normalised.contiguous(), total.contiguous(), None if y is None else y.contiguous()
    residual = None if grad_residual is None else grad_residual.contiguous()
    dx = total.new_empty(total.shape, dtype=x_dtype)
    apart = y_dtype != x_dtype or gate is not None
    dy = total.new_empty(total.shape if apart else (0,), dtype=y_dtype)
    sums, wide = sums_of(y, weight, scale, shifted, branched), compute_dtype(total.dtype)
    (weight,), _ = _vectors(weight)
    modulation, strides = _vectors(gate, scale)
    held = HELD_NARROW if parts_of(width)[1] <= 128 else HELD_BACKWARD
    more = {"POST": post_norm, "RMS": rms, "SHIFTED": shifted, "BRANCHED": branched, "SUMS": sums}
    limits, warps = BACKWARD, WARPS
    if y is not None:
        held, limits = HELD_NARROW, GATED
        warps = max(WARPS, min(MOST_WARPS, power_of_two(ceil_div(math.prod(parts_of(width)), 32 * held))))
    grid, options = _walking(
        add_norm_backward_kernel, total, groups, held, limits, warps, **more, ACC=accumulator(total.dtype)
    )
    partial_sums = total.new_empty((grid[-1], sums, groups, width), dtype=wide)
    result = total.new_empty((sums, groups, width), dtype=wide)
    dispatch.launch(
        add_norm_backward_kernel, grid, grad, residual, total, None if rms else mean, rstd, weight, *modulation, y, dx,
        dy if apart else None, partial_sums, *strides, rows // max(groups, 1), **options,
    )  # fmt: skip
    sum_columns(partial_sums, result, grid[-1], sums * groups * width)
    return dx, dy, result
