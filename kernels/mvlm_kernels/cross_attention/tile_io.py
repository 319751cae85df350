"""Loads and stores of tiles, bounds of dense and packed sequences, and key masks, for all attention kernels.

A kernel takes a tensor of heads as a tuple ``(pointer, stride of a sequence, of a row, of a head)``, and the vectors of
the key side as ``keys = (lengths, mask words, words per sequence, cu_seqlens, key_index)``, each of them or None.
``dropout = (seed, threshold, 1 / (1 - p))`` may be None.

Sizes that change from batch to batch are arguments of their own, named in :data:`SIZES`: Triton would otherwise compile
a kernel again for a size that is 1 or divisible by 16, in the middle of training, and it cannot be told so of numbers
inside a tuple.

Legend: BLOCK_D >= D head width; b query sequence, kb key sequence, h head. Offsets inside one sequence are int32, which
the launcher guarantees; bases are int64.
"""
# pyright: reportArgumentType=false

import triton
import triton.language as tl

from mvlm_kernels.cross_attention.reference import ROUNDS
from mvlm_kernels.language import cast, dot

# Global of the kernels. NaN must not be one: Triton compares globals at every launch, and NaN is unequal to itself.
INF = tl.constexpr(float("inf"))
PHILOX_ROUNDS = tl.constexpr(ROUNDS)
SIZES = (
    "k_seqs", "q_rows", "k_rows", "num_splits", "reader_splits", "tile_splits", "num_tiles", "partial_size",
    "partial_lse_size", "size", "rows", "lse_rows",
)  # fmt: skip


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
def head_of(x, b, row, h, D: tl.constexpr):
    """Pointer to a row of sequence b and head h. b, row and h are int64."""
    if D % 16 == 0:
        ptr = x[0] + b * x[1] + row * x[2] + h * x[3]
    else:
        # Triton knows of an argument whether it is divisible by 16, and no smaller power. The launcher makes strides of
        # such heads divisible by 8, so that they load in vectors too.
        ptr = x[0] + tl.multiple_of(b * x[1] + row * x[2] + h * x[3], 8)
    return ptr


@triton.jit
def lse_of(lse_ptr, cu_q_ptr, b, row, h, H, q_rows):
    """Pointer to the log-sum-exp of a row: (B, H, Lq), or packed (H, Tq)."""
    if cu_q_ptr is None:
        at = (b * H + h) * q_rows + row
    else:
        at = h * q_rows + row
    return lse_ptr + at


