"""Short-Q kernels: text queries read image keys. One program owns one query sequence and head.

Q stays on chip for one pass over the keys with an online softmax (Milakov and Gimelshein, arXiv 1805.02867). The
backward finishes dK and dV of a key tile as it passes and keeps dQ in registers.

In two cases this backward writes dQ only, and ``short_kv_backward`` over tiles of the long key sequence writes dK and
dV: with key_index, where several query sequences add to one key sequence, and where a single pass has no tiles because
it would spill registers.

Legend: BLOCK_M query rows, BLOCK_N key rows, BLOCK_D >= D head width; b query sequence, kb key sequence, h head.
"""
# pyright: reportArgumentType=false

import triton
import triton.language as tl

from mvlm_kernels.cross_attention.tile_io import (
    INF,
    existing_keys,
    fill_lse,
    fill_lse_outside,
    fill_outside,
    fill_rows,
    key_length,
    key_sequence,
    load_rows,
    log_sum_exp,
    rows_of,
    store_rows,
)
from mvlm_kernels.language import cast, dot, widen


@triton.jit
def short_q_forward(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, lengths_ptr, mask_ptr, index_ptr, cu_q_ptr, cu_k_ptr,
    stride_qb, stride_ql, stride_qh, stride_kb, stride_kl, stride_kh, stride_vb, stride_vl, stride_vh,
    H, q_seqs, k_seqs, q_rows, k_rows, mask_words, scale, scale_log2, num_splits, partial_size, partial_lse_size,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Output and log-sum-exp. Grid (B * H, splits); split s takes every num_splits-th key tile.

    Each split writes the output and log-sum-exp of its keys, at s * partial_size and s * partial_lse_size elements into
    the outputs. :func:`short_q_combine` joins them.
    """
    b = (tl.program_id(0) // H).to(tl.int64)
    h = (tl.program_id(0) % H).to(tl.int64)
    split = tl.program_id(1)
    q_start, q_len = rows_of(cu_q_ptr, b, q_rows)
    kb, bad = key_sequence(index_ptr, b, k_seqs)
    k_start, stored = rows_of(cu_k_ptr, kb, k_rows)
    klen = key_length(lengths_ptr, kb, stored)
    bad = bad | (q_len > BLOCK_M)  # longer than its bound: NaN, because raising an error would wait for the device

    rm = tl.arange(0, BLOCK_M)
    inside = rm < q_len
    q = load_rows(q_ptr + b * stride_qb + q_start * stride_ql + h * stride_qh, rm, stride_ql, inside, D, BLOCK_D)
    k_base = k_ptr + kb * stride_kb + k_start * stride_kl + h * stride_kh
    v_base = v_ptr + kb * stride_vb + k_start * stride_vl + h * stride_vh
    scale_log2 = tl.full((), scale_log2, ACC)
    m = tl.full((BLOCK_M,), -INF, ACC)
    total = tl.zeros((BLOCK_M,), ACC)
    o = tl.zeros((BLOCK_M, BLOCK_D), ACC)
    for n0 in range(split * BLOCK_N, klen, num_splits * BLOCK_N):
        rn = n0 + tl.arange(0, BLOCK_N)
        exists = existing_keys(rn, klen, mask_ptr, kb, mask_words)
        k = load_rows(k_base, rn, stride_kl, exists, D, BLOCK_D)
        v = load_rows(v_base, rn, stride_vl, exists, D, BLOCK_D)
        s = dot(q, tl.trans(k), tl.zeros((BLOCK_M, BLOCK_N), ACC), PRECISION) * scale_log2
        s = tl.where(exists[None, :], s, -INF)
        m_new = tl.maximum(m, tl.max(s, 1))
        m_safe = tl.where(m_new == -INF, 0.0, m_new)  # no key yet: exp2(-inf - 0) = 0 instead of exp2(-inf + inf) = NaN
        p = tl.exp2(s - m_safe[:, None])
        shrink = tl.exp2(m - m_safe)  # rescales what was summed under the smaller maximum
        total = total * shrink + tl.sum(p, 1)
        o = dot(cast(p, v.dtype), v, o * shrink[:, None], PRECISION)
        m = m_new
    o = o / tl.where(total == 0.0, 1.0, total)[:, None]
    lse = log_sum_exp(m, total)
    if index_ptr is not None or cu_q_ptr is not None:
        o = tl.where(bad, float("nan"), o)
        lse = tl.where(bad, float("nan"), lse)
    stride_ol = H * D
    out_base = out_ptr + split.to(tl.int64) * partial_size + h * D
    lse_base = lse_ptr + split.to(tl.int64) * partial_lse_size + h * q_rows
    if cu_q_ptr is None:
        out_base += b * q_rows * stride_ol
        lse_base += b * H * q_rows
    store_rows(out_base + q_start * stride_ol, rm, stride_ol, inside, o, D, BLOCK_D)
    tl.store(lse_base + q_start + rm, lse, mask=inside)
    if cu_q_ptr is not None:
        fill_rows(out_base + q_start * stride_ol, stride_ol, BLOCK_M, q_len, float("nan"), BLOCK_M, D, BLOCK_D)
        fill_lse(lse_base + q_start, BLOCK_M, q_len, float("nan"), BLOCK_M)
        # Each split has its own partial result and fills the outside rows of that.
        fill_outside(out_base, stride_ol, cu_q_ptr, q_seqs, q_rows, b == 0, BLOCK_M, D, BLOCK_D)
        fill_lse_outside(lse_base, cu_q_ptr, q_seqs, q_rows, b == 0, BLOCK_M)


@triton.jit
def short_q_combine(
    partial_ptr, partial_lse_ptr, out_ptr, lse_ptr, H, rows, num_splits, partial_size, partial_lse_size, packed_rows,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Join the splits of short_q_forward, in the order of the splits. Grid (row tiles, H).

    rows: B * Lq or Tq rows of the output, each of H heads. With packed_rows = Lq or Tq, the log-sum-exp of row r is at
    r // packed_rows * H * packed_rows + h * packed_rows + r % packed_rows.
    """
    h = tl.program_id(1).to(tl.int64)
    r = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = r < rows
    at = r // packed_rows * H * packed_rows + h * packed_rows + r % packed_rows
    m = tl.full((BLOCK_M,), -INF, ACC)
    total = tl.zeros((BLOCK_M,), ACC)
    o = tl.zeros((BLOCK_M, BLOCK_D), ACC)
    for split in range(num_splits):
        lse = tl.load(partial_lse_ptr + split * partial_lse_size + at, mask=inside, other=-INF)
        x = load_rows(partial_ptr + split * partial_size + h * D, r, H * D, inside, D, BLOCK_D)
        # A split's NaN marks a wrong index or length. tl.maximum would drop it by default.
        m_new = tl.maximum(m, lse, propagate_nan=tl.PropagateNan.ALL)
        m_safe = tl.where(m_new == -INF, 0.0, m_new)
        shrink = tl.exp2(m - m_safe)
        weight = tl.exp2(lse - m_safe)
        total = total * shrink + weight
        o = o * shrink[:, None] + x * weight[:, None]
        m = m_new
    o = o / tl.where(total == 0.0, 1.0, total)[:, None]
    lse = log_sum_exp(m, total)
    store_rows(out_ptr + h * D, r, H * D, inside, o, D, BLOCK_D)
    tl.store(lse_ptr + at, lse, mask=inside)


@triton.jit
def short_q_backward(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, do_ptr, dq_ptr, dk_ptr, dv_ptr,
    lengths_ptr, mask_ptr, index_ptr, cu_q_ptr, cu_k_ptr,
    stride_qb, stride_ql, stride_qh, stride_kb, stride_kl, stride_kh, stride_vb, stride_vl, stride_vh,
    stride_gb, stride_gl, stride_gh,
    H, q_seqs, k_seqs, q_rows, k_rows, mask_words, scale, scale_log2, num_splits, partial_size,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr, WRITE_DQ: tl.constexpr, WRITE_DKV: tl.constexpr,
):  # fmt: skip
    """dQ, and dK and dV under WRITE_DKV. Grid (B * H, splits, query tiles).

    Split s takes every num_splits-th key tile and writes its part of dQ at s * partial_size elements. WRITE_DKV needs
    two things. There is no key_index, so that the program is the only reader of its key sequence. And there is one
    query tile, which holds every query, so that dK and dV of a key tile are complete.
    """
    b = (tl.program_id(0) // H).to(tl.int64)
    h = (tl.program_id(0) % H).to(tl.int64)
    split = tl.program_id(1)
    q_start, q_len = rows_of(cu_q_ptr, b, q_rows)
    kb, _ = key_sequence(index_ptr, b, k_seqs)
    k_start, stored = rows_of(cu_k_ptr, kb, k_rows)
    klen = key_length(lengths_ptr, kb, stored)
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
    scale_log2 = tl.full((), scale_log2, ACC)
    scale = tl.full((), scale, ACC)
    q = load_rows(q_ptr + b * stride_qb + q_start * stride_ql + h * stride_qh, rm, stride_ql, inside, D, BLOCK_D)
    do = load_rows(do_ptr + b * stride_gb + q_start * stride_gl + h * stride_gh, rm, stride_gl, inside, D, BLOCK_D)
    out = load_rows(out_ptr + out_offset, rm, stride_ol, inside, D, BLOCK_D)
    # delta = sum_j p_ij dp_ij = out . do. No program sees all keys of a query at once, so it comes from the output.
    delta = tl.sum(widen(out, ACC) * widen(do, ACC), 1)
    lse = tl.load(lse_base + rm, mask=inside, other=0.0)

    k_base = k_ptr + kb * stride_kb + k_start * stride_kl + h * stride_kh
    v_base = v_ptr + kb * stride_vb + k_start * stride_vl + h * stride_vh
    dq = tl.zeros((BLOCK_M, BLOCK_D), ACC)
    # dK and dV of padded keys are zeros and have to be written. dQ needs no key past the last one.
    end = stored if WRITE_DKV else klen
    for n0 in range(split * BLOCK_N, end, num_splits * BLOCK_N):
        rn = n0 + tl.arange(0, BLOCK_N)
        exists = existing_keys(rn, klen, mask_ptr, kb, mask_words)
        k = load_rows(k_base, rn, stride_kl, exists, D, BLOCK_D)
        v = load_rows(v_base, rn, stride_vl, exists, D, BLOCK_D)
        zeros = tl.zeros((BLOCK_N, BLOCK_M), ACC)
        st = dot(k, tl.trans(q), zeros, PRECISION) * scale_log2
        pt = tl.exp2(tl.where(exists[:, None], st - lse[None, :], -INF))
        dpt = dot(v, tl.trans(do), zeros, PRECISION)
        dst = cast(pt * (dpt - delta[None, :]), q.dtype)
        if WRITE_DKV:
            zeros_nd = tl.zeros((BLOCK_N, BLOCK_D), ACC)
            dv = dot(cast(pt, do.dtype), do, zeros_nd, PRECISION)
            store_rows(dv_ptr + grad_base, rn, stride_ol, rn < stored, dv, D, BLOCK_D)
            dk = dot(dst, q, zeros_nd, PRECISION) * scale
            store_rows(dk_ptr + grad_base, rn, stride_ol, rn < stored, dk, D, BLOCK_D)
        if WRITE_DQ:
            dq = dot(tl.trans(dst), k, dq, PRECISION)
    if WRITE_DQ:
        dq_base = dq_ptr + split.to(tl.int64) * partial_size
        store_rows(dq_base + out_offset, rm, stride_ol, inside, dq * scale, D, BLOCK_D)
        if cu_q_ptr is not None:
            leader = tl.program_id(2) == 0
            # Queries past the bound max_len_q are in no tile. One program writes NaN there.
            promised = tl.num_programs(2) * BLOCK_M
            overlong = tl.where(leader, q_len, promised)
            fill_rows(dq_base + out_offset, stride_ol, promised, overlong, float("nan"), BLOCK_M, D, BLOCK_D)
            first_program = (b == 0) & leader
            fill_outside(dq_base + h * D, stride_ol, cu_q_ptr, q_seqs, q_rows, first_program, BLOCK_M, D, BLOCK_D)
    if cu_k_ptr is not None:
        if WRITE_DKV:
            first_reader = (kb == 0) & (split == 0)
            fill_outside(dk_ptr + h * D, stride_ol, cu_k_ptr, k_seqs, k_rows, first_reader, BLOCK_N, D, BLOCK_D)
            fill_outside(dv_ptr + h * D, stride_ol, cu_k_ptr, k_seqs, k_rows, first_reader, BLOCK_N, D, BLOCK_D)
