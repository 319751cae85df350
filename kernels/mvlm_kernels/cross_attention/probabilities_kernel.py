"""Kernel and launcher of the attention probabilities.

Legend: BLOCK_M query rows, BLOCK_N key rows, BLOCK_D >= D head width; b query sequence, kb key sequence, h head.
"""
# pyright: reportArgumentType=false

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mvlm_kernels import dispatch
from mvlm_kernels.cross_attention.launch import heads_of, softcap_of
from mvlm_kernels.cross_attention.tile_io import (
    INF,
    SIZES,
    existing_keys,
    head_of,
    key_rows,
    key_sequence,
    load_rows,
    lse_of,
    rows_of,
    scores_of,
)
from mvlm_kernels.cross_attention.tiles import tile_width
from mvlm_kernels.dispatch import ceil_div
from mvlm_kernels.language import dot


@triton.jit
def _scores(
    q_tile, k_base, stride_kl, n0, klen, keys, kb, scale_log2, softcap,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores times scale and log2(e) of the keys [n0, n0 + BLOCK_N), -inf where no key exists."""
    rn = n0 + tl.arange(0, BLOCK_N)
    exists = existing_keys(rn, klen, keys, kb)
    k_tile = load_rows(k_base, rn, stride_kl, exists, D, BLOCK_D)
    s = dot(q_tile, tl.trans(k_tile), tl.zeros((q_tile.shape[0], BLOCK_N), ACC), PRECISION)
    s, _slope = scores_of(s, scale_log2, softcap, ACC)
    return tl.where(exists[None, :], s, -INF)


@triton.jit(do_not_specialize=SIZES)
def probabilities_kernel(
    q, k, lse_ptr, out_ptr, keys, cu_q_ptr, H, k_seqs, q_rows, k_rows, out_rows, out_cols, scale, softcap,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Probabilities of a tile of queries, (out_rows, out_cols) for each b and h. Grid (B * H * query tiles,).

    lse_ptr: natural log-sum-exp; None: a first pass over the keys computes it. q_rows, k_rows: rows per sequence of a
    dense side, all rows of a packed side.
    """
    tiles = tl.cdiv(out_rows, BLOCK_M)
    bh = tl.program_id(0) // tiles
    b = (bh // H).to(tl.int64)
    h = (bh % H).to(tl.int64)
    q_start, q_len = rows_of(cu_q_ptr, b, q_rows)
    kb, bad = key_sequence(keys, b, k_seqs)
    k_start, _, klen = key_rows(keys, kb, k_rows)
    bad = bad | (q_len > out_rows) | (klen > out_cols)  # NaN, because raising an error would wait for the device

    rm = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = rm < q_len
    q_tile = load_rows(head_of(q, b, q_start, h, D), rm, q[2], inside, D, BLOCK_D)
    k_base = head_of(k, kb, k_start, h // GROUP, D)
    log2e = tl.full((), 1.4426950408889634, ACC)
    scale_log2 = tl.full((), scale, ACC) * log2e
    if lse_ptr is None:
        m = tl.full((BLOCK_M,), -INF, ACC)
        total = tl.zeros((BLOCK_M,), ACC)
        for n0 in range(0, klen, BLOCK_N):
            s = _scores(
                q_tile, k_base, k[2], n0, klen, keys, kb, scale_log2, softcap,
                D, BLOCK_D, BLOCK_N, ACC, PRECISION,
            )  # fmt: skip
            m_new = tl.maximum(m, tl.max(s, 1))
            m_safe = tl.where(m_new == -INF, 0.0, m_new)  # no key yet: exp2(-inf - 0) = 0, not exp2(-inf + inf) = NaN
            total = total * tl.exp2(m - m_safe) + tl.sum(tl.exp2(s - m_safe[:, None]), 1)
            m = m_new
        lse = m + tl.log2(tl.where(total == 0.0, 1.0, total))
    else:
        lse_base = lse_of(lse_ptr, cu_q_ptr, b, q_start, h, H, q_rows)
        lse = tl.load(lse_base + rm, mask=inside, other=0.0) * log2e
    lse = tl.where(lse == -INF, 0.0, lse)  # a query without keys

    out_base = out_ptr + (b * H + h) * out_rows * out_cols
    for n0 in range(0, out_cols, BLOCK_N):
        s = _scores(
            q_tile, k_base, k[2], n0, klen, keys, kb, scale_log2, softcap,
            D, BLOCK_D, BLOCK_N, ACC, PRECISION,
        )  # fmt: skip
        p = tl.where(inside[:, None], tl.exp2(s - lse[:, None]), 0.0)
        p = tl.where(bad, float("nan"), p)
        rn = n0 + tl.arange(0, BLOCK_N)
        at = rm.to(tl.int64)[:, None] * out_cols + rn[None, :]
        tl.store(out_base + at, p, mask=(rm < out_rows)[:, None] & (rn < out_cols)[None, :])


def launch(
    q: Tensor, k: Tensor, lse: Tensor | None, key_lengths: Tensor | None, mask_words: Tensor | None,
    key_index: Tensor | None, cu_q: Tensor | None, cu_k: Tensor | None, scale: float, len_q: int, len_k: int,
    softcap: float = 0.0,
) -> Tensor:  # fmt: skip
    """Probabilities (B, H, len_q, len_k) in float32 or float64. lse: natural, or None. softcap: 0 for none."""
    seqs = q.shape[0] if cu_q is None else cu_q.shape[0] - 1
    heads, width = q.shape[-2:]
    wide = q.dtype == torch.float64
    out = torch.empty((seqs, heads, len_q, len_k), dtype=q.dtype if wide else torch.float32, device=q.device)
    if not out.numel():
        return out
    block_d = tile_width(width)
    block = 16 if q.dtype == torch.float32 else 32  # query rows; three products of TF32 take as many registers
    lengths, words, index, bounds_q, bounds_k = (
        x if x is None else x.contiguous() for x in (key_lengths, mask_words, key_index, cu_q, cu_k)
    )
    keys = lengths, words, 0 if words is None else words.shape[1], bounds_k, index
    k_seqs = k.shape[0] if cu_k is None else cu_k.shape[0] - 1
    tiles = ceil_div(len_q, block)
    dispatch.launch(
        probabilities_kernel, (seqs * heads * tiles,), heads_of(q, cu_q is not None), heads_of(k, cu_k is not None),
        lse if lse is None else lse.contiguous(), out, keys, bounds_q, heads, k_seqs, q.shape[-3], k.shape[-3],
        len_q, len_k, scale, softcap_of(softcap, scale),
        GROUP=heads // k.shape[-2], D=width, BLOCK_D=block_d, BLOCK_M=block, BLOCK_N=32,
        ACC=tl.float64 if wide else tl.float32, PRECISION="tf32x3" if q.dtype == torch.float32 else "ieee",
        num_warps=4, num_stages=1, enable_fp_fusion=True,
    )  # fmt: skip
    return out


def aot_cases() -> Iterator[tuple[str, Callable[[], Any]]]:
    """(label, call) of each case for :mod:`mvlm_kernels.aot`; labels are dtype/width/variant."""
    ints = partial(torch.empty, dtype=torch.int32, device="meta")

    def call(dtype: torch.dtype, width: int, variant: str) -> None:
        q = torch.empty((256, 32, 12, width), dtype=dtype, device="meta")
        k = torch.empty((256, 197, 12, width), dtype=dtype, device="meta")
        if variant == "packed":  # text reads images by an index, with its log-sum-exp
            lse = torch.empty((12, 3001), device="meta")
            launch(q.new_empty(3001, 12, width), k, lse, None, None, ints(256), ints(257), None, 0.125, 32, 197)
        else:
            launch(k, q, None, ints(256), None, None, None, None, 0.125, 197, 32)

    for dtype in (torch.bfloat16, torch.float32):
        for width in (64, 128):
            for variant in ("lengths", "packed"):
                name = f"{str(dtype).removeprefix('torch.')}/{width}/{variant}"
                yield name, partial(call, dtype, width, variant)
