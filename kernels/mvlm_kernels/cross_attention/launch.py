"""Launchers of the kernel families, and the choice between them.

**Short-KV** (``short_kv.py``): image queries read text keys. **Short-Q** (``short_q.py``): text queries read image
keys. There are no atomics. Where a grid is too small to fill the GPU, a fixed number of splits writes float32 partial
sums, and a second kernel adds them in a fixed order.

The backward of the short-Q family has two forms. One pass of ``short_q_backward`` computes all three gradients. With
key_index, with grouped heads, and for shapes whose single pass would spill registers, ``short_q_backward_dq`` computes
dQ and ``long_kv_backward`` (``long_kv.py``) dK and dV.

Rows of a packed buffer that belong to no sequence are zeros: the launchers fill packed outputs with zeros first.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from mvlm_kernels import dispatch
from mvlm_kernels.cross_attention.arguments import Options, Sides, invert_key_index, short_side
from mvlm_kernels.cross_attention.long_kv import long_kv_backward
from mvlm_kernels.cross_attention.reference import pack_key_mask, threshold
from mvlm_kernels.cross_attention.short_kv import short_kv_backward, short_kv_forward
from mvlm_kernels.cross_attention.short_q import (
    short_q_backward,
    short_q_backward_dq,
    short_q_combine,
    short_q_forward,
)
from mvlm_kernels.cross_attention.tile_io import sum_splits
from mvlm_kernels.cross_attention.tiles import long_tiles, meta, single_pass, splits
from mvlm_kernels.dispatch import ceil_div

LOG2E = math.log2(math.e)  # kernels compute exp2, which is one instruction, so scores are scaled by log2(e) too
Heads = tuple[Any, ...]  # a tensor, and its strides of sequence, row and head


def heads_of(x: Tensor, packed: bool) -> Heads:
    """Tuple (x, stride of a sequence, of a row, of a head), by which the kernels read x (.., rows, heads, width).

    x is copied if its columns are not contiguous, or if offsets inside a sequence exceed int32. The stride of a
    sequence is 0 if x is packed.

    Strides of heads whose width is no multiple of 16 are multiples of 8, which ``tile_io.head_of`` relies on.
    """
    if not x.is_contiguous() and (
        x.stride(-1) != 1
        or x.shape[-3] * x.stride(-3) >= 2**31
        or (x.shape[-1] % 16 and any(stride % 8 for stride in x.stride()[:-1]))
    ):
        x = x.contiguous()
    return (x, 0, *x.stride()[:2]) if packed else (x, *x.stride()[:3])


def _flat(x: Tensor | None) -> Tensor | None:
    """Contiguous x. Kernels read vectors without a stride, so a column of a table or an expanded length is copied."""
    return x if x is None else x.contiguous()


def _aligned(*heads: Heads) -> bool:
    """True if the tensors begin at 16 bytes, so that a kernel loads them in vectors."""
    return all(x[0].data_ptr() % 16 == 0 for x in heads)


def _new(x: Tensor, packed: bool) -> Tensor:
    """A contiguous tensor like x, zeros if its rows are packed: some belong to no sequence."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)  # half the host's time of empty(x.shape, ...)
    return out.zero_() if packed else out


