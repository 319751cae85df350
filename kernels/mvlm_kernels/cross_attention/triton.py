"""The launchers of the two kernel families, and what picks between them.

**Short-KV** (``short_kv.py``): image queries read text keys. **Short-Q** (``short_q.py``): text queries read image
keys. No atomics anywhere. Where a grid is too small for the machine, a fixed number of splits writes float32 partials
that a second kernel adds in a fixed order.
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
from mvlm_kernels.cross_attention.rows import sum_partials
from mvlm_kernels.cross_attention.short_kv import short_kv_backward, short_kv_forward
from mvlm_kernels.cross_attention.short_q import short_q_backward, short_q_combine, short_q_forward

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
    """Sizes, strides and constants that all kernels of one call share. The scale is one of the sizes: as a constant,
    each new value would be a compilation."""

    def __init__(self, q, k, v, key_lengths, mask_words, key_index, cu_q, cu_k, scale, max_len_q, max_len_k) -> None:
        self.q, self.k, self.v = _readable(q), _readable(k), _readable(v)
        # The kernels read these one after the other: a column of a table, or one expanded length, is copied.
        key_lengths, mask_words, key_index, cu_q, cu_k = (
            None if x is None else x.contiguous() for x in (key_lengths, mask_words, key_index, cu_q, cu_k)
        )
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
        self.sizes = (self.H, self.q_seqs, self.k_seqs, self.q_rows, self.k_rows, self.mask_words, scale)
        self.arch = dispatch.arch(q.device)
        self.block_d = triton.next_power_of_2(self.D)
        self.acc = tl.float64 if q.dtype == torch.float64 else tl.float32
        self.acc_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        self.constants = {
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
    inputs = (c.lengths, c.mask, c.index, c.cu_q, c.cu_k, *c.strides, *c.sizes)
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
