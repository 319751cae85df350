"""Loads and stores of tiles, bounds of dense and packed sequences, and key masks, for both kernel families.

Legend: BLOCK_D >= D head width; b query sequence, kb key sequence, h head. Offsets inside one sequence are int32, which
the launcher guarantees; bases are int64.
"""
# pyright: reportArgumentType=false

import triton
import triton.language as tl

from mvlm_kernels.language import cast

# Global of the kernels. NaN must not be one: Triton compares globals at every launch, and NaN is unequal to itself.
INF = tl.constexpr(float("inf"))


@triton.jit
def rows_of(cu_ptr, b, total):
    """First row and number of rows of sequence b: (0, total) if dense, else from cu_seqlens.

    Packed bounds are clamped to the buffer, so that wrong cu_seqlens cannot read or write out of bounds.
    """
    if cu_ptr is None:
        start = tl.zeros((), tl.int64)
        length = total
    else:
        start = tl.minimum(tl.maximum(tl.load(cu_ptr + b).to(tl.int64), 0), total)
        end = tl.minimum(tl.maximum(tl.load(cu_ptr + b + 1).to(tl.int64), start), total)
        length = (end - start).to(tl.int32)
    return start, length


@triton.jit
def load_rows(ptr, rows, stride, inside, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Tile (rows, BLOCK_D) of a matrix with contiguous columns. Rows outside are zeros and are not accessed."""
    cols = tl.arange(0, BLOCK_D)
    if D == BLOCK_D:
        mask = inside[:, None]
    else:
        mask = inside[:, None] & (cols[None, :] < D)
    return tl.load(ptr + rows[:, None] * stride + cols[None, :], mask=mask, other=0.0)


@triton.jit
def store_rows(ptr, rows, stride, inside, x, D: tl.constexpr, BLOCK_D: tl.constexpr):
    cols = tl.arange(0, BLOCK_D)
    if D == BLOCK_D:
        mask = inside[:, None]
    else:
        mask = inside[:, None] & (cols[None, :] < D)
    tl.store(ptr + rows[:, None] * stride + cols[None, :], cast(x, ptr.dtype.element_ty), mask=mask)


@triton.jit
def fill_rows(ptr, stride, start, end, value, BLOCK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Store value in rows [start, end), which no tile covers: NaN past a bound of lengths, zeros outside sequences."""
    for r0 in range(start, end, BLOCK):
        rows = r0 + tl.arange(0, BLOCK).to(tl.int64)
        store_rows(ptr, rows, stride, rows < end, tl.full((BLOCK, BLOCK_D), value, tl.float32), D, BLOCK_D)


@triton.jit
def fill_lse(ptr, start, end, value, BLOCK: tl.constexpr):
    for r0 in range(start, end, BLOCK):
        rows = r0 + tl.arange(0, BLOCK)
        tl.store(ptr + rows, tl.full((BLOCK,), value, tl.float32), mask=rows < end)


@triton.jit
def outside_rows(cu_ptr, seqs, total, leader):
    """Rows of a packed buffer that belong to no sequence: [0, front) and [back, end).

    One program, the leader, fills them. For all others both ranges are empty.
    """
    first = tl.minimum(tl.maximum(tl.load(cu_ptr).to(tl.int64), 0), total)
    back = tl.minimum(tl.maximum(tl.load(cu_ptr + seqs).to(tl.int64), first), total)
    return tl.where(leader, first, 0), back, tl.where(leader, total, back)


@triton.jit
def fill_outside(ptr, stride, cu_ptr, seqs, total, leader, BLOCK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Store zeros in the rows of a packed buffer that belong to no sequence."""
    front, back, end = outside_rows(cu_ptr, seqs, total, leader)
    fill_rows(ptr, stride, 0, front, 0.0, BLOCK, D, BLOCK_D)
    fill_rows(ptr, stride, back, end, 0.0, BLOCK, D, BLOCK_D)


@triton.jit
def fill_lse_outside(ptr, cu_ptr, seqs, total, leader, BLOCK: tl.constexpr):
    front, back, end = outside_rows(cu_ptr, seqs, total, leader)
    fill_lse(ptr, 0, front, -INF, BLOCK)
    fill_lse(ptr, back, end, -INF, BLOCK)


@triton.jit
def existing_keys(rn, klen, mask_ptr, kb, mask_words):
    """bool (BLOCK_N,), True = the key exists: below the length, and its bit is set in the sequence's 64-bit words."""
    exists = rn < klen
    if mask_ptr is not None:
        word = tl.load(mask_ptr + kb * mask_words + rn // 64, mask=exists, other=0)
        exists = exists & (((word >> (rn % 64).to(tl.int64)) & 1) != 0)
    return exists


@triton.jit
def log_sum_exp(m, total):
    """log2(total * 2^m); -inf for a row without keys.

    It stays in base 2 up to the backward pass, because a change of base would round the probabilities once more.
    """
    empty = total == 0.0
    return tl.where(empty, -INF, m + tl.log2(tl.where(empty, 1.0, total)))


@triton.jit
def key_sequence(index_ptr, b, k_seqs):
    """Key sequence that query sequence b reads, and True if its index is out of range.

    A bad index reads sequence 0, and its results become NaN.
    """
    if index_ptr is None:
        kb = b.to(tl.int64)
        bad = kb < 0
    else:
        kb = tl.load(index_ptr + b).to(tl.int64)
        bad = (kb < 0) | (kb >= k_seqs)
        kb = tl.where(bad, 0, kb)
    return kb, bad


@triton.jit
def key_length(lengths_ptr, kb, stored):
    """Number of keys of sequence kb, clamped to the stored rows."""
    klen = stored
    if lengths_ptr is not None:
        klen = tl.minimum(tl.maximum(tl.load(lengths_ptr + kb).to(tl.int32), 0), stored)
    return klen


@triton.jit
def sum_splits(partial_ptr, x_ptr, size, num_splits, BLOCK: tl.constexpr, ACC: tl.constexpr):
    """Sum of the splits, x = partial[0] + partial[1] + ... in that order. Grid (tiles,).

    x has ``size`` elements, and so has each split.
    """
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    total = tl.zeros((BLOCK,), ACC)
    for split in range(num_splits):
        total += tl.load(partial_ptr + split * size + at, mask=inside, other=0.0)
    tl.store(x_ptr + at, cast(total, x_ptr.dtype.element_ty), mask=inside)
