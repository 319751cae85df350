"""Long-KV kernel: dK and dV of image keys that text queries read, one program per tile of keys.

It runs where the single pass of ``short_q_backward`` does not: with key_index and with grouped heads, where several
sequences or heads of queries read the same keys, and for shapes whose single pass would spill registers.
``short_q_backward_dq`` computes dQ then.

Legend: BLOCK_M query rows, BLOCK_N key rows, BLOCK_D >= D head width; b query sequence, kb key sequence, h head.
``tile_io.py`` says what the tuples hold.
"""
# pyright: reportArgumentType=false, reportOperatorIssue=false

import triton
import triton.language as tl

from mvlm_kernels.cross_attention.tile_io import (
    SIZES,
    existing_keys,
    head_of,
    kept,
    key_rows,
    load_rows,
    lse_of,
    readers_of,
    rows_of,
    store_rows,
    transposed_probabilities,
)
from mvlm_kernels.language import cast, dot, widen


@triton.jit
def reader_backward_of_keys(
    dk_tile, dv_tile, k_tile, v_tile, exists, n0, b, h, q, out, lse_ptr, do, cu_q_ptr, H, q_rows, scale_log2, dropout,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the share of query sequence b to dK and dV of a key tile. delta comes from the output."""
    q_start, q_len = rows_of(cu_q_ptr, b, q_rows)
    q_base = head_of(q, b, q_start, h, D)
    do_base = head_of(do, b, q_start, h, D)
    out_base = head_of(out, b, q_start, h, D)
    lse_base = lse_of(lse_ptr, cu_q_ptr, b, q_start, h, H, q_rows)
    for m0 in range(0, q_len, BLOCK_M):
        rm = m0 + tl.arange(0, BLOCK_M)
        inside = rm < q_len
        q_tile = load_rows(q_base, rm, q[2], inside, D, BLOCK_D)
        do_tile = load_rows(do_base, rm, do[2], inside, D, BLOCK_D)
        lse = tl.load(lse_base + rm, mask=inside, other=0.0)
        pt = transposed_probabilities(k_tile, q_tile, lse, exists, scale_log2, ACC, PRECISION)
        used = pt
        if dropout is not None:
            factors = kept(dropout, b, h, rm, n0, True, k_tile.shape[0], ACC)
            used = pt * factors
        dv_tile = dot(cast(used, do_tile.dtype), do_tile, dv_tile, PRECISION)
        dpt = dot(v_tile, tl.trans(do_tile), tl.zeros((k_tile.shape[0], BLOCK_M), ACC), PRECISION)
        if dropout is not None:
            dpt = dpt * factors
        out_tile = load_rows(out_base, rm, out[2], inside, D, BLOCK_D)
        delta = tl.sum(widen(out_tile, ACC) * widen(do_tile, ACC), 1)
        ds = pt * (dpt - delta[None, :])
        dst = cast(ds, q_tile.dtype)
        dk_tile = dot(dst, q_tile, dk_tile, PRECISION)
    return dk_tile, dv_tile


@triton.jit(do_not_specialize=SIZES)
def long_kv_backward(
    q, k, v, out, lse_ptr, do, dk, dv, keys, order_ptr, spans_ptr, cu_q_ptr, H, q_rows, k_rows, scale, scale_log2,
    dropout, reader_splits, partial_size, num_tiles,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dK and dV of long key sequences. Grid (B' * key heads * num_tiles, reader_splits).

    order, spans and GROUP: see short_kv_backward.

    The tiles of one key sequence run side by side, so that they find its readers' queries in cache. Program t of a
    sequence takes every num_tiles-th tile from t on: a packed sequence may be longer than the mean, from which the
    launcher computes num_tiles where no bound is known.
    """
    bh = tl.program_id(0) // num_tiles
    kb = (bh // (H // GROUP)).to(tl.int64)
    h = (bh % (H // GROUP)).to(tl.int64)
    split = tl.program_id(1)
    first, last = 0, 1
    if spans_ptr is not None:
        kb, first, last = readers_of(spans_ptr, kb, split, reader_splits)
    k_start, stored, klen = key_rows(keys, kb, k_rows)
    scale_log2 = tl.full((), scale_log2, ACC)
    scale = tl.full((), scale, ACC)
    dk_base = head_of(dk, kb, k_start, h, D) + split.to(tl.int64) * partial_size
    dv_base = head_of(dv, kb, k_start, h, D) + split.to(tl.int64) * partial_size
    for n0 in range(tl.program_id(0) % num_tiles * BLOCK_N, stored, num_tiles * BLOCK_N):
        rn = n0 + tl.arange(0, BLOCK_N)
        exists = existing_keys(rn, klen, keys, kb)
        k_tile = load_rows(head_of(k, kb, k_start, h, D), rn, k[2], exists, D, BLOCK_D)
        v_tile = load_rows(head_of(v, kb, k_start, h, D), rn, v[2], exists, D, BLOCK_D)
        dk_tile = tl.zeros((BLOCK_N, BLOCK_D), ACC)
        dv_tile = tl.zeros((BLOCK_N, BLOCK_D), ACC)
        if n0 < klen:  # a tile of padded keys has zero gradients
            if spans_ptr is None and GROUP == 1:
                dk_tile, dv_tile = reader_backward_of_keys(
                    dk_tile, dv_tile, k_tile, v_tile, exists, n0, kb, h, q, out, lse_ptr, do, cu_q_ptr, H, q_rows,
                    scale_log2, dropout, D, BLOCK_D, BLOCK_M, ACC, PRECISION,
                )  # fmt: skip
            else:
                for at in range(first * GROUP, last * GROUP):  # readers, and query heads of each
                    b = kb
                    if spans_ptr is not None:
                        b = tl.load(order_ptr + at // GROUP)
                    dk_tile, dv_tile = reader_backward_of_keys(
                        dk_tile, dv_tile, k_tile, v_tile, exists, n0, b, h * GROUP + at % GROUP, q, out, lse_ptr, do,
                        cu_q_ptr, H, q_rows, scale_log2, dropout, D, BLOCK_D, BLOCK_M, ACC, PRECISION,
                    )  # fmt: skip
        store_rows(dk_base, rn, dk[2], rn < stored, dk_tile * scale, D, BLOCK_D)
        store_rows(dv_base, rn, dv[2], rn < stored, dv_tile, D, BLOCK_D)
