# pyright: reportArgumentType=false, reportOperatorIssue=false, reportCallIssue=false
"""Triton kernels of ``contrastive_terms``, and their launchers. No logit is written to memory.

Forward, a program multiplies one tile of logits and reduces it at once, along its rows and along its columns: to the
largest logit, the sum of exponentials, the right pairs and the draw. :func:`combine_kernel` joins these partial results
in the order of the tiles. Backward, a program multiplies its tile again and writes the gradient of its logits, of which
torch makes two products. So a block of logits costs four products in all, as in ``reference.py``.

A second product of the logits in the place of that gradient would be 2 E more operations a logit. In 16 bits the
gradient is 2 bytes written and 4 read, in blocks that stay in a GPU's second-level cache.

Legend: R rows (images) and C columns (captions) of a block, E width, T tiles. Logits are in base 2 inside the kernels:
an exponential then is one instruction. Rows and columns past the end repeat the last one, with a weight of 0 in sums.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mvlm_kernels import dispatch
from mvlm_kernels.arguments import compute_dtype
from mvlm_kernels.contrastive_loss import noise, reference
from mvlm_kernels.contrastive_loss.reference import LOWEST, Pairs, blocks
from mvlm_kernels.dispatch import ceil_div, power_of_two
from mvlm_kernels.language import accumulator, cast, dot, fast_log2, reciprocal, widen

INF = tl.constexpr(float("inf"))
LOG2_E, LN_2 = tl.constexpr(1.4426950408889634), tl.constexpr(0.6931471805599453)
NO_PLACE = tl.constexpr(2**31 - 1)
GOLDEN, MIX1, MIX2 = tl.constexpr(noise.GOLDEN), tl.constexpr(noise.MIX1), tl.constexpr(noise.MIX2)
SIZES = ("R", "C", "first", "T", "N")
PARTIAL = 1 << 23
"""Logits of a block forward. Its partial results take at most 8 MiB, as the logits of a block in torch do."""
WRITTEN = 8 << 20
"""Bytes of the gradients of a block's logits."""


@triton.jit
def hashed(key, numbers):
    """uint64 of a key and int64 numbers, of whose hash ``noise.gumbel_noise`` makes the noise of pairs."""
    return mixed(numbers.to(tl.uint64) * GOLDEN + key.to(tl.uint64))


@triton.jit
def mixed(x):
    """SplitMix64's finaliser of uint64."""
    x = (x ^ (x >> 30)) * MIX1
    x = (x ^ (x >> 27)) * MIX2
    return x ^ (x >> 31)


@triton.jit
def gumbel(bits):
    """Standard Gumbel noise in base 2, of uint64 bits that belong to a pair: ``noise.gumbel_noise`` / ln 2, in float32.

    Near 1 a logarithm of few digits would spoil the largest noises, which decide the draws. So -log2(u) is a polynomial
    in 1 - u there, exact to 1.5e-7 of itself (a minimax fit); the other logarithm only has to be exact beside a logit.
    """
    x = (bits ^ (bits >> 30)) * MIX1
    x = (x ^ (x >> 27)) * MIX2
    u = ((x >> 41).to(tl.int32).to(tl.float32) + 0.5) * 1.1920928955078125e-07
    v = 1.0 - u
    q = 1.7094928479792773 * v - 1.5603292849137247
    q = q * v + 1.133135120239355
    q = q * v + 0.05484926298623738
    q = q * v + 0.3927743627074728
    q = q * v + 0.4787765674974994
    q = q * v + 0.7214002408185031
    q = q * v + 1.442694827988366
    exponential = tl.where(u > 0.5, q * v, -fast_log2(u))
    return 0.5287663729448977 - fast_log2(exponential)  # -log2(ln 2): of a logarithm in base 2, in the place of e


