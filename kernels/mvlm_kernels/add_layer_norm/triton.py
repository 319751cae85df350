# pyright: reportArgumentType=false
"""Triton kernels of ``add_layer_norm`` and their launchers.

A tile is a few whole rows, one warp or more a row, and stays in registers: the moments need no second read. A width
that is no power of two is cut into equal parts that are (768 = 3 x 256), held in a tuple, so that no lane is idle.

Backward, a program walks over every n-th tile and keeps its share of the column sums (gradients of weight, bias and
y_bias) in registers. A second kernel adds the shares in the order of the programs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mvlm_kernels import dispatch
from mvlm_kernels.add_layer_norm.reference import sum_dtype
from mvlm_kernels.arguments import compute_dtype
from mvlm_kernels.dispatch import ceil_div, power_of_two
from mvlm_kernels.language import accumulator, cast, sum_columns, widen

TILE, WARPS = 1024, 4
"""Values of a part of a tile, and warps of a program."""
NARROW, NARROW_TILE = 128, 512
"""Backward, parts up to this narrow take smaller tiles: their lanes also hold more copies of what is a row's."""
FUSED = False
"""Fused multiply-adds would take the products into the sums over a row: fma(a, b, the other lane's a * b). That is not
symmetric. The lanes of a row would end with sums of different bits, and it would be left open which of them counts."""
PROGRAMS_FORWARD, PROGRAMS_BACKWARD = 4, 2
"""Programs for each multiprocessor. A program reads the vectors once for all its rows."""


