"""Short-Q kernels: text queries read image keys. One program owns one query sequence and head.

Q stays on chip for one pass over the keys with an online softmax (Milakov and Gimelshein, arXiv 1805.02867). The single
pass of ``short_q_backward`` finishes dK and dV of a key tile as it passes and keeps dQ in registers.

``short_q_backward_dq`` computes dQ alone, where ``long_kv_backward`` (``long_kv.py``) computes dK and dV.

Legend: BLOCK_M query rows, BLOCK_N key rows, BLOCK_D >= D head width; b query sequence, kb key sequence, h head.
``tile_io.py`` says what the tuples hold.
"""
# pyright: reportArgumentType=false

import triton
import triton.language as tl

from mvlm_kernels.cross_attention.tile_io import (
    INF,
    SIZES,
    existing_keys,
    fill_nan,
    head_of,
    kept,
    key_rows,
    key_sequence,
    load_rows,
    log_sum_exp,
    lse_of,
    rows_of,
    store_rows,
    transposed_probabilities,
)
from mvlm_kernels.language import cast, dot, reciprocal, widen


@triton.jit(do_not_specialize=SIZES)
def short_q_forward(
    q, k, v, out, lse_ptr, keys, order_ptr, cu_q_ptr, H, k_seqs, q_rows, k_rows, scale_log2, dropout,
    num_splits, partial_size, partial_lse_size,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Output and log-sum-exp. Grid (B * H, splits); split s takes every num_splits-th key tile.

    order_ptr: query sequences in the order of their key sequences, so that readers of one run side by side and find it
    in cache. Each split writes the output and log-sum-exp of its keys, at s * partial_size and s * partial_lse_size
    elements into the outputs. :func:`short_q_combine` joins them. GROUP query heads read one head of k and v.
    """
    b = tl.program_id(0) // H
    h = (tl.program_id(0) % H).to(tl.int64)
    if order_ptr is not None:
        b = tl.load(order_ptr + b)
    b = b.to(tl.int64)
    split = tl.program_id(1)
    q_start, q_len = rows_of(cu_q_ptr, b, q_rows)
    kb, bad = key_sequence(keys, b, k_seqs)
    k_start, _, klen = key_rows(keys, kb, k_rows)
    bad = bad | (q_len > BLOCK_M)  # longer than its bound: NaN, because raising an error would wait for the device

    rm = tl.arange(0, BLOCK_M)
    inside = rm < q_len
    q_tile = load_rows(head_of(q, b, q_start, h, D), rm, q[2], inside, D, BLOCK_D)
    k_base = head_of(k, kb, k_start, h // GROUP, D)
    v_base = head_of(v, kb, k_start, h // GROUP, D)
    scale_log2 = tl.full((), scale_log2, ACC)
    m = tl.full((BLOCK_M,), -INF, ACC)
    total = tl.zeros((BLOCK_M,), ACC)
    o = tl.zeros((BLOCK_M, BLOCK_D), ACC)
    for n0 in range(split * BLOCK_N, klen, num_splits * BLOCK_N):
        rn = n0 + tl.arange(0, BLOCK_N)
        exists = existing_keys(rn, klen, keys, kb)
        k_tile = load_rows(k_base, rn, k[2], exists, D, BLOCK_D)
        v_tile = load_rows(v_base, rn, v[2], exists, D, BLOCK_D)
        s = dot(q_tile, tl.trans(k_tile), tl.zeros((BLOCK_M, BLOCK_N), ACC), PRECISION)
        s = s * scale_log2
        s = tl.where(exists[None, :], s, -INF)
        m_new = tl.maximum(m, tl.max(s, 1))
        m_safe = tl.where(m_new == -INF, 0.0, m_new)  # no key yet: exp2(-inf - 0) = 0 instead of exp2(-inf + inf) = NaN
        p = tl.exp2(s - m_safe[:, None])
        shrink = tl.exp2(m - m_safe)  # rescales what was summed under the smaller maximum
        total = total * shrink + tl.sum(p, 1)
        if dropout is not None:
            p = p * kept(dropout, b, h, rm, n0, False, BLOCK_N, ACC)
        o = dot(cast(p, v_tile.dtype), v_tile, o * shrink[:, None], PRECISION)
        m = m_new
    o = o * reciprocal(tl.where(total == 0.0, 1.0, total))[:, None]
    lse = log_sum_exp(m, total)
    if keys[4] is not None or cu_q_ptr is not None:
        o = tl.where(bad, float("nan"), o)
        lse = tl.where(bad, float("nan"), lse)
    out_base = head_of(out, b, q_start, h, D) + split.to(tl.int64) * partial_size
    lse_base = lse_of(lse_ptr, cu_q_ptr, b, q_start, h, H, q_rows) + split.to(tl.int64) * partial_lse_size
    store_rows(out_base, rm, out[2], inside, o, D, BLOCK_D)
    tl.store(lse_base + rm, lse, mask=inside)
    if cu_q_ptr is not None:
        fill_nan(out_base, out[2], BLOCK_M, q_len, BLOCK_M, D, BLOCK_D)


@triton.jit(do_not_specialize=SIZES)
def short_q_combine(
    partial_ptr, partial_lse_ptr, out_ptr, lse_ptr, H, rows, lse_rows, num_splits, partial_size, partial_lse_size,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Join the splits of short_q_forward, in the order of the splits. Grid (row tiles, H).

    rows: B * Lq or Tq rows of the output, each of H heads. With lse_rows = Lq or Tq, the log-sum-exp of row r is at
    r // lse_rows * H * lse_rows + h * lse_rows + r % lse_rows.
    """
    h = tl.program_id(1).to(tl.int64)
    r = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = r < rows
    at = r // lse_rows * H * lse_rows + h * lse_rows + r % lse_rows
    m = tl.full((BLOCK_M,), -INF, ACC)
    total = tl.zeros((BLOCK_M,), ACC)
    o = tl.zeros((BLOCK_M, BLOCK_D), ACC)
    partial_ptr += h * D
    for _ in range(num_splits):
        lse = tl.load(partial_lse_ptr + at, mask=inside, other=-INF)
        x = load_rows(partial_ptr, r, H * D, inside, D, BLOCK_D)
        # A split's NaN marks a wrong index or length. tl.maximum would drop it by default.
        m_new = tl.maximum(m, lse, propagate_nan=tl.PropagateNan.ALL)
        m_safe = tl.where(m_new == -INF, 0.0, m_new)
        shrink = tl.exp2(m - m_safe)
        weight = tl.exp2(lse - m_safe)
        total = total * shrink + weight
        o = o * shrink[:, None] + x * weight[:, None]
        m = m_new
        partial_ptr += partial_size
        partial_lse_ptr += partial_lse_size
    o = o * reciprocal(tl.where(total == 0.0, 1.0, total))[:, None]
    store_rows(out_ptr + h * D, r, H * D, inside, o, D, BLOCK_D)
    tl.store(lse_ptr + at, log_sum_exp(m, total), mask=inside)


@triton.jit
def queries_backward(
    rm, q, out, lse_ptr, do, cu_q_ptr, b, h, H, q_rows, D: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr
):
    """Rows rm of query sequence b: Q, dO, log-sum-exp, delta, and the sequence's first row and length.

    delta = sum_j p_ij dp_ij = out . do. No program sees all keys of a query at once, so it comes from the output.
    """
    start, length = rows_of(cu_q_ptr, b, q_rows)
    inside = rm < length
    q_tile = load_rows(head_of(q, b, start, h, D), rm, q[2], inside, D, BLOCK_D)
    do_tile = load_rows(head_of(do, b, start, h, D), rm, do[2], inside, D, BLOCK_D)
    out_tile = load_rows(head_of(out, b, start, h, D), rm, out[2], inside, D, BLOCK_D)
    delta = tl.sum(widen(out_tile, ACC) * widen(do_tile, ACC), 1)
    lse = tl.load(lse_of(lse_ptr, cu_q_ptr, b, start, h, H, q_rows) + rm, mask=inside, other=0.0)
    return q_tile, do_tile, lse, delta, start, length


@triton.jit(do_not_specialize=SIZES)
def short_q_backward(
    q, k, v, out, lse_ptr, do, dq, dk, dv, keys, cu_q_ptr, H, q_rows, k_rows, scale, scale_log2, dropout,
    num_splits, partial_size,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dK, dV, and dQ unless it is None, in one pass, without key_index and grouped heads. Grid (B * H, splits).

    One tile holds every query and no other program reads the keys, so dK and dV of a key tile are complete. Split s
    takes every num_splits-th key tile and writes its part of dQ at s * partial_size elements.
    """
    b = (tl.program_id(0) // H).to(tl.int64)
    h = (tl.program_id(0) % H).to(tl.int64)
    split = tl.program_id(1)
    rm = tl.arange(0, BLOCK_M)
    q_tile, do_tile, lse, delta, q_start, q_len = queries_backward(
        rm, q, out, lse_ptr, do, cu_q_ptr, b, h, H, q_rows, D, BLOCK_D, ACC
    )
    k_start, stored, klen = key_rows(keys, b, k_rows)
    k_base = head_of(k, b, k_start, h, D)
    v_base = head_of(v, b, k_start, h, D)
    dk_base = head_of(dk, b, k_start, h, D)
    dv_base = head_of(dv, b, k_start, h, D)
    scale_log2 = tl.full((), scale_log2, ACC)
    scale = tl.full((), scale, ACC)
    dq_tile = tl.zeros((BLOCK_M, BLOCK_D), ACC)
    for n0 in range(split * BLOCK_N, stored, num_splits * BLOCK_N):  # gradients of padded keys are written too: zeros
        rn = n0 + tl.arange(0, BLOCK_N)
        exists = existing_keys(rn, klen, keys, b)
        k_tile = load_rows(k_base, rn, k[2], exists, D, BLOCK_D)
        v_tile = load_rows(v_base, rn, v[2], exists, D, BLOCK_D)
        pt = transposed_probabilities(k_tile, q_tile, lse, exists, scale_log2, ACC, PRECISION)
        dpt = dot(v_tile, tl.trans(do_tile), tl.zeros((BLOCK_N, BLOCK_M), ACC), PRECISION)
        used = pt
        if dropout is not None:
            factors = kept(dropout, b, h, rm, n0, True, BLOCK_N, ACC)
            used = pt * factors
            dpt = dpt * factors
        ds = pt * (dpt - delta[None, :])
        dst = cast(ds, q_tile.dtype)
        zeros = tl.zeros((BLOCK_N, BLOCK_D), ACC)
        dv_tile = dot(cast(used, do_tile.dtype), do_tile, zeros, PRECISION)
        store_rows(dv_base, rn, dv[2], rn < stored, dv_tile, D, BLOCK_D)
        dk_tile = dot(dst, q_tile, zeros, PRECISION) * scale
        store_rows(dk_base, rn, dk[2], rn < stored, dk_tile, D, BLOCK_D)
        if dq is not None:
            dq_tile = dot(tl.trans(dst), k_tile, dq_tile, PRECISION)
    if dq is not None:
        dq_base = head_of(dq, b, q_start, h, D) + split.to(tl.int64) * partial_size
        store_rows(dq_base, rm, dq[2], rm < q_len, dq_tile * scale, D, BLOCK_D)
        if cu_q_ptr is not None:  # queries past the bound max_len_q are in no tile
            fill_nan(dq_base, dq[2], BLOCK_M, q_len, BLOCK_M, D, BLOCK_D)


@triton.jit(do_not_specialize=SIZES)
def short_q_backward_dq(
    q, k, v, out, lse_ptr, do, dq, keys, order_ptr, cu_q_ptr, H, k_seqs, q_rows, k_rows, scale, scale_log2,
    dropout, num_splits, partial_size, num_tiles,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ alone. Grid (B * H * query tiles, splits); order, splits and GROUP as in the forward."""
    bh = tl.program_id(0) // num_tiles
    b = bh // H
    h = (bh % H).to(tl.int64)
    if order_ptr is not None:
        b = tl.load(order_ptr + b)
    b = b.to(tl.int64)
    split = tl.program_id(1)
    tile = tl.program_id(0) % num_tiles
    rm = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    q_tile, do_tile, lse, delta, q_start, q_len = queries_backward(
        rm, q, out, lse_ptr, do, cu_q_ptr, b, h, H, q_rows, D, BLOCK_D, ACC
    )
    kb, _ = key_sequence(keys, b, k_seqs)
    k_start, _, klen = key_rows(keys, kb, k_rows)
    k_base = head_of(k, kb, k_start, h // GROUP, D)
    v_base = head_of(v, kb, k_start, h // GROUP, D)
    scale_log2 = tl.full((), scale_log2, ACC)
    scale = tl.full((), scale, ACC)
    dq_tile = tl.zeros((BLOCK_M, BLOCK_D), ACC)
    for n0 in range(split * BLOCK_N, klen, num_splits * BLOCK_N):
        rn = n0 + tl.arange(0, BLOCK_N)
        exists = existing_keys(rn, klen, keys, kb)
        k_tile = load_rows(k_base, rn, k[2], exists, D, BLOCK_D)
        v_tile = load_rows(v_base, rn, v[2], exists, D, BLOCK_D)
        pt = transposed_probabilities(k_tile, q_tile, lse, exists, scale_log2, ACC, PRECISION)
        dpt = dot(v_tile, tl.trans(do_tile), tl.zeros((BLOCK_N, BLOCK_M), ACC), PRECISION)
        if dropout is not None:
            dpt = dpt * kept(dropout, b, h, rm, n0, True, BLOCK_N, ACC)
        ds = pt * (dpt - delta[None, :])
        dst = cast(ds, q_tile.dtype)
        dq_tile = dot(tl.trans(dst), k_tile, dq_tile, PRECISION)
    dq_base = head_of(dq, b, q_start, h, D) + split.to(tl.int64) * partial_size
    store_rows(dq_base, rm, dq[2], rm < q_len, dq_tile * scale, D, BLOCK_D)
    if cu_q_ptr is not None:  # queries past the bound max_len_q are in no tile: the first program writes their NaN
        promised = num_tiles * BLOCK_M
        fill_nan(dq_base, dq[2], promised, tl.where(tile == 0, q_len, promised), BLOCK_M, D, BLOCK_D)