@triton.jit
def softplus(x):
    """log2(1 + 2^x). In float32 the logarithm is a polynomial in 2^-|x|, exact to 3e-8 of itself (a minimax fit)."""
    power = tl.exp2(-tl.abs(x))
    if x.dtype == tl.float64:
        log = tl.log2(1.0 + power)
    else:
        q = 0.007549172895695617 * power - 0.0425670249109377
        q = q * power + 0.112856132978144
        q = q * power - 0.1971189187082958
        q = q * power + 0.27564138815557726
        q = q * power - 0.3584084662970413
        q = q * power + 0.48069295654336136
        q = q * power - 0.7213402079703995
        q = q * power + 1.4426949974340608
        log = q * power
    return tl.maximum(x, 0.0) + log


@triton.jit
def logits(
    image_ptr, text_ptr, scale_ptr, r, c, E, EVEN: tl.constexpr, BLOCK_K: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Logits (rows r, columns c) in base 2, without the bias. image and text are contiguous, (.., E).

    EVEN: BLOCK_K divides E.
    """
    x = tl.zeros((r.shape[0], c.shape[0]), ACC)
    rows = image_ptr + (r.to(tl.int64) * E)[:, None]
    columns = text_ptr + (c.to(tl.int64) * E)[:, None]
    for k in range(0, E, BLOCK_K):
        e = (k + tl.arange(0, BLOCK_K))[None, :]
        if EVEN:
            a = tl.load(rows + e)
            b = tl.load(columns + e)
        else:
            a = tl.load(rows + e, mask=e < E, other=0.0)
            b = tl.load(columns + e, mask=e < E, other=0.0)
        x = dot(a, tl.trans(b), x, PRECISION)
    return x * (tl.load(scale_ptr) * LOG2_E)


@triton.jit
def matching(own, column, image_id_ptr, text_id_ptr):
    """bool (R, C), True = pairs own (R,) and column (C,) share an image or a text, or are one pair without ids."""
    if image_id_ptr is None and text_id_ptr is None:
        found = own[:, None] == column[None, :]
    else:
        found = tl.zeros((own.shape[0], column.shape[0]), tl.int1)
        if image_id_ptr is not None:
            found = tl.load(image_id_ptr + own)[:, None] == tl.load(image_id_ptr + column)[None, :]
        if text_id_ptr is not None:
            found = found | (tl.load(text_id_ptr + own)[:, None] == tl.load(text_id_ptr + column)[None, :])
    return found


@triton.jit
def tile_of(R, C, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Tile of a program along rows and along columns, and its rows and columns. Neighbours share columns."""
    tiles = tl.cdiv(R, BLOCK_M)
    tile_r, tile_c = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    return tile_r, tile_c, tile_r * BLOCK_M + tl.arange(0, BLOCK_M), tile_c * BLOCK_N + tl.arange(0, BLOCK_N)


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(
    image_ptr, text_ptr, scale_ptr, bias_ptr, rows_ptr, image_id_ptr, text_id_ptr, weights_ptr, keys_ptr, own_ptr,
    of_rows, of_columns, R, C, first, E,
    EVEN: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Partial results of a tile, of its rows (T, R) and of its columns (T, C), which are pairs `first` and the next.

    of_rows, of_columns: pointers of the largest logit, the sum of exponentials over the largest (of rows of the sigmoid
    loss: of softplus), the largest of a right pair, the weighted sum of right pairs, the largest of logit and noise,
    and the place where it is. A pointer is None where nobody asks. weights_ptr: (G,), of shared right pairs; None: a
    row's own pair is right, and its logit goes to own_ptr (R,), in base e. keys_ptr: None without draws.
    """
    tile_r, tile_c, rm, rn = tile_of(R, C, BLOCK_M, BLOCK_N)
    r, c = tl.minimum(rm, R - 1), tl.minimum(rn, C - 1)
    at_r, at_c = tile_c * R + rm, tile_r * C + rn
    x = logits(image_ptr, text_ptr, scale_ptr, r, c, E, EVEN, BLOCK_K, ACC, PRECISION)
    own, column = tl.load(rows_ptr + r), (first + c).to(tl.int64)
    if weights_ptr is not None or keys_ptr is not None:
        matches = matching(own, column, image_id_ptr, text_id_ptr)
    if keys_ptr is not None:
        of_row = hashed(tl.load(keys_ptr), own)[:, None]
        noisy = x + gumbel(of_row + (column.to(tl.uint64) * GOLDEN)[None, :]).to(ACC)
        noisy = tl.where(matches, -INF, noisy)
        most = tl.max(noisy, 1)
        tl.store(of_rows[4] + at_r, most, mask=rm < R)
        place = tl.min(tl.where(noisy == most[:, None], rn[None, :], NO_PLACE), 1)
        tl.store(of_rows[5] + at_r, place, mask=rm < R)
        of_column = hashed(tl.load(keys_ptr + 1), column)[None, :]
        noisy = x + gumbel(of_column + (own.to(tl.uint64) * GOLDEN)[:, None]).to(ACC)
        noisy = tl.where(matches, -INF, noisy)
        most = tl.max(noisy, 0)
        tl.store(of_columns[4] + at_c, most, mask=rn < C)
        place = tl.min(tl.where(noisy == most[None, :], rm[:, None], NO_PLACE), 0)
        tl.store(of_columns[5] + at_c, place, mask=rn < C)
    if bias_ptr is not None:
        x += widen(tl.load(bias_ptr), ACC) * LOG2_E
    if weights_ptr is not None:
        right = tl.where(matches, x, -INF)
        tl.store(of_rows[2] + at_r, tl.max(right, 1), mask=rm < R)
        tl.store(of_columns[2] + at_c, tl.max(right, 0), mask=rn < C)
        weights = tl.load(weights_ptr + own)[:, None] + tl.load(weights_ptr + column)[None, :]
        right = tl.where(matches & (rn < C)[None, :], x * weights, 0.0)
        tl.store(of_rows[3] + at_r, tl.sum(right, 1), mask=rm < R)
    else:
        place = own - first
        inside = (place >= tile_c * BLOCK_N) & (place < tl.minimum(tile_c * BLOCK_N + BLOCK_N, C))
        if tl.max(inside.to(tl.int32), 0) > 0:
            right = tl.sum(tl.where(place[:, None] == rn[None, :], x, 0.0), 1)
            tl.store(own_ptr + rm, right * LN_2, mask=inside & (rm < R))
    top_r, top_c = tl.max(x, 1), tl.max(x, 0)
    tl.store(of_rows[0] + at_r, top_r, mask=rm < R)
    tl.store(of_columns[0] + at_c, top_c, mask=rn < C)
    weight_r, weight_c = (rm < R).to(ACC)[:, None], (rn < C).to(ACC)[None, :]
    if bias_ptr is not None:
        tl.store(of_rows[1] + at_r, tl.sum(softplus(x) * weight_c, 1), mask=rm < R)
    else:
        tl.store(of_rows[1] + at_r, tl.sum(tl.exp2(x - top_r[:, None]) * weight_c, 1), mask=rm < R)
        tl.store(of_columns[1] + at_c, tl.sum(tl.exp2(x - top_c[None, :]) * weight_r, 0), mask=rn < C)


@triton.jit(do_not_specialize=SIZES)
def combine_kernel(
    partial, found, numbers_ptr, first, T, N,
    SIGMOID: tl.constexpr, ACC: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Add partial results (T, N) of the tiles, in their order, to what earlier blocks have found (N,), in base e.

    partial, found: pointers as of :func:`forward_kernel`; found has the log-sum-exp in the place of the sum, or sums of
    softplus with SIGMOID. Place p stands for pair numbers_ptr[p] of the block's rows, or without them for first + p.
    """
    i = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    exists = i < N
    top = tl.full((BLOCK_N,), -INF, ACC)
    best = tl.full((BLOCK_N,), -INF, ACC)
    score = tl.full((BLOCK_N,), -INF, ACC)
    total = tl.zeros((BLOCK_N,), ACC)
    right = tl.zeros((BLOCK_N,), ACC)
    place = tl.zeros((BLOCK_N,), tl.int32)
    for start in range(0, T, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        at, inside = (t * N)[:, None] + i[None, :], (t < T)[:, None] & exists[None, :]
        x = tl.load(partial[0] + at, mask=inside, other=-INF)
        most = tl.maximum(top, tl.max(x, 0))
        if partial[1] is not None:
            y = tl.load(partial[1] + at, mask=inside, other=0.0)
            if SIGMOID:
                total += tl.sum(y, 0)
            else:
                center = tl.where(most == -INF, 0.0, most)
                total = total * tl.exp2(top - center) + tl.sum(y * tl.exp2(x - center[None, :]), 0)
        top = most
        if partial[2] is not None:
            best = tl.maximum(best, tl.max(tl.load(partial[2] + at, mask=inside, other=-INF), 0))
        if partial[3] is not None:
            right += tl.sum(tl.load(partial[3] + at, mask=inside, other=0.0), 0)
        if partial[4] is not None:
            s = tl.load(partial[4] + at, mask=inside, other=-INF)
            most = tl.max(s, 0)
            places = tl.load(partial[5] + at, mask=inside, other=NO_PLACE)
            places = tl.min(tl.where(s == most[None, :], places, NO_PLACE), 0)
            place = tl.where(most > score, places, place)
            score = tl.where(most > score, most, score)
    before = tl.load(found[0] + i, mask=exists, other=0.0)
    tl.store(found[0] + i, tl.maximum(before, top * LN_2), mask=exists)
    if partial[1] is not None:
        before = tl.load(found[1] + i, mask=exists, other=0.0)
        if SIGMOID:
            total = before + total * LN_2
        else:
            before = before * LOG2_E
            most = tl.maximum(before, top)
            total = total * tl.exp2(top - most) + tl.exp2(before - most)
            total = (most + tl.log2(total)) * LN_2
        tl.store(found[1] + i, total, mask=exists)
    if partial[2] is not None:
        before = tl.load(found[2] + i, mask=exists, other=0.0)
        tl.store(found[2] + i, tl.maximum(before, best * LN_2), mask=exists)
    if partial[3] is not None:
        before = tl.load(found[3] + i, mask=exists, other=0.0)
        tl.store(found[3] + i, before + right * LN_2, mask=exists)
    if partial[4] is not None:
        score = score * LN_2
        better = exists & (score > tl.load(found[4] + i, mask=exists, other=0.0))
        number = (first + place).to(tl.int64)
        if numbers_ptr is not None:
            number = tl.load(numbers_ptr + place, mask=better, other=0)
        tl.store(found[4] + i, score, mask=better)
        tl.store(found[5] + i, number, mask=better)


@triton.jit(do_not_specialize=SIZES)
def gradient_kernel(
    image_ptr, text_ptr, scale_ptr, bias_ptr, rows_ptr, image_id_ptr, text_id_ptr, weights_ptr, lse_ptr, column_lse_ptr,
    grad_ptr, column_grad_ptr, out_ptr, sum_ptr, R, C, first, E,
    EVEN: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Gradient of a tile of logits, out (R, C), from those of the rows' terms (R,) and of the columns (C,).

    sum: (tiles,), their sums, which are the gradient of the bias; None without one. lse, column_lse: log-sum-exps in
    base e. All else is as in :func:`forward_kernel`.
    """
    _, tile_c, rm, rn = tile_of(R, C, BLOCK_M, BLOCK_N)
    r, c = tl.minimum(rm, R - 1), tl.minimum(rn, C - 1)
    x = logits(image_ptr, text_ptr, scale_ptr, r, c, E, EVEN, BLOCK_K, ACC, PRECISION)
    own, grad = tl.load(rows_ptr + r), tl.load(grad_ptr + r)
    if bias_ptr is not None:
        x += widen(tl.load(bias_ptr), ACC) * LOG2_E
        dx = reciprocal(1.0 + tl.exp2(-x)) * grad[:, None]
        weight = 1.0
    else:
        lse, column_lse = tl.load(lse_ptr + r) * LOG2_E, tl.load(column_lse_ptr + c) * LOG2_E
        dx = tl.exp2(x - lse[:, None]) * grad[:, None]
        dx += tl.exp2(x - column_lse[None, :]) * tl.load(column_grad_ptr + c)[None, :]
        weight = 2.0
    if weights_ptr is not None:
        column = (first + c).to(tl.int64)
        weights = tl.load(weights_ptr + own)[:, None] + tl.load(weights_ptr + column)[None, :]
        matches = matching(own, column, image_id_ptr, text_id_ptr)
        dx = tl.where(matches, dx - weights * grad[:, None], dx)
    else:
        place = own - first
        inside = (place >= tile_c * BLOCK_N) & (place < tile_c * BLOCK_N + BLOCK_N)
        if tl.max(inside.to(tl.int32), 0) > 0:
            dx = tl.where(place[:, None] == rn[None, :], dx - (weight * grad)[:, None], dx)
    exists = (rm < R)[:, None] & (rn < C)[None, :]
    if sum_ptr is not None:
        of_rows = tl.sum(tl.where(exists, dx, 0.0), 1)
        tl.store(sum_ptr + tl.program_id(0), tl.sum(of_rows, 0))
    tl.store(out_ptr + rm[:, None] * C + rn[None, :], cast(dx, out_ptr.dtype.element_ty), mask=exists)


def _operands(image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """Both in one dtype, contiguous."""
    dtype = image.dtype if image.dtype == text.dtype else compute_dtype(image.dtype, text.dtype)
    return image.to(dtype).contiguous(), text.to(dtype).contiguous()


def _contiguous(*tensors: Tensor | None) -> tuple[Any, ...]:
    return tuple(x if x is None else x.contiguous() for x in tensors)


def _options(kernel: str, image: Tensor, compares: bool) -> dict[str, Any]:
    """Tiles and compile options of a kernel that multiplies. compares: it compares ids, for shared pairs or for draws.

    A thread holds 64 logits, or 32 beside ids. More of them would spill, and fewer take more instructions each.
    """
    tile = {"BLOCK_M": 128, "BLOCK_N": 32 if compares else 64, "BLOCK_K": 64 // image.dtype.itemsize}
    tile |= {"num_warps": 4, "num_stages": 3, "maxnreg": 240}
    tile = dispatch.overridden(kernel, tile)
    constants = {"EVEN": image.shape[1] % tile["BLOCK_K"] == 0, "ACC": accumulator(image.dtype), "PRECISION": "tf32"}
    return {**constants, **tile, "enable_fp_fusion": True}


def _combine(
    partial: tuple[Tensor | None, ...], found: tuple[Tensor | None, ...], numbers: Tensor | None, first: int,
    sigmoid: bool,
) -> None:  # fmt: skip
    top = partial[0]
    assert top is not None
    tiles, size = top.shape
    block_t = min(64, power_of_two(tiles))
    block_n = 1024 // block_t
    dispatch.launch(
        combine_kernel, (ceil_div(size, block_n),), partial, found, numbers, first, tiles, size, SIGMOID=sigmoid,
        ACC=accumulator(top.dtype), BLOCK_T=block_t, BLOCK_N=block_n, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip


def forward(
    image: Tensor, text: Tensor, log_scale: Tensor, bias: Tensor | None, rows: Tensor, image_id: Tensor | None,
    text_id: Tensor | None, shared: bool, keys: Tensor | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Same contract as :func:`.reference.forward`."""
    dtype, sigmoid, draws = compute_dtype(image.dtype, text.dtype), bias is not None, keys is not None
    rows, image_id, text_id, keys = _contiguous(rows, image_id, text_id, keys)
    pairs = Pairs(rows, len(text), image_id, text_id, shared, sigmoid, dtype)
    options = {"dtype": dtype, "device": image.device}
    of_rows, of_columns = (torch.full((2, len(x)), LOWEST, **options) for x in (image, text))
    score, column_score = (torch.full((len(x),), LOWEST, **options) for x in (image, text))
    lse = torch.full((len(image),), 0.0 if sigmoid else LOWEST, **options)
    column_lse = torch.full((len(text),), 0.0 if sigmoid else LOWEST, **options)
    right, drawn, column_drawn = torch.zeros_like(lse), rows.clone(), pairs.columns.clone()
    scale, weights = log_scale.exp().to(dtype), pairs.share if shared else None
    image, text = _operands(image, text)
    tiles = _options("forward_kernel", image, shared or draws)
    found = (of_rows[0], lse, of_rows[1], right, score, drawn)
    column_found = (of_columns[0], column_lse, of_columns[1], None, column_score, column_drawn)

    def partial(number: int, size: int, side: int) -> tuple[Tensor | None, ...]:
        """Buffers of the partial results of one side, those that somebody asks for."""
        wanted = True, not (sigmoid and side), shared, shared and not side, draws
        buffers = iter(torch.empty((sum(wanted), number, size), **options))
        places = torch.empty((number, size), dtype=torch.int32, device=image.device) if draws else None
        return *(next(buffers) if it else None for it in wanted), places

    def asked(outputs: tuple[Tensor | None, ...], partial: tuple[Tensor | None, ...], part: slice) -> Any:
        return tuple(None if x is None or p is None else x[part] for x, p in zip(outputs, partial, strict=True))

    for r, c in blocks(len(image), len(text), PARTIAL, tiles["BLOCK_N"]):
        height, width = len(rows[r]), len(pairs.columns[c])
        tiles_r, tiles_c = ceil_div(height, tiles["BLOCK_M"]), ceil_div(width, tiles["BLOCK_N"])
        by_rows, by_columns = partial(tiles_c, height, 0), partial(tiles_r, width, 1)
        dispatch.launch(
            forward_kernel, (tiles_r * tiles_c,), image[r], text[c], scale, bias, rows[r], image_id, text_id, weights,
            keys, of_rows[1][r], by_rows, by_columns, height, width, c.start, image.shape[1], **tiles,
        )  # fmt: skip
        _combine(by_rows, asked(found, by_rows, r), None, c.start, sigmoid)
        _combine(by_columns, asked(column_found, by_columns, c), rows[r], 0, sigmoid)
    if not shared:
        of_columns[1].index_copy_(0, rows, of_rows[1])
        right = of_rows[1] if sigmoid else of_rows[1] * 2
    return lse - right, column_lse, lse, of_rows, of_columns, drawn, column_score, column_drawn


def backward(
    grad: Tensor, column_grad: Tensor, image: Tensor, text: Tensor, log_scale: Tensor, bias: Tensor | None,
    rows: Tensor, image_id: Tensor | None, text_id: Tensor | None, shared: bool, lse: Tensor, column_lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Same contract as :func:`.reference.backward`."""
    rows, image_id, text_id, grad, column_grad = _contiguous(rows, image_id, text_id, grad, column_grad)
    pairs = Pairs(rows, len(text), image_id, text_id, shared, bias is not None, lse.dtype)
    scale, weights = log_scale.exp().to(lse.dtype), pairs.share if shared else None
    a, b = _operands(image, text)
    tiles = _options("gradient_kernel", a, shared)
    written = torch.bfloat16 if a.dtype == torch.bfloat16 else lse.dtype

    def of_block(r: slice, c: slice) -> tuple[Tensor, Tensor | None]:
        height, width = len(rows[r]), len(pairs.columns[c])
        grid = ceil_div(height, tiles["BLOCK_M"]) * ceil_div(width, tiles["BLOCK_N"])
        out = a.new_empty((height, width), dtype=written)
        sums = None if bias is None else lse.new_empty(grid)
        dispatch.launch(
            gradient_kernel, (grid,), a[r], b[c], scale, bias, rows[r], image_id, text_id, weights, lse[r],
            column_lse[c], grad[r], column_grad[c], out, sums, height, width, c.start, image.shape[1], **tiles,
        )  # fmt: skip
        return out, None if sums is None else sums.sum()

    of_blocks = blocks(len(image), len(text), WRITTEN // written.itemsize, tiles["BLOCK_N"])
    return reference.gradients(image, text, scale, log_scale, of_blocks, of_block)
