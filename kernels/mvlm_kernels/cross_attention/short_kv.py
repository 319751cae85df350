"""Short-KV kernels: image queries read text keys. One backward program owns one key sequence and head.

K and V stay on chip for one pass over the queries. The backward sees every key of a query at once, so
delta = sum_j p_ij dp_ij needs neither the output nor a pass before. dQ is written once per query tile, dK and dV once
at the end. With key_index a program loops over the query sequences that read its key sequence.

The same backward, run over tiles of a long key sequence, computes dK and dV for the short-Q family in two cases: with
key_index, where several query sequences may read one key sequence, and where ``short_q_backward`` has no tiles for a
single pass because it would spill registers.

The backward forms scores transposed, (keys, queries). P^T and dS^T are then direct left operands of the products. This
takes 130 registers instead of 255 on sm_80 and sm_90.

Legend: BLOCK_M query rows, BLOCK_N key rows, BLOCK_D >= D head width; b query sequence, kb key sequence, h head.
"""
# pyright: reportArgumentType=false

import triton
import triton.language as tl

from mvlm_kernels.cross_attention.tile_io import (
    INF,
    existing_keys,
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
def short_kv_forward(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, lengths_ptr, mask_ptr, index_ptr, cu_q_ptr, cu_k_ptr,
    stride_qb, stride_ql, stride_qh, stride_kb, stride_kl, stride_kh, stride_vb, stride_vl, stride_vh,
    H, q_seqs, k_seqs, q_rows, k_rows, mask_words, scale, scale_log2, num_splits,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Output and log-sum-exp. Grid (B * H, splits); split s takes every num_splits-th query tile.

    q_rows and k_rows: rows per sequence of a dense side, all rows of a packed side.
    """
    b = tl.program_id(0) // H
    h = (tl.program_id(0) % H).to(tl.int64)
    split = tl.program_id(1)
    q_start, q_len = rows_of(cu_q_ptr, b, q_rows)
    kb, bad = key_sequence(index_ptr, b, k_seqs)
    k_start, stored = rows_of(cu_k_ptr, kb, k_rows)
    klen = key_length(lengths_ptr, kb, stored)
    # A sequence longer than its bound, or a wrong index. The output is NaN, because raising an error would wait for the
    # device.
    bad = bad | (klen > BLOCK_N)

    rn = tl.arange(0, BLOCK_N)
    exists = existing_keys(rn, klen, mask_ptr, kb, mask_words)
    k = load_rows(k_ptr + kb * stride_kb + k_start * stride_kl + h * stride_kh, rn, stride_kl, exists, D, BLOCK_D)
    v = load_rows(v_ptr + kb * stride_vb + k_start * stride_vl + h * stride_vh, rn, stride_vl, exists, D, BLOCK_D)
    kt = tl.trans(k)
    # Interpreted, a float argument is a Python float, which a product would round to float32. tl.full keeps float64.
    scale_log2 = tl.full((), scale_log2, ACC)

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
        q = load_rows(q_base, rm, stride_ql, inside, D, BLOCK_D)
        s = dot(q, kt, tl.zeros((BLOCK_M, BLOCK_N), ACC), PRECISION) * scale_log2
        s = tl.where(exists[None, :], s, -INF)
        m = tl.max(s, 1)
        m = tl.where(m == -INF, 0.0, m)  # without keys: p = exp2(-inf) = 0 instead of exp2(-inf + inf) = NaN
        p = tl.exp2(s - m[:, None])
        total = tl.sum(p, 1)
        o = dot(cast(p, v.dtype), v, tl.zeros((BLOCK_M, BLOCK_D), ACC), PRECISION)
        # The product takes P before it is normalised, at most 1, and the division is in the accumulator's dtype.
        o = o / tl.where(total == 0.0, 1.0, total)[:, None]
        lse = log_sum_exp(m, total)
        if index_ptr is not None or cu_k_ptr is not None:
            o = tl.where(bad, float("nan"), o)
            lse = tl.where(bad, float("nan"), lse)
        store_rows(out_base + q_start * stride_ol, rm, stride_ol, inside, o, D, BLOCK_D)
        tl.store(lse_base + q_start + rm, lse, mask=inside)
    if cu_q_ptr is not None:
        leader = (b == 0) & (split == 0)
        fill_outside(out_base, stride_ol, cu_q_ptr, q_seqs, q_rows, leader, BLOCK_M, D, BLOCK_D)
        fill_lse_outside(lse_base, cu_q_ptr, q_seqs, q_rows, leader, BLOCK_M)


@triton.jit
def key_tile_backward(
    n0, kb, h, split, klen, k_base, v_base, dk_base, dv_base, k_end,
    q_ptr, out_ptr, lse_ptr, do_ptr, dq_ptr, mask_ptr, order_ptr, offsets_ptr, cu_q_ptr,
    stride_qb, stride_ql, stride_qh, stride_kl, stride_vl, stride_gb, stride_gl, stride_gh,
    H, q_rows, mask_words, scale, scale_log2, reader_splits, tile_splits,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr, WRITE_DQ: tl.constexpr, WRITE_DKV: tl.constexpr,
    ALL_KEYS: tl.constexpr,
):  # fmt: skip
    """Backward of one key tile, keys [n0, n0 + BLOCK_N) of key sequence kb.

    Writes dQ of every query sequence that reads kb, then dK and dV of the tile. ALL_KEYS: the tile holds all keys of
    kb, so dQ is complete and delta follows from P and dP. Otherwise delta needs the output, and WRITE_DQ is False.
    """
    rn = n0 + tl.arange(0, BLOCK_N)
    exists = existing_keys(rn, klen, mask_ptr, kb, mask_words)
    k = load_rows(k_base, rn, stride_kl, exists, D, BLOCK_D)
    v = load_rows(v_base, rn, stride_vl, exists, D, BLOCK_D)
    dk = tl.zeros((BLOCK_N, BLOCK_D), ACC)
    dv = tl.zeros((BLOCK_N, BLOCK_D), ACC)
    scale_log2 = tl.full((), scale_log2, ACC)
    scale = tl.full((), scale, ACC)
    stride_ol = H * D

    # A split takes chunk `split // tile_splits` of the readers, in the order of the stable sort, and every
    # tile_splits-th query tile of each. Without an index the only reader is the query sequence of the same number.
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
        q_start, q_len = rows_of(cu_q_ptr, b, q_rows)
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
            q = load_rows(q_base, rm, stride_ql, inside, D, BLOCK_D)
            do = load_rows(do_base, rm, stride_gl, inside, D, BLOCK_D)
            lse = tl.load(lse_base + rm, mask=inside, other=0.0)
            zeros = tl.zeros((BLOCK_N, BLOCK_M), ACC)
            st = dot(k, tl.trans(q), zeros, PRECISION) * scale_log2
            # where and not a product with 0: a query without keys has lse = -inf, so st - lse is inf.
            pt = tl.exp2(tl.where(exists[:, None], st - lse[None, :], -INF))
            if WRITE_DKV:
                dv = dot(cast(pt, do.dtype), do, dv, PRECISION)
            dpt = dot(v, tl.trans(do), zeros, PRECISION)
            if ALL_KEYS:
                delta = tl.sum(pt * dpt, 0)
            else:
                out = load_rows(out_ptr + out_offset, rm, stride_ol, inside, D, BLOCK_D)
                delta = tl.sum(widen(out, ACC) * widen(do, ACC), 1)
            dst = cast(pt * (dpt - delta[None, :]), q.dtype)
            # The scale multiplies the sums dQ and dK in the accumulator's dtype. Scaling dS would round it once more.
            if WRITE_DKV:
                dk = dot(dst, q, dk, PRECISION)
            if WRITE_DQ:
                dq = dot(tl.trans(dst), k, tl.zeros((BLOCK_M, BLOCK_D), ACC), PRECISION) * scale
                store_rows(dq_ptr + out_offset, rm, stride_ol, inside, dq, D, BLOCK_D)
    if WRITE_DKV:
        store_rows(dk_base, rn, stride_ol, rn < k_end, dk * scale, D, BLOCK_D)
        store_rows(dv_base, rn, stride_ol, rn < k_end, dv, D, BLOCK_D)


@triton.jit
def short_kv_backward(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, do_ptr, dq_ptr, dk_ptr, dv_ptr,
    lengths_ptr, mask_ptr, order_ptr, offsets_ptr, cu_q_ptr, cu_k_ptr,
    stride_qb, stride_ql, stride_qh, stride_kb, stride_kl, stride_kh, stride_vb, stride_vl, stride_vh,
    stride_gb, stride_gl, stride_gh,
    H, q_seqs, k_seqs, q_rows, k_rows, mask_words, scale, scale_log2, reader_splits, tile_splits, partial_size,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr, WRITE_DQ: tl.constexpr, WRITE_DKV: tl.constexpr,
    ALL_KEYS: tl.constexpr,
):  # fmt: skip
    """dQ, dK and dV. Grid (B' * H, reader_splits * tile_splits, key tiles); one key tile under ALL_KEYS.

    order and offsets invert key_index: the query sequences order[offsets[kb] : offsets[kb + 1]] read key sequence kb.
    Split s writes its part of dK and dV at s * partial_size elements into dk_ptr and dv_ptr.
    """
    kb = (tl.program_id(0) // H).to(tl.int64)
    h = (tl.program_id(0) % H).to(tl.int64)
    split = tl.program_id(1)
    k_start, stored = rows_of(cu_k_ptr, kb, k_rows)
    klen = key_length(lengths_ptr, kb, stored)
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
        key_tile_backward(
            0, kb, h, split, klen, k_base, v_base, dk_base, dv_base, stored,
            q_ptr, out_ptr, lse_ptr, do_ptr, dq_ptr, mask_ptr, order_ptr, offsets_ptr, cu_q_ptr,
            stride_qb, stride_ql, stride_qh, stride_kl, stride_vl, stride_gb, stride_gl, stride_gh,
            H, q_rows, mask_words, scale, scale_log2, reader_splits, tile_splits,
            D, BLOCK_D, BLOCK_M, BLOCK_N, ACC, PRECISION, WRITE_DQ, WRITE_DKV, ALL_KEYS,
        )  # fmt: skip
    else:
        for n0 in range(tl.program_id(2) * BLOCK_N, stored, tl.num_programs(2) * BLOCK_N):
            key_tile_backward(
                n0, kb, h, split, klen, k_base, v_base, dk_base, dv_base, stored,
                q_ptr, out_ptr, lse_ptr, do_ptr, dq_ptr, mask_ptr, order_ptr, offsets_ptr, cu_q_ptr,
                stride_qb, stride_ql, stride_qh, stride_kl, stride_vl, stride_gb, stride_gl, stride_gh,
                H, q_rows, mask_words, scale, scale_log2, reader_splits, tile_splits,
                D, BLOCK_D, BLOCK_M, BLOCK_N, ACC, PRECISION, WRITE_DQ, WRITE_DKV, ALL_KEYS,
            )  # fmt: skip
    # Each split has its own partial sums of dK and dV and fills their outside rows. dQ exists once.
    first_row = (kb == 0) & (tl.program_id(2) == 0)
    if cu_k_ptr is not None:
        if WRITE_DKV:
            if ALL_KEYS:  # keys past the bound max_len_k are in no tile; their gradients are NaN
                fill_rows(dk_base, stride_ol, BLOCK_N, stored, float("nan"), BLOCK_N, D, BLOCK_D)
                fill_rows(dv_base, stride_ol, BLOCK_N, stored, float("nan"), BLOCK_N, D, BLOCK_D)
            fill_outside(dk_ptr + grad_base, stride_ol, cu_k_ptr, k_seqs, k_rows, first_row, BLOCK_N, D, BLOCK_D)
            fill_outside(dv_ptr + grad_base, stride_ol, cu_k_ptr, k_seqs, k_rows, first_row, BLOCK_N, D, BLOCK_D)
    if cu_q_ptr is not None:
        if WRITE_DQ:
            leader = first_row & (split == 0)
            fill_outside(dq_ptr + h * D, stride_ol, cu_q_ptr, q_seqs, q_rows, leader, BLOCK_M, D, BLOCK_D)