class _Call:
    """Sizes and tensors that all kernels of one call share.

    The scale is a runtime argument: as a constexpr each new value would compile the kernels again. Its product with
    log2(e) is an argument too, because computing it in the kernel took up to 31 registers.
    """

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, sides: Sides, options: Options) -> None:
        key_lengths, mask_words, key_index, cu_q, cu_k, order, spans = sides
        if mask_words is not None and mask_words.dtype == torch.bool:  # of a compiled graph
            mask_words = pack_key_mask(mask_words)
        scale, self.max_len_q, self.max_len_k, dropout_p, seed = options
        self.packed_q, self.packed_k = cu_q is not None, cu_k is not None
        self.q, self.k, self.v = heads_of(q, self.packed_q), heads_of(k, self.packed_k), heads_of(v, self.packed_k)
        *q_seqs, self.q_rows, self.H, self.D = q.shape
        *k_seqs, self.k_rows, self.k_heads, _ = k.shape
        self.group = self.H // self.k_heads if self.k_heads else 1  # query heads of a key head
        self.q_seqs = q_seqs[0] if cu_q is None else cu_q.shape[0] - 1
        self.k_seqs = k_seqs[0] if cu_k is None else cu_k.shape[0] - 1
        if key_index is not None and order is None and self.k_seqs:
            order, spans = invert_key_index(key_index, self.k_seqs)
        self.order, self.spans, self.cu_q = _flat(order), _flat(spans), _flat(cu_q)
        words = 0 if mask_words is None else mask_words.shape[1]
        self.keys = _flat(key_lengths), _flat(mask_words), words, _flat(cu_k), _flat(key_index)
        side = short_side(self.max_len_q, self.max_len_k)
        assert side is not None, "the public function sends two long sides to SDPA or the reference"
        self.short_keys = side == "kv"
        self.scales = scale, scale * LOG2E
        self.dropout = (seed, float(threshold(dropout_p)), 1 / (1 - dropout_p)) if dropout_p else None
        self.dtype, self.device = q.dtype, q.device
        self.acc_dtype = torch.float64 if self.dtype == torch.float64 else torch.float32

    @property
    def tile_key(self) -> tuple[torch.dtype, str, int, int]:
        """(dtype, type of device, head width, longest sequence of the short side), by which tiles are chosen."""
        return self.dtype, self.device.type, self.D, self.max_len_k if self.short_keys else self.max_len_q

    def meta(self, kernel: Any) -> dict[str, Any]:
        long = self.max_len_q if self.short_keys else self.max_len_k
        chosen = meta(kernel.__name__, *self.tile_key, long, dispatch.arch(self.device))
        return dispatch.overridden(kernel.__name__, chosen)

    def query_tiles(self, block: int) -> int:
        return long_tiles(self.q_rows, self.q_seqs, self.max_len_q, block)

    def key_tiles(self, block: int) -> int:
        return long_tiles(self.k_rows, self.k_seqs, self.max_len_k, block)

    def partials(self, parts: int, x: Tensor, packed: bool) -> Tensor:
        """New tensor (parts, *x.shape) for partial sums of x in the accumulator's dtype; zeros if x is packed."""
        partial = torch.empty((parts, *x.shape), dtype=self.acc_dtype, device=self.device)
        return partial.zero_() if packed else partial


def forward(q: Tensor, k: Tensor, v: Tensor, sides: Sides, options: Options) -> tuple[Tensor, Tensor]:
    """Output, contiguous in q's shape, and base-2 log-sum-exp in float32, (B, H, Lq) or packed (H, Tq).

    Readers may be None with a key_index. The length of the long side may be negative: unknown.
    """
    c = _Call(q, k, v, sides, options)
    out = _new(q, c.packed_q)
    lse = q.new_empty((c.H, c.q_rows) if c.packed_q else (c.q_seqs, c.H, c.q_rows), dtype=c.acc_dtype)
    programs = c.q_seqs * c.H
    if c.packed_q or programs == 0:
        lse.fill_(-torch.inf)
    if programs == 0:
        return out, lse
    inputs = (c.keys, c.order, c.cu_q, c.H, c.k_seqs, c.q_rows, c.k_rows, c.scales[1], c.dropout)
    if c.short_keys:
        chosen = c.meta(short_kv_forward)
        parts = splits(programs, c.query_tiles(chosen["BLOCK_M"]), c.device)
        to = heads_of(out, c.packed_q), lse
        dispatch.launch(
            short_kv_forward, (programs, parts), c.q, c.k, c.v, *to, *inputs, parts, GROUP=c.group, **chosen
        )
        return out, lse
    chosen = c.meta(short_q_forward)
    parts = splits(programs, c.key_tiles(chosen["BLOCK_N"]), c.device)
    partial, partial_lse = out, lse
    if parts > 1:
        partial, partial_lse = c.partials(parts, out, c.packed_q), c.partials(parts, lse, False)
        if c.packed_q:
            partial_lse.fill_(-torch.inf)
    to = _part(partial, out, c.packed_q), partial_lse
    sizes = (parts, out.numel(), lse.numel())
    dispatch.launch(short_q_forward, (programs, parts), c.q, c.k, c.v, *to, *inputs, *sizes, GROUP=c.group, **chosen)
    if parts > 1:
        rows = out.numel() // (c.H * c.D)
        dispatch.launch(
            short_q_combine, (ceil_div(rows, 16), c.H), partial, partial_lse, out, lse, c.H, rows, c.q_rows, *sizes,
            D=c.D, BLOCK_D=chosen["BLOCK_D"], BLOCK_M=16, ACC=chosen["ACC"],
            num_warps=4, num_stages=1, enable_fp_fusion=True,
        )  # fmt: skip
    return out, lse


