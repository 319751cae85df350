# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
"""Triton kernels of ``qk_norm_rope`` and their launchers.

A tile is (heads, rows, D): some heads of some tokens. A program takes several groups of heads of the same tokens, whose
angles it reads once. Each value that is rotated meets its partner in the same lane, because a tile is held as two
halves, (heads, rows, D / 2) each: the first and the second of every pair.

Backward, a program walks over every n-th tile of its heads. It keeps its share of the sums for weights and biases in
registers, and a second kernel adds the shares in the order of the programs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mvlm_kernels import dispatch
from mvlm_kernels.arguments import compute_dtype
from mvlm_kernels.dispatch import ceil_div, power_of_two
from mvlm_kernels.language import accumulator, cast, quotient, sum_columns, walking, widen

WARPS = 4
# Values of sin, or of cos, of each half of the pairs that a lane holds: 16 bytes of a head in bfloat16.
HALVES, PAIRS = 8, 4
HEADS, HEADS_BACKWARD, HEADS_BACKWARD_NORM = 4, 2, 1
"""Most heads of a tile."""
REGISTERS, REGISTERS_NORM = 128, 168
"""Most of a thread, backward, for 4 and 3 programs of a multiprocessor: without a norm, and with one."""


@triton.jit
def of_part(values, part):
    """The value of q, of k or of v, from a tuple of theirs."""
    found = values[0]
    for i in tl.static_range(1, len(values)):
        if part == i:
            found = values[i]
    return found


@triton.jit
def load_pair(
    ptr, at, inside, OTHER: tl.constexpr, ACC: tl.constexpr, INTERLEAVED: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """First and second value of each pair of rows of D, (X, Y, BLOCK_D) each, in ACC.

    at: offsets of the rows, (X, Y, 1). Values of rows not inside, and past the last pair, are OTHER.
    """
    if INTERLEAVED:
        d = tl.arange(0, 2 * BLOCK_D)[None, None, :]
        x = tl.load(ptr + at + d, mask=inside & (d < D), other=OTHER)
        a, b = tl.split(tl.reshape(x, (x.shape[0], x.shape[1], BLOCK_D, 2)))
    else:
        d = tl.arange(0, BLOCK_D)[None, None, :]
        exists = inside & (d < D // 2)
        a = tl.load(ptr + at + d, mask=exists, other=OTHER)
        b = tl.load(ptr + at + D // 2 + d, mask=exists, other=OTHER)
    return widen(a, ACC), widen(b, ACC)


@triton.jit
def store_pair(ptr, at, inside, a, b, INTERLEAVED: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    a = cast(a, ptr.dtype.element_ty)
    b = cast(b, ptr.dtype.element_ty)
    if INTERLEAVED:
        d = tl.arange(0, 2 * BLOCK_D)[None, None, :]
        x = tl.reshape(tl.join(a, b), (a.shape[0], a.shape[1], 2 * BLOCK_D))
        tl.store(ptr + at + d, x, mask=inside & (d < D))
    else:
        d = tl.arange(0, BLOCK_D)[None, None, :]
        exists = inside & (d < D // 2)
        tl.store(ptr + at + d, a, mask=exists)
        tl.store(ptr + at + D // 2 + d, b, mask=exists)


@triton.jit
def load_vector(ptrs, part, ACC: tl.constexpr, INTERLEAVED: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """The vector (D,) of q or of k in pairs, (1, 1, BLOCK_D) each."""
    start = tl.zeros((1, 1, 1), tl.int32)
    return load_pair(of_part(ptrs, part), start, start == 0, 0.0, ACC, INTERLEAVED, D, BLOCK_D)


@triton.jit
def load_angles(
    tables, table_sample, table_token, sample, token, PREFIX: tl.constexpr, ACC: tl.constexpr,
    INTERLEAVED: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """sin and cos of rows (BLOCK_R,) in pairs, (1, BLOCK_R, BLOCK_D) each. Angles of prefix tokens are 0."""
    at = (sample.to(tl.int64) * table_sample + (token - PREFIX).to(tl.int64) * table_token) * D
    at = at[None, :, None]
    turns = (token >= PREFIX)[None, :, None]
    sin = load_pair(tables[0], at, turns, 0.0, ACC, INTERLEAVED, D, BLOCK_D)
    cos = load_pair(tables[1], at, turns, 1.0, ACC, INTERLEAVED, D, BLOCK_D)
    return sin, cos


@triton.jit
def standardized(a, b, inside, eps, LAYER: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows without their mean, if LAYER, over their root mean square; and 1 over that, (X, Y, 1).

    Rows not inside are 0.
    """
    if LAYER:
        mean = tl.sum(a + b, axis=2, keep_dims=True) / D
        a -= mean
        b -= mean
        if D < 2 * BLOCK_D:
            exists = tl.arange(0, BLOCK_D)[None, None, :] < D // 2
            a = tl.where(exists, a, 0.0)
            b = tl.where(exists, b, 0.0)
    # With an eps of 0 rows that are not inside would be NaN.
    rstd = tl.where(inside, 1 / tl.sqrt(tl.sum(a * a + b * b, axis=2, keep_dims=True) / D + eps), 0.0)
    return a * rstd, b * rstd, rstd