@triton.jit
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
    for i in tl.static_range(PARTS):  # pyright: ignore[reportGeneralTypeIssues]
        c = (i * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
        weights = weights + (widen(tl.load(weight_ptr + c, mask=c < C, other=0.0), ACC),)  # noqa: RUF005
        biases = biases + (widen(tl.load(bias_ptr + c, mask=c < C, other=0.0), ACC),)  # noqa: RUF005
        if y_bias_ptr is not None:
            y_biases = y_biases + (widen(tl.load(y_bias_ptr + c, mask=c < C, other=0.0), ACC),)  # noqa: RUF005
    for first in range(tl.program_id(0) * BLOCK_R, R, tl.num_programs(0) * BLOCK_R):
        r = (first + tl.arange(0, BLOCK_R)).to(tl.int64)
        inside = (r < R)[:, None]
        row = (r * C)[:, None]
        summed = tl.zeros((BLOCK_R,), ACC)
        parts = ()
        for i in tl.static_range(PARTS):  # pyright: ignore[reportGeneralTypeIssues]
            c = (i * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
            s = widen(tl.load(x_ptr + row + c, mask=inside & (c < C), other=0.0), ACC)
            if y_ptr is not None:
                s += widen(tl.load(y_ptr + row + c, mask=inside & (c < C), other=0.0), ACC)
                if y_bias_ptr is not None:
                    s += y_biases[i]
                rounded = cast(s, total_ptr.dtype.element_ty)
                tl.store(total_ptr + row + c, rounded, mask=inside & (c < C))
                s = widen(rounded, ACC)  # backward computes from the stored sum
            summed += tl.sum(s, axis=1)
            parts = parts + (s,)  # noqa: RUF005, a tuple of a kernel has no unpacking
        mean = summed / C
        squares = tl.zeros((BLOCK_R,), ACC)
        for i in tl.static_range(PARTS):  # pyright: ignore[reportGeneralTypeIssues]
            c = (i * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
            centred = tl.where(c < C, parts[i] - mean[:, None], 0.0)
            squares += tl.sum(centred * centred, axis=1)
        rstd = 1 / tl.sqrt(squares / C + eps)
        for i in tl.static_range(PARTS):  # pyright: ignore[reportGeneralTypeIssues]
            c = (i * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
            n = (parts[i] - mean[:, None]) * rstd[:, None] * weights[i] + biases[i]
            tl.store(out_ptr + row + c, cast(n, out_ptr.dtype.element_ty), mask=inside & (c < C))
            if wide_ptr is not None:
                tl.store(wide_ptr + row + c, cast(n, wide_ptr.dtype.element_ty), mask=inside & (c < C))
        tl.store(mean_ptr + r, mean, mask=r < R)
        tl.store(rstd_ptr + r, rstd, mask=r < R)


@triton.jit
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
    for i in tl.static_range(PARTS):  # pyright: ignore[reportGeneralTypeIssues]
        c = (i * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
        weights = weights + (widen(tl.load(weight_ptr + c, mask=c < C, other=0.0), ACC),)  # noqa: RUF005
        zero = tl.zeros((BLOCK_R, BLOCK_C), ACC)
        dw = dw + (zero,)  # noqa: RUF005
        db = db + (zero,)  # noqa: RUF005
        dc = dc + (zero,)  # noqa: RUF005
    for first in range(tl.program_id(0) * BLOCK_R, R, tl.num_programs(0) * BLOCK_R):
        r = (first + tl.arange(0, BLOCK_R)).to(tl.int64)
        inside = (r < R)[:, None]
        row = (r * C)[:, None]
        mean = tl.load(mean_ptr + r, mask=r < R, other=0.0)[:, None]
        rstd = tl.load(rstd_ptr + r, mask=r < R, other=0.0)[:, None]
        along_one = tl.zeros((BLOCK_R,), ACC)
        along_norm = tl.zeros((BLOCK_R,), ACC)
        scaled = ()
        norms = ()
        next_dw = ()
        next_db = ()
        for i in tl.static_range(PARTS):  # pyright: ignore[reportGeneralTypeIssues]
            c = (i * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
            g = widen(tl.load(grad_ptr + row + c, mask=inside & (c < C), other=0.0), ACC)
            if POST and residual_ptr is not None:
                g += widen(tl.load(residual_ptr + row + c, mask=inside & (c < C), other=0.0), ACC)
            s = widen(tl.load(total_ptr + row + c, mask=inside & (c < C), other=0.0), ACC)
            norm = tl.where(inside & (c < C), (s - mean) * rstd, 0.0)
            next_dw = next_dw + (dw[i] + g * norm,)  # noqa: RUF005
            next_db = next_db + (db[i] + g,)  # noqa: RUF005
            gw = g * weights[i]
            along_one += tl.sum(gw, axis=1)
            along_norm += tl.sum(gw * norm, axis=1)
            scaled = scaled + (gw,)  # noqa: RUF005
            norms = norms + (norm,)  # noqa: RUF005
        dw = next_dw
        db = next_db
        one = (along_one / C)[:, None]
        along = (along_norm / C)[:, None]
        next_dc = ()
        for i in tl.static_range(PARTS):  # pyright: ignore[reportGeneralTypeIssues]
            c = (i * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
            ds = (scaled[i] - one - norms[i] * along) * rstd
            if not POST and residual_ptr is not None:
                ds += widen(tl.load(residual_ptr + row + c, mask=inside & (c < C), other=0.0), ACC)
            tl.store(dx_ptr + row + c, cast(ds, dx_ptr.dtype.element_ty), mask=inside & (c < C))
            if dy_ptr is not None:
                tl.store(dy_ptr + row + c, cast(ds, dy_ptr.dtype.element_ty), mask=inside & (c < C))
            next_dc = next_dc + (dc[i] + ds,)  # noqa: RUF005, rows past the end have ds = 0, as their rstd is
        dc = next_dc
    share = partial_ptr + tl.program_id(0).to(tl.int64) * SUMS * C
    for i in tl.static_range(PARTS):  # pyright: ignore[reportGeneralTypeIssues]
        c = i * BLOCK_C + tl.arange(0, BLOCK_C)
        tl.store(share + c, tl.sum(dw[i], axis=0), mask=c < C)
        tl.store(share + C + c, tl.sum(db[i], axis=0), mask=c < C)
        if SUMS == 3:
            tl.store(share + 2 * C + c, tl.sum(dc[i], axis=0), mask=c < C)


def parts_of(width: int) -> tuple[int, int]:
    """(PARTS, BLOCK_C): at most eight equal parts, powers of two, with the fewest values beyond the width."""
    choices = [(parts, power_of_two(ceil_div(width, parts))) for parts in range(1, 9)]
    return min(choices, key=lambda choice: (choice[0] * choice[1], choice[0]))


def _tile(width: int, values: int) -> dict[str, int]:
    """Tile of at most `values` values a part, and at most four times that in all parts together."""
    parts, block = parts_of(width)
    return {"PARTS": parts, "BLOCK_C": block, "BLOCK_R": max(1, values // block // max(1, parts // 4))}


def _programs(device: torch.device, rows: int, block: int, share: int) -> int:
    """Number of programs: one a tile, or `share` for each multiprocessor; the interpreter takes those of an H100."""
    return min(ceil_div(rows, block), share * (dispatch.multiprocessors(device) or 132))


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
    width, dtype = x.shape[-1], sum_dtype(x, y)
    rows, wide_dtype, tile = x.shape[:-1].numel(), compute_dtype(dtype), _tile(width, TILE)
    x, y = x.contiguous(), None if y is None else y.contiguous()
    total = x.new_empty(x.shape if y is not None else (0,), dtype=dtype)
    both = post_norm and out_dtype != dtype
    wide = x.new_empty(x.shape if both else (0,), dtype=dtype)
    normalised = x.new_empty(x.shape, dtype=out_dtype)
    mean, rstd = x.new_empty(rows, dtype=wide_dtype), x.new_empty(rows, dtype=wide_dtype)
    weight, bias, y_bias = weight.contiguous(), bias.contiguous(), None if y_bias is None else y_bias.contiguous()
    dispatch.launch(
        add_norm_kernel, (_programs(x.device, rows, tile["BLOCK_R"], PROGRAMS_FORWARD),),
        x, y, y_bias, weight, bias, total, wide if both else None, normalised, mean, rstd, rows, eps,
        C=width, ACC=accumulator(dtype), **tile, num_warps=WARPS, enable_fp_fusion=FUSED,
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
    tile = _tile(width, NARROW_TILE if parts_of(width)[1] <= NARROW else TILE)
    grad, total, weight = grad_normalised.contiguous(), total.contiguous(), weight.contiguous()
    residual = None if grad_residual is None else grad_residual.contiguous()
    dx = total.new_empty(total.shape, dtype=x_dtype)
    dy = total.new_empty(total.shape if y_dtype != x_dtype else (0,), dtype=y_dtype)
    sums, wide = 3 if needs_bias else 2, compute_dtype(total.dtype)
    programs = _programs(total.device, rows, tile["BLOCK_R"], PROGRAMS_BACKWARD)
    partial_sums = total.new_empty((programs, sums, width), dtype=wide)
    result = total.new_empty((sums, width), dtype=wide)
    dispatch.launch(
        add_norm_backward_kernel, (programs,),
        grad, residual, total, mean, rstd, weight, dx, dy if y_dtype != x_dtype else None, partial_sums, rows,
        C=width, POST=post_norm, SUMS=sums, ACC=accumulator(total.dtype), **tile,
        # Two programs share 65,536 registers. The assembler would make room for a third, and spill.
        num_warps=WARPS, maxnreg=255, enable_fp_fusion=FUSED,
    )  # fmt: skip
    sum_columns(partial_sums, result, programs, sums * width)
    return dx, dy, result