def _part(partial: Tensor | None, x: Tensor | None, packed: bool) -> Heads | None:
    """Tuple of :func:`heads_of` for the first part of partial sums, with the strides of x; None if x is None."""
    return None if x is None else (partial, *heads_of(x, packed)[1:])


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor | None, lse: Tensor, sides: Sides, options: Options,
    need_dq: bool = True, need_dkv: bool = True,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of q, k and v, contiguous in their shapes; None where not needed. Only the short-Q family reads out."""
    c = _Call(q, k, v, sides, options)
    do = heads_of(grad, c.packed_q)
    dq = _new(q, c.packed_q) if need_dq else None
    dk = _new(k, c.packed_k) if need_dkv else None
    dv = _new(k, c.packed_k) if need_dkv else None
    if c.q_seqs == 0 or c.k_seqs == 0 or c.H == 0:
        return tuple(x if x is None else x.zero_() for x in (dq, dk, dv))  # type: ignore[return-value]
    if c.short_keys:
        _short_kv_backward(c, do, lse, dq, dk, dv)
        return dq, dk, dv
    assert out is not None, "the short-Q family reads the output"
    if sides.key_index is None and c.group == 1 and need_dkv and single_pass(*c.tile_key, dispatch.arch(c.device)):
        _short_q_backward(c, do, heads_of(out, c.packed_q), lse, dq, dk, dv)
        return dq, dk, dv
    # Two kernels, dQ by query sequence and dK and dV by key tile. With an index or grouped heads, several programs of a
    # single pass would add to one key head. Without tiles, a single pass would spill registers.
    if dq is not None:
        _short_q_backward(c, do, heads_of(out, c.packed_q), lse, dq, None, None)
    if dk is not None and dv is not None:
        _long_kv_backward(c, do, heads_of(out, c.packed_q), lse, dk, dv)
    return dq, dk, dv


def _short_kv_backward(
    c: _Call, do: Heads, lse: Tensor, dq: Tensor | None, dk: Tensor | None, dv: Tensor | None
) -> None:
    chosen = c.meta(short_kv_backward)
    simple = c.dropout is None and c.spans is None and c.group == 1 and c.D == chosen["BLOCK_D"]
    if c.D % 16:
        chosen = {
            **chosen,
            "maxnreg": 255,
        }  # the assembler's own choice spills a little to make room for one more block
    elif "maxnreg" in chosen and not (simple and _aligned(c.q, c.k, c.v, do)):
        # A loop over readers or heads, masked columns, loads of single elements, or a dropout would spill.
        chosen = {**chosen, "maxnreg": None}
    if c.dropout is not None and chosen["BLOCK_N"] > 64:
        chosen = {**chosen, "BLOCK_M": 16}  # registers for the factors of a tile
    programs = c.k_seqs * c.k_heads
    tile_splits = splits(programs, c.query_tiles(chosen["BLOCK_M"]), c.device)
    reader_splits = 1 if c.spans is None else splits(programs * tile_splits, c.q_seqs, c.device)
    parts = tile_splits * reader_splits
    partials = [dk, dv] if parts == 1 or dk is None else [c.partials(parts, dk, c.packed_k) for _ in range(2)]
    dispatch.launch(
        short_kv_backward, (programs, parts), c.q, c.k, c.v, lse, do, _part(dq, dq, c.packed_q),
        _part(partials[0], dk, c.packed_k), _part(partials[1], dv, c.packed_k), c.keys, c.order, c.spans, c.cu_q, c.H,
        c.q_rows, c.k_rows, *c.scales, c.dropout, reader_splits, tile_splits, 0 if dk is None else dk.numel(),
        GROUP=c.group, **chosen,
    )  # fmt: skip
    _sum_parts(chosen, parts, zip(partials, (dk, dv), strict=True))


def _long_kv_backward(c: _Call, do: Heads, out: Heads, lse: Tensor, dk: Tensor, dv: Tensor) -> None:
    chosen = c.meta(long_kv_backward)
    tiles = max(1, c.key_tiles(chosen["BLOCK_N"]))
    programs = c.k_seqs * c.k_heads * tiles
    parts = 1 if c.spans is None else splits(programs, c.q_seqs, c.device)
    partials = [dk, dv] if parts == 1 else [c.partials(parts, dk, c.packed_k) for _ in range(2)]
    dispatch.launch(
        long_kv_backward, (programs, parts), c.q, c.k, c.v, out, lse, do, _part(partials[0], dk, c.packed_k),
        _part(partials[1], dv, c.packed_k), c.keys, c.order, c.spans, c.cu_q, c.H, c.q_rows, c.k_rows, *c.scales,
        c.dropout, parts, dk.numel(), tiles, GROUP=c.group, **chosen,
    )  # fmt: skip
    _sum_parts(chosen, parts, zip(partials, (dk, dv), strict=True))


def _short_q_backward(
    c: _Call, do: Heads, out: Heads, lse: Tensor, dq: Tensor | None, dk: Tensor | None, dv: Tensor | None
) -> None:
    """Launch the backward kernels of the short-Q family, which write dq alone if dk is None, else dk, dv and dq.

    dq may be None beside dk.
    """
    kernel = short_q_backward_dq if dk is None else short_q_backward
    chosen = c.meta(kernel)
    tiles = ceil_div(c.max_len_q, chosen["BLOCK_M"]) or 1
    parts = splits(c.q_seqs * c.H * tiles, c.key_tiles(chosen["BLOCK_N"]), c.device)
    partial = dq if parts == 1 or dq is None else c.partials(parts, dq, c.packed_q)
    inputs = (c.q, c.k, c.v, out, lse, do, _part(partial, dq, c.packed_q))
    size = 0 if dq is None else dq.numel()
    if dk is None:
        dispatch.launch(
            kernel, (c.q_seqs * c.H * tiles, parts), *inputs, c.keys, c.order, c.cu_q, c.H, c.k_seqs, c.q_rows,
            c.k_rows, *c.scales, c.dropout, parts, size, tiles, GROUP=c.group, **chosen,
        )  # fmt: skip
    else:
        dispatch.launch(
            kernel, (c.q_seqs * c.H, parts), *inputs, _part(dk, dk, c.packed_k), _part(dv, dv, c.packed_k), c.keys,
            c.cu_q, c.H, c.q_rows, c.k_rows, *c.scales, c.dropout, parts, size, **chosen,
        )  # fmt: skip
    _sum_parts(chosen, parts, [(partial, dq)])


def _sum_parts(chosen: dict[str, Any], parts: int, pairs: Iterable[tuple[Tensor | None, Tensor | None]]) -> None:
    """Launch the sum over the first dimension of each (partial sums, result), if there are several parts.

    A result that is None is left out.
    """
    block = 1024
    for partial, x in pairs:
        if parts > 1 and x is not None:
            dispatch.launch(
                sum_splits, (ceil_div(x.numel(), block),), partial, x, x.numel(), parts,
                BLOCK=block, ACC=chosen["ACC"], num_warps=4, num_stages=1, enable_fp_fusion=True,
            )  # fmt: skip
