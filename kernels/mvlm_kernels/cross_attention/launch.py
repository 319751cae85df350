"""Launchers of the two kernel families, and the choice between them.

**Short-KV** (``short_kv.py``): image queries read text keys. **Short-Q** (``short_q.py``): text queries read image
keys. There are no atomics. Where a grid is too small to fill the GPU, a fixed number of splits writes float32 partial
sums, and a second kernel adds them in a fixed order.

The backward of the short-Q family has two forms. One pass of ``short_q_backward`` computes all three gradients. With
key_index, and for shapes whose single pass would spill registers, ``short_q_backward`` computes dQ and
``short_kv_backward`` computes dK and dV.
"""
# pyright: reportArgumentType=false

import math
from typing import Any

import torch
from torch import Tensor

from mvlm_kernels import dispatch
from mvlm_kernels.cross_attention.arguments import bucket, short_side
from mvlm_kernels.cross_attention.short_kv import short_kv_backward, short_kv_forward
from mvlm_kernels.cross_attention.short_q import short_q_backward, short_q_combine, short_q_forward
from mvlm_kernels.cross_attention.tile_io import sum_splits
from mvlm_kernels.cross_attention.tiles import kernel_has_tiles, long_tiles, meta, splits
from mvlm_kernels.dispatch import ceil_div

LOG2E = math.log2(math.e)  # kernels compute exp2, which is one instruction, so scores are scaled by log2(e) too


def _readable(x: Tensor) -> Tensor:
    """x if its columns are contiguous and its offsets inside a sequence fit int32, else a contiguous copy."""
    if x.is_contiguous():
        return x
    return x if x.stride(-1) == 1 and x.shape[-3] * x.stride(-3) < 2**31 else x.contiguous()


def _strides(x: Tensor, packed: bool) -> tuple[int, ...]:
    """Strides of sequence, row and head. A packed tensor has no sequence dimension, so that stride is 0."""
    return (0, *x.stride()[:2]) if packed else x.stride()[:3]


def _flat(x: Tensor | None) -> Tensor | None:
    """Contiguous x. Kernels read vectors without a stride, so a column of a table or an expanded length is copied."""
    return x if x is None else x.contiguous()


def _new(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)  # half the host's time of empty(x.shape, ...)


class _Call:
    """Sizes and strides that all kernels of one call share.

    The scale is a runtime argument: as a constexpr each new value would compile the kernels again. Its product with
    log2(e) is an argument too, because computing it in the kernel took up to 31 registers.
    """

    def __init__(self, q, k, v, key_lengths, mask_words, key_index, cu_q, cu_k, scale, max_len_q, max_len_k) -> None:
        self.q, self.k, self.v = _readable(q), _readable(k), _readable(v)
        self.lengths, self.mask, self.index = _flat(key_lengths), _flat(mask_words), _flat(key_index)
        self.cu_q, self.cu_k = _flat(cu_q), _flat(cu_k)
        packed_q, packed_k = cu_q is not None, cu_k is not None
        *q_seqs, self.q_rows, self.H, self.D = q.shape
        *k_seqs, self.k_rows, _, _ = k.shape
        self.q_seqs = cu_q.shape[0] - 1 if packed_q else q_seqs[0]
        self.k_seqs = cu_k.shape[0] - 1 if packed_k else k_seqs[0]
        self.max_len_q, self.max_len_k = max_len_q, max_len_k
        self.side = short_side(max_len_q, max_len_k)
        assert self.side is not None, "the public function sends two long sides to SDPA or the reference"
        self.strides = _strides(self.q, packed_q) + _strides(self.k, packed_k) + _strides(self.v, packed_k)
        words = 0 if mask_words is None else mask_words.shape[1]
        self.sizes = (self.H, self.q_seqs, self.k_seqs, self.q_rows, self.k_rows, words, scale, scale * LOG2E)
        self.dtype, self.device = q.dtype, q.device
        self.acc_dtype = torch.float64 if self.dtype == torch.float64 else torch.float32

    def tile_key(self, short: int) -> tuple[Any, ...]:
        """Arguments of :func:`~mvlm_kernels.cross_attention.tiles.meta` after the kernel's name."""
        return self.dtype, self.device.type, self.D, short, dispatch.arch(self.device)

    def query_tiles(self, block: int) -> int:
        return long_tiles(self.q_rows, self.q_seqs, self.max_len_q, block)

    def key_tiles(self, block: int) -> int:
        return long_tiles(self.k_rows, self.k_seqs, self.max_len_k, block)