@triton.jit(do_not_specialize=["table_sample", "table_token", "N", "R", "each"])
def norm_rope_kernel(
    qkv_ptr, outs, tables, weights, biases, table_sample, table_token, N, R, each, eps,
    NORM: tl.constexpr, INTERLEAVED: tl.constexpr, PREFIX: tl.constexpr, ACC: tl.constexpr,
    H: tl.constexpr, D: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """q and k (R, H, D) of outs from qkv (R, 3, H, D), contiguous. Grid (tiles of rows, splits).

    A program takes `each` groups of BLOCK_H heads of its rows, of the groups of q and then of k.

    tables: sin and cos, with their strides between samples and tokens in rows of D; weights and biases: of q and of k.
    Pointers that are None are not used.
    """
    GROUPS: tl.constexpr = H // BLOCK_H
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    row = r.to(tl.int64)[None, :, None]
    inside = (r < R)[None, :, None]
    if tables[0] is not None:
        sample = quotient(r, N)
        token = tl.where(r < R, r - sample * N, 0)
        sin, cos = load_angles(
            tables, table_sample, table_token, sample, token, PREFIX, ACC, INTERLEAVED, D, BLOCK_D
        )  # fmt: skip
    begin = tl.program_id(1) * each
    end = begin + each
    for part in range(begin // GROUPS, tl.cdiv(end, GROUPS)):
        if NORM != "" and weights[0] is not None:
            weight = load_vector(weights, part, ACC, INTERLEAVED, D, BLOCK_D)
        if NORM != "" and biases[0] is not None:
            bias = load_vector(biases, part, ACC, INTERLEAVED, D, BLOCK_D)
        for group in range(tl.maximum(begin, part * GROUPS), tl.minimum(end, (part + 1) * GROUPS)):
            h = (group - part * GROUPS) * BLOCK_H + tl.arange(0, BLOCK_H)[:, None, None]
            a, b = load_pair(qkv_ptr, ((row * 3 + part) * H + h) * D, inside, 0.0, ACC, INTERLEAVED, D, BLOCK_D)
            if NORM != "":
                a, b, _ = standardized(a, b, inside, eps, NORM == "layer", D, BLOCK_D)
                if weights[0] is not None:
                    a *= weight[0]
                    b *= weight[1]
                if biases[0] is not None:
                    a += bias[0]
                    b += bias[1]
            if tables[0] is not None:
                turned = a * cos[0] - b * sin[0]
                b = b * cos[1] + a * sin[1]
                a = turned
            store_pair(of_part(outs, part), (row * H + h) * D, inside, a, b, INTERLEAVED, D, BLOCK_D)


@triton.jit(
    do_not_specialize=[
        "q_sample", "k_sample", "v_sample", "q_token", "k_token", "v_token", "q_head", "k_head", "v_head",
        "table_sample", "table_token", "N", "R", "each",
    ]
)  # fmt: skip
def norm_rope_backward_kernel(
    grads, qkv_ptr, tables, weights, dqkv_ptr, partial_ptr, q_sample, k_sample, v_sample, q_token, k_token, v_token,
    q_head, k_head, v_head, table_sample, table_token, N, R, each, eps,
    NORM: tl.constexpr, INTERLEAVED: tl.constexpr, PREFIX: tl.constexpr, SUMS: tl.constexpr, ACC: tl.constexpr,
    H: tl.constexpr, D: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dqkv (R, 3, H, D), contiguous, from grads of q, k and v. Strides of grads and tables are in rows of D.

    partial (programs along rows * splits, SUMS, 2, D): sums of q and of k over rows and heads, first of the gradient
    times the norm, then of the gradient. Grid (programs along rows, 3 * splits). Program n takes tiles n,
    n + programs, ... of rows, and of each of them `each` groups of BLOCK_H heads.
    """
    GROUPS: tl.constexpr = H // BLOCK_H
    splits = GROUPS // each
    part = tl.program_id(1) // splits
    split = tl.program_id(1) % splits
    grad_ptr = of_part(grads, part)
    of_sample = of_part((q_sample, k_sample, v_sample), part)
    of_token = of_part((q_token, k_token, v_token), part)
    of_head = of_part((q_head, k_head, v_head), part)
    zero = tl.zeros((1, BLOCK_R, BLOCK_D), ACC)
    dw_a, dw_b, db_a, db_b = zero, zero, zero, zero
    for first in range(tl.program_id(0) * BLOCK_R, R, tl.num_programs(0) * BLOCK_R):
        r = first + tl.arange(0, BLOCK_R)
        row = r.to(tl.int64)[None, :, None]
        inside = (r < R)[None, :, None]
        sample = quotient(r, N)
        token = tl.where(r < R, r - sample * N, 0)
        at = sample.to(tl.int64) * of_sample + token.to(tl.int64) * of_token
        if tables[0] is not None:  # of v no angle is read
            sin, cos = load_angles(
                tables, table_sample, table_token, sample, tl.where(part < 2, token, -1), PREFIX, ACC, INTERLEAVED, D,
                BLOCK_D,
            )  # fmt: skip
        for group in range(split * each, (split + 1) * each):
            h = group * BLOCK_H + tl.arange(0, BLOCK_H)[:, None, None]
            a, b = load_pair(
                grad_ptr, (at[None, :, None] + h.to(tl.int64) * of_head) * D, inside, 0.0, ACC, INTERLEAVED, D, BLOCK_D
            )
            here = ((row * 3 + part) * H + h) * D
            if part < 2:
                if tables[0] is not None:
                    turned = a * cos[0] + b * sin[1]
                    b = b * cos[1] - a * sin[0]
                    a = turned
                if NORM != "":
                    x, y = load_pair(qkv_ptr, here, inside, 0.0, ACC, INTERLEAVED, D, BLOCK_D)
                    x, y, rstd = standardized(x, y, inside, eps, NORM == "layer", D, BLOCK_D)
                    if SUMS > 0:
                        dw_a += tl.sum(a * x, axis=0, keep_dims=True)
                        dw_b += tl.sum(b * y, axis=0, keep_dims=True)
                    if SUMS > 1:
                        db_a += tl.sum(a, axis=0, keep_dims=True)
                        db_b += tl.sum(b, axis=0, keep_dims=True)
                    if weights[0] is not None:  # read in each tile, which costs fewer registers
                        weight = load_vector(weights, part, ACC, INTERLEAVED, D, BLOCK_D)
                        a *= weight[0]
                        b *= weight[1]
                    along = tl.sum(a * x + b * y, axis=2, keep_dims=True) / D
                    if NORM == "layer":
                        mean = tl.sum(a + b, axis=2, keep_dims=True) / D
                        a -= mean
                        b -= mean
                    a = (a - x * along) * rstd
                    b = (b - y * along) * rstd
            store_pair(dqkv_ptr, here, inside, a, b, INTERLEAVED, D, BLOCK_D)
    if SUMS > 0:
        if part < 2:
            share = (tl.program_id(0).to(tl.int64) * splits + split) * SUMS * 2 * D + part * D
            share += tl.zeros((1, 1, 1), tl.int64)
            one = share >= 0
            of_all = tl.sum(dw_a, axis=1, keep_dims=True), tl.sum(dw_b, axis=1, keep_dims=True)
            store_pair(partial_ptr, share, one, of_all[0], of_all[1], INTERLEAVED, D, BLOCK_D)
            if SUMS > 1:
                of_all = tl.sum(db_a, axis=1, keep_dims=True), tl.sum(db_b, axis=1, keep_dims=True)
                store_pair(partial_ptr, share + 2 * D, one, of_all[0], of_all[1], INTERLEAVED, D, BLOCK_D)


def _tile(heads: int, width: int, interleaved: bool, most_heads: int) -> dict[str, int]:
    """Sizes of a tile of rows and heads, whose number divides theirs."""
    block_d, values = power_of_two(width // 2), PAIRS if interleaved else HALVES
    block_r = max(1, 32 * WARPS * values // block_d)
    return {"H": heads, "D": width, "BLOCK_H": min(heads & -heads, most_heads), "BLOCK_R": block_r, "BLOCK_D": block_d}


def _splits(groups: int, programs: int, device: torch.device) -> int:
    """Number of programs that share the `groups` of heads of a tile of rows, a divisor of it.

    All groups of a program share its values of sin and cos, so it is the least with two programs per multiprocessor.
    It depends on shape and device only, so every sum is taken in the same order in every run.
    """
    wanted = 2 * (dispatch.multiprocessors(device) or 132)
    return next(n for n in range(1, groups + 1) if groups % n == 0 and (n * programs >= wanted or n == groups))


def _tables(sin: Tensor | None, cos: Tensor | None) -> tuple[tuple[Tensor | None, ...], tuple[int, int]]:
    """sin and cos (N, D) or (B, N, D), and their strides between samples and between tokens, in rows of D."""
    if sin is None or cos is None:
        return (None, None), (0, 0)
    if sin.stride() != cos.stride() or not _in_rows(sin):
        sin, cos = sin.contiguous(), cos.contiguous()
    *of_samples, of_tokens = (stride // sin.shape[-1] for stride in sin.stride()[:-1])
    return (sin, cos), (of_samples[0] if of_samples else 0, of_tokens)


def _in_rows(x: Tensor) -> bool:
    """True if x (.., D) has rows that start at multiples of D: the kernels know by it how they are aligned."""
    return x.stride(-1) == 1 and all(stride % x.shape[-1] == 0 for stride in x.stride()[:-1])


def norm_rope(
    qkv: Tensor, sin: Tensor | None, cos: Tensor | None, q_weight: Tensor | None, k_weight: Tensor | None,
    q_bias: Tensor | None, k_bias: Tensor | None, eps: float, norm: str, interleaved: bool, prefix: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Same contract as :func:`.reference.norm_rope`."""
    *leading, tokens, _, heads, width = qkv.shape
    rows = torch.Size(leading).numel() * tokens
    q, k = (qkv.new_empty(*leading, tokens, heads, width) for _ in range(2))
    tile = _tile(heads, width, interleaved, HEADS)
    tables, strides = _tables(sin, cos)
    weights, biases = (tuple(v if v is None else v.contiguous() for v in both)
                       for both in ((q_weight, k_weight), (q_bias, k_bias)))  # fmt: skip
    groups = 2 * heads // tile["BLOCK_H"]
    tiles = ceil_div(rows, tile["BLOCK_R"])
    splits = _splits(groups, tiles, qkv.device)
    dispatch.launch(
        norm_rope_kernel, (tiles, splits), qkv.contiguous(), (q, k), tables, weights, biases, *strides, tokens, rows,
        groups // splits, eps, NORM=norm, INTERLEAVED=interleaved, PREFIX=prefix,
        ACC=accumulator(qkv.dtype), **tile, num_warps=WARPS, enable_fp_fusion=True,
    )  # fmt: skip
    return q, k


def norm_rope_backward(
    dq: Tensor, dk: Tensor, dv: Tensor, qkv: Tensor | None, sin: Tensor | None, cos: Tensor | None,
    q_weight: Tensor | None, k_weight: Tensor | None, eps: float, norm: str, interleaved: bool, prefix: int, sums: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Same contract as :func:`.reference.norm_rope_backward`."""
    *leading, tokens, heads, width = dq.shape
    rows, wide = torch.Size(leading).numel() * tokens, compute_dtype(dq.dtype)
    grads = tuple(x if _in_rows(x) else x.contiguous() for x in (dq, dk, dv))
    strides = [[0] * (4 - x.ndim) + [stride // width for stride in x.stride()[:-1]] for x in grads]
    tables, table_strides = _tables(sin, cos)
    tile = _tile(heads, width, interleaved, HEADS_BACKWARD_NORM if norm else HEADS_BACKWARD)
    groups = heads // tile["BLOCK_H"]
    limit = REGISTERS_NORM if norm else REGISTERS
    splits = _splits(groups, 3 * ceil_div(rows, tile["BLOCK_R"]), dq.device)
    grid, options = walking(
        norm_rope_backward_kernel, dq.device, rows, 3 * splits, NORM=norm, INTERLEAVED=interleaved, PREFIX=prefix,
        SUMS=sums, ACC=accumulator(dq.dtype), **tile, num_warps=WARPS, maxnreg=limit, enable_fp_fusion=True,
    )  # fmt: skip
    dqkv = dq.new_empty(*leading, tokens, 3, heads, width)
    partial_sums = dq.new_empty((grid[0] * splits, sums, 2, width), dtype=wide) if sums else None
    found = dq.new_empty((sums, 2, width), dtype=wide)
    weights = tuple(v if v is None else v.contiguous() for v in (q_weight, k_weight))
    dispatch.launch(
        norm_rope_backward_kernel, grid, grads, None if qkv is None else qkv.contiguous(), tables, weights, dqkv,
        partial_sums, *(stride for axis in zip(*strides, strict=True) for stride in axis), *table_strides, tokens, rows,
        groups // splits, eps, **options,
    )  # fmt: skip
    if partial_sums is not None:
        sum_columns(partial_sums, found, grid[0] * splits, found.numel())
    return dqkv, found
