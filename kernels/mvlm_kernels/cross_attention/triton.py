"""The two cross-attention kernel families, and the launchers that pick between them.

**Short-KV** (image queries read text keys): one program owns one K/V row and head; K and V stay on chip, one pass over
the queries. Its backward sees every key of a query at once, so delta = sum_j p_ij dp_ij needs neither the output nor a
pre-pass; dQ is written once per query tile, dK and dV once at the end. With key_index the program walks the queries
that read its row.

**Short-Q** (text queries read image keys): one program owns one query sequence and head; Q stays on chip, one pass over
the keys with an online softmax. Its backward finishes each dK/dV tile when it has read it and keeps dQ in registers.
With key_index several queries add to one row: a first kernel then writes dQ, and the short-KV backward, run over tiles
of the long row, writes dK and dV.

No atomics anywhere. Where a grid is too small for the machine, a fixed number of splits writes float32 partials that a
second kernel adds in a fixed order. Scores are formed transposed, (keys, queries), in the backward: P^T and dS^T are
then direct left operands, which on sm_80 and sm_90 is the difference between 130 and 255 registers.

Shape legend: BLOCK_M query rows, BLOCK_N key rows, BLOCK_D >= D head width; b query sequence, kb key sequence, h head.
Offsets inside one sequence are int32 (the launcher sees to it); bases are int64.
"""
# pyright: reportArgumentType=false

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mvlm_kernels import configs, dispatch
from mvlm_kernels.cross_attention.bounds import HEAD_WIDTHS, short_side
from mvlm_kernels.language import cast, dot, widen

# Constants of the kernels. No NaN among them: Triton compares these at every launch, and NaN is unequal to itself.
_INF = tl.constexpr(float("inf"))
_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _rows_of(cu_ptr, b, total):
    """First row and number of rows of sequence b: (0, total) dense, from cu_seqlens, kept inside the buffer, packed."""
    if cu_ptr is None:
        start = tl.zeros((), tl.int64)
        length = total
    else:
        start = tl.minimum(tl.maximum(tl.load(cu_ptr + b).to(tl.int64), 0), total)
        end = tl.minimum(tl.maximum(tl.load(cu_ptr + b + 1).to(tl.int64), start), total)
        length = (end - start).to(tl.int32)
    return start, length


@triton.jit
def _packed_end(cu_ptr, seqs, total):
    """First row behind the last sequence: a packed buffer is often rounded up to a bucket."""
    return tl.minimum(tl.maximum(tl.load(cu_ptr + seqs).to(tl.int64), 0), total)