def forward(
    q: Tensor, k: Tensor, v: Tensor, key_lengths: Tensor | None, mask_words: Tensor | None, key_index: Tensor | None,
    cu_q: Tensor | None, cu_k: Tensor | None, scale: float, max_len_q: int, max_len_k: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output, contiguous in q's shape, and base-2 log-sum-exp in float32, (B, H, Lq) or packed (H, Tq).

    max_len_q, max_len_k: longest sequence of each side, known to the host. That of the long side may be negative:
    unknown.
    """
    c = _Call(q, k, v, key_lengths, mask_words, key_index, cu_q, cu_k, scale, max_len_q, max_len_k)
    out = _new(q)
    if cu_q is not None:
        lse = q.new_empty(c.H, c.q_rows, dtype=c.acc_dtype)
    else:
        lse = q.new_empty(c.q_seqs, c.H, c.q_rows, dtype=c.acc_dtype)
    inputs = (c.lengths, c.mask, c.index, c.cu_q, c.cu_k, *c.strides, *c.sizes)
    programs = c.q_seqs * c.H
    if programs == 0:
        return out.zero_(), lse.fill_(-torch.inf)
    if c.side == "kv":
        chosen = meta("short_kv_forward", *c.tile_key(max_len_k))
        parts = splits(programs, c.query_tiles(chosen["BLOCK_M"]), c.device)
        dispatch.launch(short_kv_forward, (programs, parts), c.q, c.k, c.v, out, lse, *inputs, parts, **chosen)
        return out, lse
    chosen = meta("short_q_forward", *c.tile_key(max_len_q))
    parts = splits(programs, c.key_tiles(chosen["BLOCK_N"]), c.device)
    grid = (programs, parts)
    if parts == 1:
        dispatch.launch(short_q_forward, grid, c.q, c.k, c.v, out, lse, *inputs, 1, 0, 0, **chosen)
        return out, lse
    partial = torch.empty((parts, *out.shape), dtype=c.acc_dtype, device=q.device)
    partial_lse = torch.empty((parts, *lse.shape), dtype=c.acc_dtype, device=q.device)
    sizes = (out.numel(), lse.numel())
    dispatch.launch(short_q_forward, grid, c.q, c.k, c.v, partial, partial_lse, *inputs, parts, *sizes, **chosen)
    rows = out.numel() // (c.H * c.D)
    dispatch.launch(
        short_q_combine, (ceil_div(rows, 16), c.H), partial, partial_lse, out, lse, c.H, rows, parts, *sizes,
        c.q_rows, D=c.D, BLOCK_D=chosen["BLOCK_D"], BLOCK_M=16, ACC=chosen["ACC"],
        num_warps=4, num_stages=1, enable_fp_fusion=True,
    )  # fmt: skip
    return out, lse


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor | None, lse: Tensor, key_lengths: Tensor | None,
    mask_words: Tensor | None, key_index: Tensor | None, cu_q: Tensor | None, cu_k: Tensor | None, scale: float,
    max_len_q: int, max_len_k: int, need_dq: bool, need_dkv: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of q, k and v, contiguous in their shapes; None where not needed. Only the short-Q family reads out."""
    c = _Call(q, k, v, key_lengths, mask_words, key_index, cu_q, cu_k, scale, max_len_q, max_len_k)
    grad = _readable(grad)
    dq = _new(q) if need_dq else None
    dk = _new(k) if need_dkv else None
    dv = _new(k) if need_dkv else None
    if c.q_seqs == 0 or c.k_seqs == 0 or c.H == 0:
        return tuple(x if x is None else x.zero_() for x in (dq, dk, dv))  # type: ignore[return-value]
    if c.side == "kv":
        _short_kv_backward(c, grad, None, lse, dq, dk, dv)
    elif key_index is None and kernel_has_tiles("short_q_backward", *c.tile_key(max_len_q)):
        _short_q_backward(c, grad, out, lse, dq, dk, dv)
    else:
        # Two passes: dQ first, then dK and dV by key tile. With an index, several programs of a single pass would add
        # to one key sequence. Without tiles, a single pass would spill registers.
        if need_dq:
            _short_q_backward(c, grad, out, lse, dq, None, None)
        if need_dkv:
            _short_kv_backward(c, grad, out, lse, None, dk, dv)
    return dq, dk, dv


def _short_kv_backward(
    c: _Call, grad: Tensor, out: Tensor | None, lse: Tensor, dq: Tensor | None, dk: Tensor | None, dv: Tensor | None
) -> None:
    # In the short-KV family one tile holds every key. For the short-Q family the kernel loops over tiles of keys.
    all_keys = c.side == "kv"
    order = offsets = None
    if c.index is not None:
        order, offsets = inverse_index(c.index, c.k_seqs)
    if all_keys:
        chosen, key_tiles = meta("short_kv_backward", *c.tile_key(c.max_len_k)), 1
    else:
        chosen = meta("long_kv_backward", *c.tile_key(c.max_len_q))
        key_tiles = max(1, min(c.key_tiles(chosen["BLOCK_N"]), 65535))  # CUDA's limit of a grid's third dimension
    programs = c.k_seqs * c.H * key_tiles
    tile_splits = splits(programs, c.query_tiles(chosen["BLOCK_M"]), c.device)
    reader_splits = 1 if order is None else splits(programs * tile_splits, c.q_seqs, c.device)
    parts = tile_splits * reader_splits
    dk_out, dv_out, size = dk, dv, 0
    if parts > 1 and dk is not None:
        size = dk.numel()
        dk_out = torch.empty((parts, size), dtype=c.acc_dtype, device=c.device)
        dv_out = torch.empty((parts, size), dtype=c.acc_dtype, device=c.device)
    dispatch.launch(
        short_kv_backward, (c.k_seqs * c.H, parts, key_tiles), c.q, c.k, c.v, out, lse, grad, dq, dk_out, dv_out,
        c.lengths, c.mask, order, offsets, c.cu_q, c.cu_k, *c.strides, *_strides(grad, c.cu_q is not None), *c.sizes,
        reader_splits, tile_splits, size, WRITE_DQ=dq is not None, WRITE_DKV=dk is not None, ALL_KEYS=all_keys,
        **chosen,
    )  # fmt: skip
    if dk is not None and dv is not None and parts > 1:
        _launch_sum_splits(dk_out, dk, parts, chosen["ACC"])
        _launch_sum_splits(dv_out, dv, parts, chosen["ACC"])


def _short_q_backward(
    c: _Call, grad: Tensor, out: Tensor | None, lse: Tensor, dq: Tensor | None, dk: Tensor | None, dv: Tensor | None
) -> None:
    chosen = meta("short_q_backward" if dk is not None else "short_q_backward_dq", *c.tile_key(c.max_len_q))
    query_tiles = ceil_div(bucket(c.max_len_q), chosen["BLOCK_M"])
    parts = splits(c.q_seqs * c.H * query_tiles, c.key_tiles(chosen["BLOCK_N"]), c.device)
    dq_out, size = dq, 0
    if parts > 1 and dq is not None:
        size = dq.numel()
        dq_out = torch.empty((parts, size), dtype=c.acc_dtype, device=c.device)
    dispatch.launch(
        short_q_backward, (c.q_seqs * c.H, parts, query_tiles), c.q, c.k, c.v, out, lse, grad, dq_out, dk, dv,
        c.lengths, c.mask, c.index, c.cu_q, c.cu_k, *c.strides, *_strides(grad, c.cu_q is not None), *c.sizes,
        parts, size, WRITE_DQ=dq is not None, WRITE_DKV=dk is not None, **chosen,
    )  # fmt: skip
    if dq is not None and parts > 1:
        _launch_sum_splits(dq_out, dq, parts, chosen["ACC"])


def _launch_sum_splits(partial: Tensor | None, x: Tensor, parts: int, acc: Any) -> None:
    block = 1024
    dispatch.launch(
        sum_splits, (ceil_div(x.numel(), block),), partial, x, x.numel(), parts,
        BLOCK=block, ACC=acc, num_warps=4, num_stages=1, enable_fp_fusion=True,
    )  # fmt: skip


def inverse_index(key_index: Tensor, k_seqs: int) -> tuple[Tensor, Tensor]:
    """Invert key_index (B,): order (B,) and offsets (B' + 1,), both int64.

    The query sequences order[offsets[r] : offsets[r + 1]], ascending, read key sequence r. An index outside [0, B')
    counts as the nearest one, so that exactly one program writes the gradient of each query sequence. That gradient is
    NaN.
    """
    sequences, order = torch.sort(key_index.clamp(0, k_seqs - 1), stable=True)
    bounds = torch.arange(k_seqs + 1, dtype=sequences.dtype, device=sequences.device)
    return order, torch.searchsorted(sequences, bounds)
