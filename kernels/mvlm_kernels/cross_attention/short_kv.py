"""Short-KV kernels: image queries read text keys. One backward program owns one key sequence and head.

K and V stay on chip for one pass over the queries. The backward sees every key of a query at once, so
delta = sum_j p_ij dp_ij needs neither the output nor a pass before. dQ is written once per query tile, dK and dV once
at the end. With key_index a program loops over the query sequences that read its key sequence.

The backward forms scores transposed, (keys, queries). P^T and dS^T are then direct left operands of the products, which
took 130 registers instead of 255 on sm_80 and sm_90.

Legend: BLOCK_M query rows, BLOCK_N key rows, BLOCK_D >= D head width; b query sequence, kb key sequence, h head.
``tile_io.py`` says what the tuples hold.
"""
# pyright: reportArgumentType=false, reportOperatorIssue=false

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
    readers_of,
    rows_of,
    store_rows,
    transposed_probabilities,
)
from mvlm_kernels.language import cast, dot, reciprocal


@triton.jit(do_not_specialize=SIZES)
def short_kv_forward(
    q, k, v, out, lse_ptr, keys, order_ptr, cu_q_ptr, H, k_seqs, q_rows, k_rows, scale_log2, dropout,
    num_splits,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Output and log-sum-exp. Grid (B * H, splits); split s takes every num_splits-th query tile.

    GROUP query heads read one head of k and v.
    order_ptr: query sequences in the order of their key sequences, so that readers of one run side by side and find it
    in cache. q_rows and k_rows: rows per sequence of a dense side, all rows of a packed side.
    """
    b = tl.program_id(0) // H
    h = (tl.program_id(0) % H).to(tl.int64)
    if order_ptr is not None:
        b = tl.load(order_ptr + b)
    b = b.to(tl.int64)
    q_start, q_len = rows_of(cu_q_ptr, b, q_rows)
    kb, bad = key_sequence(keys, b, k_seqs)
    k_start, _, klen = key_rows(keys, kb, k_rows)
    # A sequence longer than its bound, or a wrong index. The output is NaN, because raising an error would wait for the
    # device.
    bad = bad | (klen > BLOCK_N)

    rn = tl.arange(0, BLOCK_N)
    exists = existing_keys(rn, klen, keys, kb)
    k_tile = load_rows(head_of(k, kb, k_start, h // GROUP, D), rn, k[2], exists, D, BLOCK_D)
    v_tile = load_rows(head_of(v, kb, k_start, h // GROUP, D), rn, v[2], exists, D, BLOCK_D)
    kt = tl.trans(k_tile)
    # Interpreted, a float argument is a Python float, which a product would round to float32. tl.full keeps float64.
    scale_log2 = tl.full((), scale_log2, ACC)

    q_base = head_of(q, b, q_start, h, D)
    out_base = head_of(out, b, q_start, h, D)
    lse_base = lse_of(lse_ptr, cu_q_ptr, b, q_start, h, H, q_rows)
    for tile in range(tl.program_id(1), tl.cdiv(q_len, BLOCK_M), num_splits):
        rm = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        inside = rm < q_len
        q_tile = load_rows(q_base, rm, q[2], inside, D, BLOCK_D)
        s = dot(q_tile, kt, tl.zeros((BLOCK_M, BLOCK_N), ACC), PRECISION)
        s = s * scale_log2
        s = tl.where(exists[None, :], s, -INF)
        m = tl.max(s, 1)
        m = tl.where(m == -INF, 0.0, m)  # without keys: p = exp2(-inf) = 0 instead of exp2(-inf + inf) = NaN
        p = tl.exp2(s - m[:, None])
        total = tl.sum(p, 1)
        if dropout is not None:
            p = p * kept(dropout, b, h, rm, 0, False, BLOCK_N, ACC)
        o = dot(cast(p, v_tile.dtype), v_tile, tl.zeros((BLOCK_M, BLOCK_D), ACC), PRECISION)
        # The product takes P before it is normalised, at most 1. The sum is normalised in the accumulator's dtype.
        o = o * reciprocal(tl.where(total == 0.0, 1.0, total))[:, None]
        lse = log_sum_exp(m, total)
        if keys[3] is not None or keys[4] is not None:
            o = tl.where(bad, float("nan"), o)
            lse = tl.where(bad, float("nan"), lse)
        store_rows(out_base, rm, out[2], inside, o, D, BLOCK_D)
        tl.store(lse_base + rm, lse, mask=inside)


@triton.jit
def reader_backward(
    dk_tile, dv_tile, k_tile, v_tile, exists, b, h, first, q, lse_ptr, do, dq, dk, cu_q_ptr, H, q_rows, scale,
    scale_log2, dropout, tile_splits,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the share of query sequence b, every tile_splits-th tile from the first, to dK and dV; write its dQ.

    k_tile, v_tile: all keys that b reads. dq, dk None: not needed.
    """
    q_start, q_len = rows_of(cu_q_ptr, b, q_rows)
    q_base = head_of(q, b, q_start, h, D)
    do_base = head_of(do, b, q_start, h, D)
    lse_base = lse_of(lse_ptr, cu_q_ptr, b, q_start, h, H, q_rows)
    for tile in range(first, tl.cdiv(q_len, BLOCK_M), tile_splits):
        rm = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        inside = rm < q_len
        q_tile = load_rows(q_base, rm, q[2], inside, D, BLOCK_D)
        do_tile = load_rows(do_base, rm, do[2], inside, D, BLOCK_D)
        lse = tl.load(lse_base + rm, mask=inside, other=0.0)
        pt = transposed_probabilities(k_tile, q_tile, lse, exists, scale_log2, ACC, PRECISION)
        used = pt  # what multiplies V: without those that a dropout drops
        if dropout is not None:
            factors = kept(dropout, b, h, rm, 0, True, k_tile.shape[0], ACC)
            used = pt * factors
        if dk is not None:
            dv_tile = dot(cast(used, do_tile.dtype), do_tile, dv_tile, PRECISION)
        dpt = dot(v_tile, tl.trans(do_tile), tl.zeros((k_tile.shape[0], BLOCK_M), ACC), PRECISION)
        if dropout is not None:
            dpt = dpt * factors
        delta = tl.sum(pt * dpt, 0)
        ds = pt * (dpt - delta[None, :])
        dst = cast(ds, q_tile.dtype)
        # The scale multiplies the sums dQ and dK in the accumulator's dtype. Scaling dS would round it once more.
        if dk is not None:
            dk_tile = dot(dst, q_tile, dk_tile, PRECISION)
        if dq is not None:
            dq_tile = dot(tl.trans(dst), k_tile, tl.zeros((BLOCK_M, BLOCK_D), ACC), PRECISION) * scale
            store_rows(head_of(dq, b, q_start, h, D), rm, dq[2], inside, dq_tile, D, BLOCK_D)
    return dk_tile, dv_tile


@triton.jit(do_not_specialize=SIZES)
def short_kv_backward(
    q, k, v, lse_ptr, do, dq, dk, dv, keys, order_ptr, spans_ptr, cu_q_ptr, H, q_rows, k_rows, scale, scale_log2,
    dropout, reader_splits, tile_splits, partial_size,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ, dK and dV; dq, or dk and dv, may be None. Grid (B' * key heads, reader_splits * tile_splits).

    spans (B', 3): key sequence kb, first, last; the query sequences order[first:last] read kb. Key sequences with more
    readers come first. Without an index both are None. Split s writes its part of dK and dV at s * partial_size
    elements. The GROUP query heads of a key head add up in their order.
    """
    kb = (tl.program_id(0) // (H // GROUP)).to(tl.int64)
    h = (tl.program_id(0) % (H // GROUP)).to(tl.int64)
    split = tl.program_id(1)
    first, last = 0, 1
    if spans_ptr is not None:
        kb, first, last = readers_of(spans_ptr, kb, split // tile_splits, reader_splits)
    k_start, stored, klen = key_rows(keys, kb, k_rows)
    rn = tl.arange(0, BLOCK_N)
    exists = existing_keys(rn, klen, keys, kb)
    k_tile = load_rows(head_of(k, kb, k_start, h, D), rn, k[2], exists, D, BLOCK_D)
    v_tile = load_rows(head_of(v, kb, k_start, h, D), rn, v[2], exists, D, BLOCK_D)
    dk_tile = tl.zeros((BLOCK_N, BLOCK_D), ACC)
    dv_tile = tl.zeros((BLOCK_N, BLOCK_D), ACC)
    scale_log2 = tl.full((), scale_log2, ACC)
    scale = tl.full((), scale, ACC)
    if spans_ptr is None and GROUP == 1:
        dk_tile, dv_tile = reader_backward(
            dk_tile, dv_tile, k_tile, v_tile, exists, kb, h, split, q, lse_ptr, do, dq, dk, cu_q_ptr, H, q_rows,
            scale, scale_log2, dropout, tile_splits, D, BLOCK_D, BLOCK_M, ACC, PRECISION,
        )  # fmt: skip
    else:
        for at in range(first * GROUP, last * GROUP):  # readers, and query heads of each
            b = kb
            if spans_ptr is not None:
                b = tl.load(order_ptr + at // GROUP)
            dk_tile, dv_tile = reader_backward(
                dk_tile, dv_tile, k_tile, v_tile, exists, b, h * GROUP + at % GROUP, split % tile_splits, q, lse_ptr,
                do, dq, dk, cu_q_ptr, H, q_rows, scale, scale_log2, dropout, tile_splits, D, BLOCK_D, BLOCK_M,
                ACC, PRECISION,
            )  # fmt: skip
    if dk is not None:
        dk_base = head_of(dk, kb, k_start, h, D) + split.to(tl.int64) * partial_size
        dv_base = head_of(dv, kb, k_start, h, D) + split.to(tl.int64) * partial_size
        store_rows(dk_base, rn, dk[2], rn < stored, dk_tile * scale, D, BLOCK_D)
        store_rows(dv_base, rn, dv[2], rn < stored, dv_tile, D, BLOCK_D)
        if keys[3] is not None:  # keys past the bound max_len_k are in no tile
            fill_nan(dk_base, dk[2], BLOCK_N, stored, BLOCK_N, D, BLOCK_D)
            fill_nan(dv_base, dv[2], BLOCK_N, stored, BLOCK_N, D, BLOCK_D)