@triton.jit
def _elements(ptr, rows, stride, inside, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Pointers (rows, BLOCK_D) to a tile's elements, and True where there is one."""
    cols = tl.arange(0, BLOCK_D)
    if D == BLOCK_D:
        mask = inside[:, None]
    else:
        mask = inside[:, None] & (cols[None, :] < D)
    first = rows[:, None] * stride
    if D % 16 != 0:
        first = tl.multiple_of(first, (8, 8))  # see head_of
    return ptr + first + cols[None, :], mask


@triton.jit
def load_rows(ptr, rows, stride, inside, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Tile (rows, BLOCK_D) of a matrix with contiguous columns. Rows outside are zeros and are not accessed."""
    at, mask = _elements(ptr, rows, stride, inside, D, BLOCK_D)
    return tl.load(at, mask=mask, other=0.0)


@triton.jit
def store_rows(ptr, rows, stride, inside, x, D: tl.constexpr, BLOCK_D: tl.constexpr):
    at, mask = _elements(ptr, rows, stride, inside, D, BLOCK_D)
    tl.store(at, cast(x, ptr.dtype.element_ty), mask=mask)


@triton.jit
def fill_nan(ptr, stride, start, end, BLOCK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Store NaN in the rows [start, end) past a bound of lengths, which no tile covers."""
    for r0 in range(start, end, BLOCK):
        rows = r0 + tl.arange(0, BLOCK)
        store_rows(ptr, rows, stride, rows < end, tl.full((BLOCK, BLOCK_D), float("nan"), tl.float32), D, BLOCK_D)


@triton.jit
def key_sequence(keys, b, k_seqs):
    """Key sequence that query sequence b reads, and True if its index is out of range.

    A bad index reads sequence 0, and its results become NaN.
    """
    if keys[4] is None:
        kb = b.to(tl.int64)
        bad = kb < 0
    else:
        kb = tl.load(keys[4] + b).to(tl.int64)
        bad = (kb < 0) | (kb >= k_seqs)
        kb = tl.where(bad, 0, kb)
    return kb, bad


@triton.jit
def key_rows(keys, kb, k_rows):
    """First row, number of stored rows, and number of keys of sequence kb, at most the stored rows."""
    start, stored = rows_of(keys[3], kb, k_rows)
    klen = stored
    if keys[0] is not None:
        klen = tl.minimum(tl.maximum(tl.load(keys[0] + kb).to(tl.int32), 0), stored)
    return start, stored, klen


@triton.jit
def readers_of(spans_ptr, kb, split, reader_splits):
    """Key sequence of a program, and the chunk of its readers that the split takes, in the order of the stable sort."""
    first = tl.load(spans_ptr + 3 * kb + 1)
    last = tl.load(spans_ptr + 3 * kb + 2)
    chunk = tl.cdiv(last - first, reader_splits)
    first += split * chunk
    return tl.load(spans_ptr + 3 * kb), first, tl.minimum(last, first + chunk)


@triton.jit
def existing_keys(rn, klen, keys, kb):
    """bool (BLOCK_N,), True = the key exists: below the length, and its bit is set in the sequence's 64-bit words."""
    exists = rn < klen
    if keys[1] is not None:
        word = tl.load(keys[1] + kb * keys[2] + rn // 64, mask=exists, other=0)
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
def transposed_probabilities(k, q, lse, exists, scale_log2, ACC: tl.constexpr, PRECISION: tl.constexpr):
    """P^T (keys, queries) from the saved log-sum-exp."""
    st = dot(k, tl.trans(q), tl.zeros((k.shape[0], q.shape[0]), ACC), PRECISION)
    st = st * scale_log2
    # where and not a product with 0: a query without keys has lse = -inf, so st - lse is inf.
    return tl.exp2(tl.where(exists[:, None], st - lse[None, :], -INF))


@triton.jit
def kept(dropout, b, h, rm, n0, TRANSPOSED: tl.constexpr, BLOCK_N: tl.constexpr, ACC: tl.constexpr):
    """Factors of the probabilities of queries rm and keys [n0, n0 + BLOCK_N): see ``reference.kept``.

    (queries, keys), or TRANSPOSED (keys, queries). n0 is a multiple of 4: a call of Philox decides on four keys.
    """
    quads = n0 // 4 + tl.arange(0, BLOCK_N // 4)
    if TRANSPOSED:
        c0, c1 = quads[:, None], rm[None, :]
    else:
        c0, c1 = quads[None, :], rm[:, None]
    w0, w1, w2, w3 = tl.philox(tl.load(dropout[0]), c0, c1, h.to(tl.int32), b.to(tl.int32), PHILOX_ROUNDS)
    even = tl.join(_is_kept(w0, dropout[1]), _is_kept(w2, dropout[1]))
    odd = tl.join(_is_kept(w1, dropout[1]), _is_kept(w3, dropout[1]))
    keep = tl.join(even, odd)  # (..., 2, 2): words 0, 1, 2, 3 of the last two axes in their order
    if TRANSPOSED:
        keep = tl.reshape(tl.permute(keep, (0, 2, 3, 1)), (BLOCK_N, rm.shape[0]))
    else:
        keep = tl.reshape(keep, (rm.shape[0], BLOCK_N))
    return tl.where(keep != 0, tl.full((), dropout[2], ACC), 0.0)


@triton.jit
def _is_kept(word, threshold):
    # 24 bits are exact in float32. A byte is what the change of layout that follows has to move.
    return ((word >> 8).to(tl.float32) >= threshold).to(tl.int8)


@triton.jit(do_not_specialize=SIZES)
def sum_splits(partial_ptr, x_ptr, size, num_splits, BLOCK: tl.constexpr, ACC: tl.constexpr):
    """Sum of the splits, x = partial[0] + partial[1] + ... in that order. Grid (tiles,).

    x has ``size`` elements, and so has each split.
    """
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    total = tl.zeros((BLOCK,), ACC)
    for _ in range(num_splits):
        total += tl.load(partial_ptr + at, mask=inside, other=0.0)
        partial_ptr += size
    tl.store(x_ptr + at, cast(total, x_ptr.dtype.element_ty), mask=inside)