@triton.jit
def _load_rows(ptr, rows, stride, inside, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """(rows, BLOCK_D) of a matrix with contiguous columns; zeros, and no access, outside."""
    cols = tl.arange(0, BLOCK_D)
    if D == BLOCK_D:
        mask = inside[:, None]
    else:
        mask = inside[:, None] & (cols[None, :] < D)
    return tl.load(ptr + rows[:, None] * stride + cols[None, :], mask=mask, other=0.0)


@triton.jit
def _store_rows(ptr, rows, stride, inside, x, D: tl.constexpr, BLOCK_D: tl.constexpr):
    cols = tl.arange(0, BLOCK_D)
    if D == BLOCK_D:
        mask = inside[:, None]
    else:
        mask = inside[:, None] & (cols[None, :] < D)
    tl.store(ptr + rows[:, None] * stride + cols[None, :], cast(x, ptr.dtype.element_ty), mask=mask)


@triton.jit
def _fill_rows(ptr, stride, start, end, value, BLOCK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows [start, end) that no tile covers: the rest of a bucket (0), or what lies past a bound that was promised
    (NaN).
    """
    for r0 in range(start, end, BLOCK):
        rows = r0 + tl.arange(0, BLOCK).to(tl.int64)
        _store_rows(ptr, rows, stride, rows < end, tl.full((BLOCK, BLOCK_D), value, tl.float32), D, BLOCK_D)


@triton.jit
def _fill_lse(ptr, start, end, value, BLOCK: tl.constexpr):
    for r0 in range(start, end, BLOCK):
        rows = r0 + tl.arange(0, BLOCK)
        tl.store(ptr + rows, tl.full((BLOCK,), value, tl.float32), mask=rows < end)


@triton.jit
def _existing_keys(rn, klen, mask_ptr, kb, mask_words):
    """bool (BLOCK_N,), True = the key exists: below the length, and its bit set in the row's 64-bit words."""
    exists = rn < klen
    if mask_ptr is not None:
        word = tl.load(mask_ptr + kb * mask_words + rn // 64, mask=exists, other=0)
        exists = exists & (((word >> (rn % 64).to(tl.int64)) & 1) != 0)
    return exists


@triton.jit
def _log_sum_exp(m, total):
    """log2(total * 2^m), base 2 all the way to the backward: a change of base would round P once more. -inf without
    keys.
    """
    empty = total == 0.0
    return tl.where(empty, -_INF, m + tl.log2(tl.where(empty, 1.0, total)))


@triton.jit
def _key_row(index_ptr, b, k_seqs):
    """The K/V sequence that query sequence b reads, and whether the index was outside (then row 0, and NaN results)."""
    if index_ptr is None:
        kb = b.to(tl.int64)
        bad = kb < 0
    else:
        kb = tl.load(index_ptr + b).to(tl.int64)
        bad = (kb < 0) | (kb >= k_seqs)
        kb = tl.where(bad, 0, kb)
    return kb, bad


@triton.jit
def _key_length(lengths_ptr, kb, stored):
    klen = stored
    if lengths_ptr is not None:
        klen = tl.minimum(tl.maximum(tl.load(lengths_ptr + kb).to(tl.int32), 0), stored)
    return klen


@triton.jit
def short_kv_forward(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, lengths_ptr, mask_ptr, index_ptr, cu_q_ptr, cu_k_ptr,
    stride_qb, stride_ql, stride_qh, stride_kb, stride_kl, stride_kh, stride_vb, stride_vl, stride_vh,
    H, q_seqs, k_seqs, q_rows, k_rows, mask_words, num_splits,
    SCALE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (B * H, splits). q_rows and k_rows are rows a sequence when dense, and rows in all when packed."""
    b = tl.program_id(0) // H
    h = (tl.program_id(0) % H).to(tl.int64)
    split = tl.program_id(1)
    q_start, q_len = _rows_of(cu_q_ptr, b, q_rows)
    kb, bad = _key_row(index_ptr, b, k_seqs)
    k_start, stored = _rows_of(cu_k_ptr, kb, k_rows)
    klen = _key_length(lengths_ptr, kb, stored)
    # A packed row longer than promised, or a wrong index, cannot be reported without a sync: it is NaN, never wrong.
    bad = bad | (klen > BLOCK_N)

    rn = tl.arange(0, BLOCK_N)
    exists = _existing_keys(rn, klen, mask_ptr, kb, mask_words)
    k = _load_rows(k_ptr + kb * stride_kb + k_start * stride_kl + h * stride_kh, rn, stride_kl, exists, D, BLOCK_D)
    v = _load_rows(v_ptr + kb * stride_vb + k_start * stride_vl + h * stride_vh, rn, stride_vl, exists, D, BLOCK_D)
    kt = tl.trans(k)
    scale_log2 = tl.full((), SCALE * _LOG2E, ACC)

    stride_ol = H * D
    out_base = out_ptr + h * D
    lse_base = lse_ptr + h * q_rows
    if cu_q_ptr is None:
        out_base += b.to(tl.int64) * q_rows * stride_ol
        lse_base += b.to(tl.int64) * H * q_rows
    q_base = q_ptr + b.to(tl.int64) * stride_qb + q_start * stride_ql + h * stride_qh
    for tile in range(split, tl.cdiv(q_len, BLOCK_M), num_splits):
        rm = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        inside = rm < q_len
        q = _load_rows(q_base, rm, stride_ql, inside, D, BLOCK_D)
        s = dot(q, kt, tl.zeros((BLOCK_M, BLOCK_N), ACC), PRECISION) * scale_log2
        s = tl.where(exists[None, :], s, -_INF)
        m = tl.max(s, 1)
        m = tl.where(m == -_INF, 0.0, m)  # no key: p = exp2(-inf) = 0, not exp2(NaN)
        p = tl.exp2(s - m[:, None])
        total = tl.sum(p, 1)
        o = dot(cast(p, v.dtype), v, tl.zeros((BLOCK_M, BLOCK_D), ACC), PRECISION)
        o = o / tl.where(total == 0.0, 1.0, total)[:, None]
        lse = _log_sum_exp(m, total)
        if index_ptr is not None or cu_k_ptr is not None:
            o = tl.where(bad, float("nan"), o)
            lse = tl.where(bad, float("nan"), lse)
        _store_rows(out_base + q_start * stride_ol, rm, stride_ol, inside, o, D, BLOCK_D)
        tl.store(lse_base + q_start + rm, lse, mask=inside)
    if cu_q_ptr is not None:
        tail_start = _packed_end(cu_q_ptr, q_seqs, q_rows)
        tail_end = tl.where((b == q_seqs - 1) & (split == 0), q_rows, tail_start)
        _fill_rows(out_base, stride_ol, tail_start, tail_end, 0.0, BLOCK_M, D, BLOCK_D)
        _fill_lse(lse_base, tail_start, tail_end, -_INF, BLOCK_M)


@triton.jit
def _backward_of_key_tile(
    n0, kb, h, split, klen, k_base, v_base, dk_base, dv_base, k_end,
    q_ptr, out_ptr, lse_ptr, do_ptr, dq_ptr, mask_ptr, order_ptr, offsets_ptr, cu_q_ptr,
    stride_qb, stride_ql, stride_qh, stride_kl, stride_vl, stride_gb, stride_gl, stride_gh,
    H, q_rows, mask_words, reader_splits, tile_splits,
    SCALE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr, WRITE_DQ: tl.constexpr, WRITE_DKV: tl.constexpr,
    ALL_KEYS: tl.constexpr,
):  # fmt: skip
    """Walks every query that reads keys [n0, n0 + BLOCK_N) of row kb, writing those queries' dQ and then the tile's dK
    and dV.

    ALL_KEYS: the tile holds the whole row, so dQ is complete and delta follows from P and dP alone; else delta needs
    the output.
    """
    rn = n0 + tl.arange(0, BLOCK_N)
    exists = _existing_keys(rn, klen, mask_ptr, kb, mask_words)
    k = _load_rows(k_base, rn, stride_kl, exists, D, BLOCK_D)
    v = _load_rows(v_base, rn, stride_vl, exists, D, BLOCK_D)
    dk = tl.zeros((BLOCK_N, BLOCK_D), ACC)
    dv = tl.zeros((BLOCK_N, BLOCK_D), ACC)
    scale_log2 = tl.full((), SCALE * _LOG2E, ACC)
    scale = tl.full((), SCALE, ACC)
    stride_ol = H * D

    # Readers of this row, in the order of the stable sort: chunk `split // tile_splits` of them, and of each reader's
    # query tiles every tile_splits-th. Without an index the row's one reader is its own query sequence.
    first = tl.zeros((), tl.int64)
    last = first + 1
    if order_ptr is not None:
        first = tl.load(offsets_ptr + kb)
        last = tl.load(offsets_ptr + kb + 1)
        chunk = tl.cdiv(last - first, reader_splits)
        first += split // tile_splits * chunk
        last = tl.minimum(last, first + chunk)
    if not ALL_KEYS:
        last = tl.where(n0 < klen, last, first)  # a tile of padded keys has zero gradients
    for reader in range(first, last):
        b = kb
        if order_ptr is not None:
            b = tl.load(order_ptr + reader)
        q_start, q_len = _rows_of(cu_q_ptr, b, q_rows)
        q_base = q_ptr + b * stride_qb + q_start * stride_ql + h * stride_qh
        do_base = do_ptr + b * stride_gb + q_start * stride_gl + h * stride_gh
        out_offset = q_start * stride_ol + h * D
        lse_base = lse_ptr + q_start + h * q_rows
        if cu_q_ptr is None:
            out_offset += b * q_rows * stride_ol
            lse_base += b * H * q_rows
        for tile in range(split % tile_splits, tl.cdiv(q_len, BLOCK_M), tile_splits):
            rm = tile * BLOCK_M + tl.arange(0, BLOCK_M)
            inside = rm < q_len
            q = _load_rows(q_base, rm, stride_ql, inside, D, BLOCK_D)
            do = _load_rows(do_base, rm, stride_gl, inside, D, BLOCK_D)
            lse = tl.load(lse_base + rm, mask=inside, other=0.0)
            zeros = tl.zeros((BLOCK_N, BLOCK_M), ACC)
            st = dot(k, tl.trans(q), zeros, PRECISION) * scale_log2
            # Not by a product: a row without keys has lse = -inf, and a masked score may overflow.
            pt = tl.exp2(tl.where(exists[:, None], st - lse[None, :], -_INF))
            if WRITE_DKV:
                dv = dot(cast(pt, do.dtype), do, dv, PRECISION)
            dpt = dot(v, tl.trans(do), zeros, PRECISION)
            if ALL_KEYS:
                delta = tl.sum(pt * dpt, 0)
            else:
                out = _load_rows(out_ptr + out_offset, rm, stride_ol, inside, D, BLOCK_D)
                delta = tl.sum(widen(out, ACC) * widen(do, ACC), 1)
            dst = cast(pt * (dpt - delta[None, :]), q.dtype)
            if WRITE_DKV:
                dk = dot(dst, q, dk, PRECISION)
            if WRITE_DQ:
                dq = dot(tl.trans(dst), k, tl.zeros((BLOCK_M, BLOCK_D), ACC), PRECISION) * scale
                _store_rows(dq_ptr + out_offset, rm, stride_ol, inside, dq, D, BLOCK_D)
    if WRITE_DKV:
        _store_rows(dk_base, rn, stride_ol, rn < k_end, dk * scale, D, BLOCK_D)
        _store_rows(dv_base, rn, stride_ol, rn < k_end, dv, D, BLOCK_D)


@triton.jit
def short_kv_backward(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, do_ptr, dq_ptr, dk_ptr, dv_ptr,
    lengths_ptr, mask_ptr, order_ptr, offsets_ptr, cu_q_ptr, cu_k_ptr,
    stride_qb, stride_ql, stride_qh, stride_kb, stride_kl, stride_kh, stride_vb, stride_vl, stride_vh,
    stride_gb, stride_gl, stride_gh,
    H, q_seqs, k_seqs, q_rows, k_rows, mask_words, reader_splits, tile_splits, partial_size,
    SCALE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr, WRITE_DQ: tl.constexpr, WRITE_DKV: tl.constexpr,
    ALL_KEYS: tl.constexpr,
):  # fmt: skip
    """Grid (B' * H, reader splits * tile splits, key tiles; one key tile under ALL_KEYS).

    order and offsets invert key_index: readers of row kb are order[offsets[kb] : offsets[kb + 1]]. Split s writes its
    share of dK and dV at s * partial_size elements into dk_ptr and dv_ptr.
    """
    kb = (tl.program_id(0) // H).to(tl.int64)
    h = (tl.program_id(0) % H).to(tl.int64)
    split = tl.program_id(1)
    k_start, stored = _rows_of(cu_k_ptr, kb, k_rows)
    klen = _key_length(lengths_ptr, kb, stored)
    stride_ol = H * D
    grad_base = split.to(tl.int64) * partial_size + h * D
    if cu_k_ptr is None:
        grad_base += kb * k_rows * stride_ol
    dk_base = None
    dv_base = None
    if WRITE_DKV:
        dk_base = dk_ptr + grad_base + k_start * stride_ol
        dv_base = dv_ptr + grad_base + k_start * stride_ol
    k_base = k_ptr + kb * stride_kb + k_start * stride_kl + h * stride_kh
    v_base = v_ptr + kb * stride_vb + k_start * stride_vl + h * stride_vh
    if ALL_KEYS:
        _backward_of_key_tile(
            0, kb, h, split, klen, k_base, v_base, dk_base, dv_base, stored,
            q_ptr, out_ptr, lse_ptr, do_ptr, dq_ptr, mask_ptr, order_ptr, offsets_ptr, cu_q_ptr,
            stride_qb, stride_ql, stride_qh, stride_kl, stride_vl, stride_gb, stride_gl, stride_gh,
            H, q_rows, mask_words, reader_splits, tile_splits,
            SCALE, D, BLOCK_D, BLOCK_M, BLOCK_N, ACC, PRECISION, WRITE_DQ, WRITE_DKV, ALL_KEYS,
        )  # fmt: skip
    else:
        for n0 in range(tl.program_id(2) * BLOCK_N, stored, tl.num_programs(2) * BLOCK_N):
            _backward_of_key_tile(
                n0, kb, h, split, klen, k_base, v_base, dk_base, dv_base, stored,
                q_ptr, out_ptr, lse_ptr, do_ptr, dq_ptr, mask_ptr, order_ptr, offsets_ptr, cu_q_ptr,
                stride_qb, stride_ql, stride_qh, stride_kl, stride_vl, stride_gb, stride_gl, stride_gh,
                H, q_rows, mask_words, reader_splits, tile_splits,
                SCALE, D, BLOCK_D, BLOCK_M, BLOCK_N, ACC, PRECISION, WRITE_DQ, WRITE_DKV, ALL_KEYS,
            )  # fmt: skip
    leader = (split == 0) & (tl.program_id(2) == 0)
    if cu_k_ptr is not None:
        if WRITE_DKV:
            if ALL_KEYS:  # a row longer than promised: its last keys are in no tile
                _fill_rows(dk_base, stride_ol, BLOCK_N, stored, float("nan"), BLOCK_N, D, BLOCK_D)
                _fill_rows(dv_base, stride_ol, BLOCK_N, stored, float("nan"), BLOCK_N, D, BLOCK_D)
            tail_start = _packed_end(cu_k_ptr, k_seqs, k_rows)
            tail_end = tl.where((kb == k_seqs - 1) & (tl.program_id(2) == 0), k_rows, tail_start)
            _fill_rows(dk_ptr + grad_base, stride_ol, tail_start, tail_end, 0.0, BLOCK_N, D, BLOCK_D)
            _fill_rows(dv_ptr + grad_base, stride_ol, tail_start, tail_end, 0.0, BLOCK_N, D, BLOCK_D)
    if cu_q_ptr is not None:
        if WRITE_DQ:
            q_tail = _packed_end(cu_q_ptr, q_seqs, q_rows)
            q_tail_end = tl.where((kb == 0) & leader, q_rows, q_tail)
            _fill_rows(dq_ptr + h * D, stride_ol, q_tail, q_tail_end, 0.0, BLOCK_M, D, BLOCK_D)


@triton.jit
def short_q_forward(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, lengths_ptr, mask_ptr, index_ptr, cu_q_ptr, cu_k_ptr,
    stride_qb, stride_ql, stride_qh, stride_kb, stride_kl, stride_kh, stride_vb, stride_vl, stride_vh,
    H, q_seqs, k_seqs, q_rows, k_rows, mask_words, num_splits, partial_size, partial_lse_size,
    SCALE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (B * H, splits). Split s takes every num_splits-th key tile and writes its own softmax at s partials into
    the outputs.
    """
    b = (tl.program_id(0) // H).to(tl.int64)
    h = (tl.program_id(0) % H).to(tl.int64)
    split = tl.program_id(1)
    q_start, q_len = _rows_of(cu_q_ptr, b, q_rows)
    kb, bad = _key_row(index_ptr, b, k_seqs)
    k_start, stored = _rows_of(cu_k_ptr, kb, k_rows)
    klen = _key_length(lengths_ptr, kb, stored)
    bad = bad | (q_len > BLOCK_M)

    rm = tl.arange(0, BLOCK_M)
    inside = rm < q_len
    q = _load_rows(q_ptr + b * stride_qb + q_start * stride_ql + h * stride_qh, rm, stride_ql, inside, D, BLOCK_D)
    k_base = k_ptr + kb * stride_kb + k_start * stride_kl + h * stride_kh
    v_base = v_ptr + kb * stride_vb + k_start * stride_vl + h * stride_vh
    scale_log2 = tl.full((), SCALE * _LOG2E, ACC)
    m = tl.full((BLOCK_M,), -_INF, ACC)
    total = tl.zeros((BLOCK_M,), ACC)
    o = tl.zeros((BLOCK_M, BLOCK_D), ACC)
    for n0 in range(split * BLOCK_N, klen, num_splits * BLOCK_N):
        rn = n0 + tl.arange(0, BLOCK_N)
        exists = _existing_keys(rn, klen, mask_ptr, kb, mask_words)
        k = _load_rows(k_base, rn, stride_kl, exists, D, BLOCK_D)
        v = _load_rows(v_base, rn, stride_vl, exists, D, BLOCK_D)
        s = dot(q, tl.trans(k), tl.zeros((BLOCK_M, BLOCK_N), ACC), PRECISION) * scale_log2
        s = tl.where(exists[None, :], s, -_INF)
        m_new = tl.maximum(m, tl.max(s, 1))
        m_safe = tl.where(m_new == -_INF, 0.0, m_new)  # nothing seen yet: exp2(-inf - 0) = 0, not exp2(NaN)
        p = tl.exp2(s - m_safe[:, None])
        shrink = tl.exp2(m - m_safe)
        total = total * shrink + tl.sum(p, 1)
        o = dot(cast(p, v.dtype), v, o * shrink[:, None], PRECISION)
        m = m_new
    o = o / tl.where(total == 0.0, 1.0, total)[:, None]
    lse = _log_sum_exp(m, total)
    if index_ptr is not None or cu_q_ptr is not None:
        o = tl.where(bad, float("nan"), o)
        lse = tl.where(bad, float("nan"), lse)
    stride_ol = H * D
    out_base = out_ptr + split.to(tl.int64) * partial_size + h * D
    lse_base = lse_ptr + split.to(tl.int64) * partial_lse_size + h * q_rows
    if cu_q_ptr is None:
        out_base += b * q_rows * stride_ol
        lse_base += b * H * q_rows
    _store_rows(out_base + q_start * stride_ol, rm, stride_ol, inside, o, D, BLOCK_D)
    tl.store(lse_base + q_start + rm, lse, mask=inside)
    if cu_q_ptr is not None:
        _fill_rows(out_base + q_start * stride_ol, stride_ol, BLOCK_M, q_len, float("nan"), BLOCK_M, D, BLOCK_D)
        _fill_lse(lse_base + q_start, BLOCK_M, q_len, float("nan"), BLOCK_M)
        tail_start = _packed_end(cu_q_ptr, q_seqs, q_rows)
        tail_end = tl.where(b == q_seqs - 1, q_rows, tail_start)
        _fill_rows(out_base, stride_ol, tail_start, tail_end, 0.0, BLOCK_M, D, BLOCK_D)
        _fill_lse(lse_base, tail_start, tail_end, -_INF, BLOCK_M)


@triton.jit
def short_q_combine(
    partial_ptr, partial_lse_ptr, out_ptr, lse_ptr, H, rows, num_splits, partial_size, partial_lse_size, packed_rows,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Grid (row tiles, H). Joins the splits of short_q_forward in the order of the splits.

    rows: B * Lq or Tq, rows of the output over which h varies fastest; the log-sum-exp of row r is at
    r // packed_rows * H * packed_rows + h * packed_rows + r % packed_rows, with packed_rows = Lq or Tq.
    """
    h = tl.program_id(1).to(tl.int64)
    r = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = r < rows
    at = r // packed_rows * H * packed_rows + h * packed_rows + r % packed_rows
    m = tl.full((BLOCK_M,), -_INF, ACC)
    total = tl.zeros((BLOCK_M,), ACC)
    o = tl.zeros((BLOCK_M, BLOCK_D), ACC)
    for split in range(num_splits):
        lse = tl.load(partial_lse_ptr + split * partial_lse_size + at, mask=inside, other=-_INF)
        x = _load_rows(partial_ptr + split * partial_size + h * D, r, H * D, inside, D, BLOCK_D)
        m_new = tl.maximum(m, lse, propagate_nan=tl.PropagateNan.ALL)
        m_safe = tl.where(m_new == -_INF, 0.0, m_new)
        shrink = tl.exp2(m - m_safe)
        weight = tl.exp2(lse - m_safe)
        total = total * shrink + weight
        o = o * shrink[:, None] + x * weight[:, None]
        m = m_new
    o = o / tl.where(total == 0.0, 1.0, total)[:, None]
    lse = _log_sum_exp(m, total)
    _store_rows(out_ptr + h * D, r, H * D, inside, o, D, BLOCK_D)
    tl.store(lse_ptr + at, lse, mask=inside)


@triton.jit
def short_q_backward(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, do_ptr, dq_ptr, dk_ptr, dv_ptr,
    lengths_ptr, mask_ptr, index_ptr, cu_q_ptr, cu_k_ptr,
    stride_qb, stride_ql, stride_qh, stride_kb, stride_kl, stride_kh, stride_vb, stride_vl, stride_vh,
    stride_gb, stride_gl, stride_gh,
    H, q_seqs, k_seqs, q_rows, k_rows, mask_words, num_splits, partial_size,
    SCALE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr, WRITE_DQ: tl.constexpr, WRITE_DKV: tl.constexpr,
):  # fmt: skip
    """Grid (B * H, splits, query tiles). Split s takes every num_splits-th key tile and writes its share of dQ at
    s * partial_size elements. Under WRITE_DKV there is one query tile, which holds every query.

    WRITE_DKV only without key_index, where the program is the one reader of its K/V row.
    """
    b = (tl.program_id(0) // H).to(tl.int64)
    h = (tl.program_id(0) % H).to(tl.int64)
    split = tl.program_id(1)
    q_start, q_len = _rows_of(cu_q_ptr, b, q_rows)
    kb, _ = _key_row(index_ptr, b, k_seqs)
    k_start, stored = _rows_of(cu_k_ptr, kb, k_rows)
    klen = _key_length(lengths_ptr, kb, stored)
    stride_ol = H * D

    rm = tl.arange(0, BLOCK_M)
    if not WRITE_DKV:
        rm += tl.program_id(2) * BLOCK_M
    inside = rm < q_len
    out_offset = h * D + q_start * stride_ol
    lse_base = lse_ptr + h * q_rows + q_start
    grad_base = h * D + k_start * stride_ol
    if cu_q_ptr is None:
        out_offset += b * q_rows * stride_ol
        lse_base += b * H * q_rows
    if cu_k_ptr is None:
        grad_base += kb * k_rows * stride_ol
    scale_log2 = tl.full((), SCALE * _LOG2E, ACC)
    scale = tl.full((), SCALE, ACC)
    q = _load_rows(q_ptr + b * stride_qb + q_start * stride_ql + h * stride_qh, rm, stride_ql, inside, D, BLOCK_D)
    do = _load_rows(do_ptr + b * stride_gb + q_start * stride_gl + h * stride_gh, rm, stride_gl, inside, D, BLOCK_D)
    out = _load_rows(out_ptr + out_offset, rm, stride_ol, inside, D, BLOCK_D)
    delta = tl.sum(widen(out, ACC) * widen(do, ACC), 1)
    lse = tl.load(lse_base + rm, mask=inside, other=0.0)

    k_base = k_ptr + kb * stride_kb + k_start * stride_kl + h * stride_kh
    v_base = v_ptr + kb * stride_vb + k_start * stride_vl + h * stride_vh
    dq = tl.zeros((BLOCK_M, BLOCK_D), ACC)
    # dK and dV of padded keys are zeros that somebody has to write; without them there is nothing past the last key.
    end = stored if WRITE_DKV else klen
    for n0 in range(split * BLOCK_N, end, num_splits * BLOCK_N):
        rn = n0 + tl.arange(0, BLOCK_N)
        exists = _existing_keys(rn, klen, mask_ptr, kb, mask_words)
        k = _load_rows(k_base, rn, stride_kl, exists, D, BLOCK_D)
        v = _load_rows(v_base, rn, stride_vl, exists, D, BLOCK_D)
        zeros = tl.zeros((BLOCK_N, BLOCK_M), ACC)
        st = dot(k, tl.trans(q), zeros, PRECISION) * scale_log2
        pt = tl.exp2(tl.where(exists[:, None], st - lse[None, :], -_INF))
        dpt = dot(v, tl.trans(do), zeros, PRECISION)
        dst = cast(pt * (dpt - delta[None, :]), q.dtype)
        if WRITE_DKV:
            zeros_nd = tl.zeros((BLOCK_N, BLOCK_D), ACC)
            dv = dot(cast(pt, do.dtype), do, zeros_nd, PRECISION)
            _store_rows(dv_ptr + grad_base, rn, stride_ol, rn < stored, dv, D, BLOCK_D)
            dk = dot(dst, q, zeros_nd, PRECISION) * scale
            _store_rows(dk_ptr + grad_base, rn, stride_ol, rn < stored, dk, D, BLOCK_D)
        if WRITE_DQ:
            dq = dot(tl.trans(dst), k, dq, PRECISION)
    if WRITE_DQ:
        dq_base = dq_ptr + split.to(tl.int64) * partial_size
        _store_rows(dq_base + out_offset, rm, stride_ol, inside, dq * scale, D, BLOCK_D)
        if cu_q_ptr is not None:
            leader = tl.program_id(2) == 0
            promised = tl.num_programs(2) * BLOCK_M
            overlong = tl.where(leader, q_len, promised)
            _fill_rows(dq_base + out_offset, stride_ol, promised, overlong, float("nan"), BLOCK_M, D, BLOCK_D)
            tail_start = _packed_end(cu_q_ptr, q_seqs, q_rows)
            tail_end = tl.where((b == q_seqs - 1) & leader, q_rows, tail_start)
            _fill_rows(dq_base + h * D, stride_ol, tail_start, tail_end, 0.0, BLOCK_M, D, BLOCK_D)
    if cu_k_ptr is not None:
        if WRITE_DKV:
            k_tail = _packed_end(cu_k_ptr, k_seqs, k_rows)
            k_tail_end = tl.where((kb == k_seqs - 1) & (split == 0), k_rows, k_tail)
            _fill_rows(dk_ptr + h * D, stride_ol, k_tail, k_tail_end, 0.0, BLOCK_N, D, BLOCK_D)
            _fill_rows(dv_ptr + h * D, stride_ol, k_tail, k_tail_end, 0.0, BLOCK_N, D, BLOCK_D)


@triton.jit
def sum_partials(partial_ptr, x_ptr, size, num_splits, BLOCK: tl.constexpr, ACC: tl.constexpr):
    """Grid (tiles,). x = partial[0] + partial[1] + ... in that order; partials are `size` elements apart."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    total = tl.zeros((BLOCK,), ACC)
    for split in range(num_splits):
        total += tl.load(partial_ptr + split * size + at, mask=inside, other=0.0)
    tl.store(x_ptr + at, cast(total, x_ptr.dtype.element_ty), mask=inside)


_TYPE_NAMES = {torch.bfloat16: "16bit", torch.float16: "16bit", torch.float32: "tf32"}
_MOST_SPLITS = 16
# These hold 99 KiB a block, the others 163 or more, and the widest tiles take 144.
_SMALL_SHARED_MEMORY = (86, 87, 89, 120, 121)


def _bucket(length: int) -> int:
    """Tile of the short side: a power of two, at least the 16 that a matrix instruction needs."""
    return max(16, triton.next_power_of_2(length))


def _readable(x: Tensor) -> Tensor:
    """x with contiguous columns and int32 offsets inside a sequence; a copy only where x has neither."""
    rows, stride = x.shape[-3], x.stride(-3)
    if x.stride(-1) == 1 and (rows * stride < 2**31 or x.is_contiguous()):
        return x
    return x.contiguous()


def _strides(x: Tensor, packed: bool) -> tuple[int, int, int]:
    """Strides of sequence, row and head; a packed tensor has no stride of sequences."""
    return (0, x.stride(0), x.stride(1)) if packed else (x.stride(0), x.stride(1), x.stride(2))


def _splits(programs: int, work: int, device: torch.device) -> int:
    """Into how many parts to cut the work of each program so that two programs a multiprocessor exist. A function of
    shape and device alone: the order of every sum is the same in every run.
    """
    wanted = triton.cdiv(2 * dispatch.multiprocessors(device), max(programs, 1))
    return max(1, min(wanted, work, _MOST_SPLITS))


def has_tiles(dtype: torch.dtype, width: int, short: int, arch: int) -> bool:
    """Whether tiles without spills exist for this type, head width and longest row of the short side."""
    block_d, bucket = triton.next_power_of_2(width), _bucket(short)
    if arch in _SMALL_SHARED_MEMORY and block_d * bucket > 64 * 128:
        return False
    key = f"short_kv_backward/{_TYPE_NAMES[dtype]}/{block_d}/{bucket}"
    return configs.has("cross_attention", arch, key)


class _Call:
    """Sizes, strides and constants that all kernels of one call share."""

    def __init__(self, q, k, v, key_lengths, mask_words, key_index, cu_q, cu_k, scale, max_len_q, max_len_k) -> None:
        self.q, self.k, self.v = _readable(q), _readable(k), _readable(v)
        self.H, self.D = q.shape[-2:]
        self.q_seqs = q.shape[0] if cu_q is None else cu_q.shape[0] - 1
        self.k_seqs = k.shape[0] if cu_k is None else cu_k.shape[0] - 1
        self.q_rows, self.k_rows = q.shape[-3], k.shape[-3]
        self.lengths, self.mask, self.index, self.cu_q, self.cu_k = key_lengths, mask_words, key_index, cu_q, cu_k
        self.mask_words = 0 if mask_words is None else mask_words.shape[1]
        self.max_len_q, self.max_len_k = max_len_q, max_len_k
        self.side = short_side(max_len_q, max_len_k)
        assert self.side is not None, "the public function sends long rows to SDPA"
        self.strides = _strides(self.q, cu_q is not None) + _strides(self.k, cu_k is not None)
        self.strides += _strides(self.v, cu_k is not None)
        self.sizes = (self.H, self.q_seqs, self.k_seqs, self.q_rows, self.k_rows, self.mask_words)
        self.arch = dispatch.arch(q.device)
        self.block_d = triton.next_power_of_2(self.D)
        self.acc = tl.float64 if q.dtype == torch.float64 else tl.float32
        self.acc_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        self.constants = {
            "SCALE": scale,
            "D": self.D,
            "BLOCK_D": self.block_d,
            "ACC": self.acc,
            "PRECISION": "tf32" if q.dtype == torch.float32 else "ieee",
            "enable_fp_fusion": True,
        }

    def _key(self, kernel: str, short: int) -> str:
        # The interpreter has no registers to run out of, so it takes every type through the tiles of the shipped ones.
        kind = "16bit" if self.q.device.type == "cpu" else _TYPE_NAMES[self.q.dtype]
        return f"{kernel}/{kind}/{self.block_d}/{_bucket(short)}"

    def tiles(self, kernel: str, short: int) -> dict[str, int]:
        return configs.lookup("cross_attention", self.arch, self._key(kernel, short))

    def has_tiles(self, kernel: str) -> bool:
        return configs.has("cross_attention", self.arch, self._key(kernel, self.max_len_q))

    def long_tiles(self, rows: int, seqs: int, longest: int, block: int) -> int:
        """Tiles of the long side a sequence: of the longest if known, else of the mean of a packed buffer."""
        return triton.cdiv(min(longest, rows) if longest >= 0 else triton.cdiv(rows, max(seqs, 1)), block)


def forward(
    q: Tensor, k: Tensor, v: Tensor, key_lengths: Tensor | None, mask_words: Tensor | None, key_index: Tensor | None,
    cu_q: Tensor | None, cu_k: Tensor | None, scale: float, max_len_q: int, max_len_k: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output, contiguous in q's shape, and log-sum-exp in float32 and base 2, (B, H, Lq) or packed (H, Tq).

    max_len_q and max_len_k: longest row of each side, known to the host; that of the long side may be negative,
    unknown.
    """
    c = _Call(q, k, v, key_lengths, mask_words, key_index, cu_q, cu_k, scale, max_len_q, max_len_k)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse_shape = (c.H, c.q_rows) if cu_q is not None else (c.q_seqs, c.H, c.q_rows)
    lse = torch.empty(lse_shape, dtype=c.acc_dtype, device=q.device)
    inputs = (key_lengths, mask_words, key_index, cu_q, cu_k, *c.strides, *c.sizes)
    programs = c.q_seqs * c.H
    if programs == 0:
        return out.zero_(), lse.fill_(-torch.inf)
    if c.side == "kv":
        tiles = c.tiles("short_kv_forward", max_len_k)
        splits = _splits(programs, c.long_tiles(c.q_rows, c.q_seqs, max_len_q, tiles["BLOCK_M"]), q.device)
        meta = c.constants | tiles | {"BLOCK_N": _bucket(max_len_k)}
        dispatch.launch(short_kv_forward, (programs, splits), c.q, c.k, c.v, out, lse, *inputs, splits, **meta)
        return out, lse
    tiles = c.tiles("short_q_forward", max_len_q)
    meta = c.constants | tiles | {"BLOCK_M": _bucket(max_len_q)}
    splits = _splits(programs, c.long_tiles(c.k_rows, c.k_seqs, max_len_k, tiles["BLOCK_N"]), q.device)
    grid = (programs, splits)
    if splits == 1:
        dispatch.launch(short_q_forward, grid, c.q, c.k, c.v, out, lse, *inputs, 1, 0, 0, **meta)
        return out, lse
    partial = torch.empty((splits, *out.shape), dtype=c.acc_dtype, device=q.device)
    partial_lse = torch.empty((splits, *lse.shape), dtype=c.acc_dtype, device=q.device)
    sizes = (out.numel(), lse.numel())
    dispatch.launch(short_q_forward, grid, c.q, c.k, c.v, partial, partial_lse, *inputs, splits, *sizes, **meta)
    rows = out.numel() // (c.H * c.D)
    dispatch.launch(
        short_q_combine, (triton.cdiv(rows, 16), c.H), partial, partial_lse, out, lse, c.H, rows, splits, *sizes,
        c.q_rows, D=c.D, BLOCK_D=c.block_d, BLOCK_M=16, ACC=c.acc, num_warps=4, num_stages=1, enable_fp_fusion=True,
    )  # fmt: skip
    return out, lse


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor | None, lse: Tensor, key_lengths: Tensor | None,
    mask_words: Tensor | None, key_index: Tensor | None, cu_q: Tensor | None, cu_k: Tensor | None, scale: float,
    max_len_q: int, max_len_k: int, need_dq: bool, need_dkv: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of q, k, v, contiguous in their shapes, None where not needed. Only the short-Q family reads out."""
    c = _Call(q, k, v, key_lengths, mask_words, key_index, cu_q, cu_k, scale, max_len_q, max_len_k)
    grad = _readable(grad)
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device) if need_dq else None
    dk = torch.empty(k.shape, dtype=k.dtype, device=k.device) if need_dkv else None
    dv = torch.empty(k.shape, dtype=k.dtype, device=k.device) if need_dkv else None
    if c.q_seqs == 0 or c.k_seqs == 0 or c.H == 0:
        return tuple(x if x is None else x.zero_() for x in (dq, dk, dv))  # type: ignore[return-value]
    if c.side == "kv":
        _short_kv_backward(c, grad, None, lse, dq, dk, dv)
    elif key_index is None and c.has_tiles("short_q_backward"):
        _short_q_backward(c, grad, out, lse, dq, dk, dv)
    else:
        # Several queries add to one K/V row, or one pass over it would spill: dQ first, then dK and dV tile by tile.
        if need_dq:
            _short_q_backward(c, grad, out, lse, dq, None, None)
        if need_dkv:
            _short_kv_backward(c, grad, out, lse, None, dk, dv)
    return dq, dk, dv


def _short_kv_backward(
    c: _Call, grad: Tensor, out: Tensor | None, lse: Tensor, dq: Tensor | None, dk: Tensor | None, dv: Tensor | None
) -> None:
    all_keys = c.side == "kv"
    order = offsets = None
    if c.index is not None:
        order, offsets = inverse_index(c.index, c.k_seqs)
    if all_keys:
        tiles = c.tiles("short_kv_backward", c.max_len_k) | {"BLOCK_N": _bucket(c.max_len_k)}
        key_tiles = 1
    else:
        tiles = c.tiles("long_kv_backward", c.max_len_q)
        key_tiles = min(c.long_tiles(c.k_rows, c.k_seqs, c.max_len_k, tiles["BLOCK_N"]), 65535)
    programs = c.k_seqs * c.H * max(key_tiles, 1)
    query_tiles = c.long_tiles(c.q_rows, c.q_seqs, c.max_len_q, tiles["BLOCK_M"])
    tile_splits = _splits(programs, query_tiles, grad.device)
    reader_splits = 1 if order is None else _splits(programs * tile_splits, c.q_seqs, grad.device)
    splits = tile_splits * reader_splits
    dk_out, dv_out, size = dk, dv, 0
    if splits > 1 and dk is not None:
        size = dk.numel()
        dk_out = torch.empty((splits, size), dtype=c.acc_dtype, device=grad.device)
        dv_out = torch.empty((splits, size), dtype=c.acc_dtype, device=grad.device)
    dispatch.launch(
        short_kv_backward, (c.k_seqs * c.H, splits, key_tiles), c.q, c.k, c.v, out, lse, grad, dq, dk_out, dv_out,
        c.lengths, c.mask, order, offsets, c.cu_q, c.cu_k, *c.strides, *_strides(grad, c.cu_q is not None), *c.sizes,
        reader_splits, tile_splits, size, WRITE_DQ=dq is not None, WRITE_DKV=dk is not None, ALL_KEYS=all_keys,
        **c.constants, **tiles,
    )  # fmt: skip
    if dk is not None and dv is not None and splits > 1:
        _sum_partials(c, dk_out, dk, splits)
        _sum_partials(c, dv_out, dv, splits)


def _short_q_backward(
    c: _Call, grad: Tensor, out: Tensor | None, lse: Tensor, dq: Tensor | None, dk: Tensor | None, dv: Tensor | None
) -> None:
    if dk is not None:
        tiles = c.tiles("short_q_backward", c.max_len_q) | {"BLOCK_M": _bucket(c.max_len_q)}
    else:
        tiles = c.tiles("short_q_backward_dq", c.max_len_q)
    query_tiles = triton.cdiv(_bucket(c.max_len_q), tiles["BLOCK_M"])
    key_tiles = c.long_tiles(c.k_rows, c.k_seqs, c.max_len_k, tiles["BLOCK_N"])
    splits = _splits(c.q_seqs * c.H * query_tiles, key_tiles, grad.device)
    dq_out, size = dq, 0
    if splits > 1 and dq is not None:
        size = dq.numel()
        dq_out = torch.empty((splits, size), dtype=c.acc_dtype, device=grad.device)
    dispatch.launch(
        short_q_backward, (c.q_seqs * c.H, splits, query_tiles), c.q, c.k, c.v, out, lse, grad, dq_out, dk, dv,
        c.lengths, c.mask, c.index, c.cu_q, c.cu_k, *c.strides, *_strides(grad, c.cu_q is not None), *c.sizes,
        splits, size, WRITE_DQ=dq is not None, WRITE_DKV=dk is not None, **c.constants, **tiles,
    )  # fmt: skip
    if dq is not None and splits > 1:
        _sum_partials(c, dq_out, dq, splits)


def _sum_partials(c: _Call, partial: Tensor | None, x: Tensor, splits: int) -> None:
    block = 1024
    dispatch.launch(
        sum_partials, (triton.cdiv(x.numel(), block),), partial, x, x.numel(), splits,
        BLOCK=block, ACC=c.acc, num_warps=4, num_stages=1, enable_fp_fusion=True,
    )  # fmt: skip


def inverse_index(key_index: Tensor, k_seqs: int) -> tuple[Tensor, Tensor]:
    """order (B,) and offsets (B' + 1,), int64: the queries that read row r are order[offsets[r] : offsets[r + 1]],
    ascending.

    Indices outside [0, B') count as the nearest row, so that every query has one program that writes its gradient (NaN
    then).
    """
    rows, order = torch.sort(key_index.clamp(0, k_seqs - 1), stable=True)
    bounds = torch.arange(k_seqs + 1, dtype=rows.dtype, device=rows.device)
    return order, torch.searchsorted(rows, bounds)


def aot_cases() -> Iterator[tuple[str, Callable[[], Any]]]:
    """What :mod:`mvlm_kernels.aot` compiles: (label, call of the launchers on meta tensors). Labels are
    dtype/width/keys/variant.

    Every width, short length and type, dense with key_lengths as a padded batch has them; the other variants at width
    64.
    """
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        for width in HEAD_WIDTHS:
            for short in (16, 32, 64, 128):
                # Every table lists the same keys: what one target cannot hold, none takes.
                if has_tiles(dtype, width, short, 80):
                    yield f"{name}/{width}/{short}/lengths", partial(_aot_call, dtype, width, short, lengths=True)
    for variant in ("mask", "index", "packed", "splits"):
        yield f"bfloat16/64/32/{variant}", partial(_aot_call, torch.bfloat16, 64, 32, **{variant: True})


def _aot_call(
    dtype: torch.dtype, width: int, short: int, *, lengths: bool = False, mask: bool = False, index: bool = False,
    packed: bool = False, splits: bool = False,
) -> None:  # fmt: skip
    """Forward and backward of both families: 197 patches against `short` text rows, and the other way round."""
    batch, heads, patches = 2 if splits else 256, 12, 197
    meta = partial(torch.empty, device="meta")
    ints = partial(meta, dtype=torch.int32)
    for len_q, len_k in ((patches, short), (short, patches)):
        text_q, text_k = packed and len_q == short, packed and len_k == short
        q = meta((batch * 24, heads, width) if text_q else (batch, len_q, heads, width), dtype=dtype)
        k, v = (
            meta((batch * 24, heads, width) if text_k else (batch, len_k, heads, width), dtype=dtype) for _ in range(2)
        )
        sides = (
            ints(batch) if lengths else None,
            meta((batch, (len_k + 63) // 64), dtype=torch.int64) if mask else None,
            ints(batch) if index else None,
            ints(batch + 1) if text_q else None,
            ints(batch + 1) if text_k else None,
        )
        bounds = (width**-0.5, len_q, len_k)
        out, lse = forward(q, k, v, *sides, *bounds)
        backward(out, q, k, v, out, lse, *sides, *bounds, True, True)
