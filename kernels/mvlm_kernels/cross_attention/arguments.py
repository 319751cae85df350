"""Arguments of cross-attention: the two tuples in which they travel, their checks, and lengths that follow from shapes.

Only :func:`check_values` reads tensors. It runs on the CPU, and on a GPU in debug mode.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from mvlm_kernels import dispatch
from mvlm_kernels.arguments import FLOATS, INDICES, check_int, check_number, check_tensor
from mvlm_kernels.cross_attention.packed import kept_with

HEAD_WIDTHS = tuple(range(8, 129, 8))
"""Head widths D with a kernel."""
LONGEST_SHORT_SIDE = 128
"""Longest sequence of a side that counts as short. The kernels keep the short side on chip."""
_longest = LONGEST_SHORT_SIDE


OF_TORCH = {
    "key_padding_mask": "pass key_mask=~key_padding_mask, in which True = the key exists",
    "attn_mask": "keys may be masked (key_mask, key_lengths), single scores may not: use scaled_dot_product_attention",
    "is_causal": "there are no causal masks: use scaled_dot_product_attention",
    "enable_gqa": "leave it out, k and v may have fewer heads than q",
    "need_weights": "they are (scale * q @ k^T - lse).exp() of the op's log-sum-exp, return_lse=True",
}
"""Arguments of torch's attentions that the op lacks, and what to do instead."""


def refuse_others(given: Iterable[str]) -> None:
    """Raise TypeError if there are arguments that the op does not have."""
    for name in given:
        hint = f"{name} is an argument of torch's attention: {OF_TORCH[name]}" if name in OF_TORCH else None
        raise TypeError(hint or f"cross_attention() has no argument {name!r}")


class Sides(NamedTuple):
    """Tensors beside q, k and v, as :func:`mvlm_kernels.cross_attention` takes them; None where not given.

    reader_order, reader_spans: of :func:`invert_key_index`.
    """

    key_lengths: Tensor | None = None
    key_mask: Tensor | None = None
    key_index: Tensor | None = None
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    reader_order: Tensor | None = None
    reader_spans: Tensor | None = None


class Options(NamedTuple):
    """Numbers of a call. Lengths are those of :func:`longest_sequences`. seed: int64 (), or None without a dropout."""

    scale: float
    max_len_q: int
    max_len_k: int
    dropout_p: float = 0.0
    seed: Tensor | None = None


FLAT = 12
"""Number of arguments of a registered op that :func:`unflattened` takes: the fields of `Sides` and `Options`."""


def unflattened(flat: tuple[Any, ...]) -> tuple[Sides, Options]:
    """Make `Sides` and `Options` of the last FLAT arguments of a registered op, whose schema has no nested tuples."""
    # A third of the host's time of Sides(*flat[:7]), which enters a Python function.
    return tuple.__new__(Sides, flat[:7]), tuple.__new__(Options, flat[7:])


@contextmanager
def short_sides_up_to(rows: Literal[128, 256]) -> Iterator[None]:
    """Inside the block, sides of up to this many rows count as short.

    256 sends self-attention between 197 or 257 image patches to the kernels: for measurements on GPUs with wgmma
    (compute capability 9.0 and later), in 16-bit types, with heads of at most 64. No GPU has timed it, so it is no
    default.
    """
    global _longest
    before, _longest = _longest, rows
    try:
        yield
    finally:
        _longest = before


def short_side(max_len_q: int, max_len_k: int) -> str | None:
    """The side that the kernels keep on chip, "kv" or "q"; None if both are too long.

    max_len_q, max_len_k: longest sequence of each side; negative if unknown, which counts as long.
    """
    if 0 <= max_len_k <= _longest:
        return "kv"
    return "q" if 0 <= max_len_q <= _longest else None


def bucket(length: int) -> int:
    """Tile length of the short side: a power of two from 16, which a matrix instruction needs.

    The result is a plain int, even for a compiler's symbolic length.
    """
    return 16 if length <= 16 else 32 if length <= 32 else 64 if length <= 64 else 128 if length <= 128 else 256


def scale_of(scale: float | None, width: int) -> float:
    """The factor of the scores as a float; ``width ** -0.5`` by default.

    Raises ValueError for a tensor, and for what is no finite number.
    """
    if scale is None:
        return float(width**-0.5)
    if isinstance(scale, Tensor):
        raise ValueError(
            f"scale must be a float, got a tensor of shape {tuple(scale.shape)}, which would get no gradient; "
            "multiply q by it and pass scale=1.0"
        )
    return float(check_number("scale", scale))


def dropout_of(p: float, seed: int | Tensor | None, device: torch.device) -> tuple[float, Tensor | None]:
    """Dropout's probability and its seed, int64 (): None without a dropout, or if none is given.

    Raises ValueError for a probability outside [0, 1) and a seed of another kind or device.
    """
    p = check_number("dropout_p", p, 0.0)
    if p >= 1:
        raise ValueError(f"dropout_p must be a float in [0, 1), got {p}")
    if isinstance(seed, Tensor):
        check_tensor("seed", seed, (torch.int64,), device)
        if seed.numel() != 1:
            raise ValueError(f"seed must be an int or a tensor of one element, got shape {tuple(seed.shape)}")
    elif seed is not None:
        seed = torch.full((), check_int("seed", seed, 0), dtype=torch.int64, device=device)
    return float(p), seed if p else None


def as_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """q, k and v in autocast's dtype if it is on. float64 stays float64, as in torch's own ops.

    What is no tensor stays as it is, for :func:`check_arguments` to name.
    """
    q = tensors[0]
    dtype = dispatch.autocast_dtype(q.device) if isinstance(q, Tensor) else None
    if dtype is None or q.dtype == torch.float64:
        return tensors
    return tuple(x.to(dtype) if isinstance(x, Tensor) else x for x in tensors)


def longest_sequences(
    q: Tensor, k: Tensor, sides: Sides, max_len_q: int | None, max_len_k: int | None
) -> tuple[int, int]:
    """Longest sequence of each side as far as the host knows; -1 for a packed long side of unknown length.

    A packed side without max_len is assumed to hold text of at most 128 tokens, unless the other side is known to be
    short.
    """
    len_q = q.shape[1] if sides.cu_seqlens_q is None else max_len_q
    len_k = k.shape[1] if sides.cu_seqlens_k is None else max_len_k
    if len_k is None:
        len_k = -1 if len_q is not None and len_q <= LONGEST_SHORT_SIDE else LONGEST_SHORT_SIDE
    if len_q is None:
        len_q = -1 if 0 <= len_k <= LONGEST_SHORT_SIDE else LONGEST_SHORT_SIDE
    return len_q, len_k


def key_sequences(k: Tensor, sides: Sides) -> int:
    """B', the number of key sequences."""
    return k.shape[0] if sides.cu_seqlens_k is None else sides.cu_seqlens_k.shape[0] - 1


def check_arguments(
    q: Tensor, k: Tensor, v: Tensor, sides: Sides, max_len_q: int | None, max_len_k: int | None
) -> None:
    """Raise ValueError for shapes, dtypes and devices that do not fit. The error names the argument, wanted and got."""
    key_lengths, key_mask, key_index, cu_seqlens_q, cu_seqlens_k, _, _ = sides
    check_tensor("q", q, ())
    device = q.device
    check_tensor("k", k, (), device)
    check_tensor("v", v, (), device)
    _check_side("q", q, cu_seqlens_q, max_len_q, device)
    _check_side("k", k, cu_seqlens_k, max_len_k, device)
    q_shape, k_shape, dtype = q.shape, k.shape, q.dtype
    if v.shape != k_shape:
        raise ValueError(f"v must have the shape of k, {tuple(k_shape)}, got {tuple(v.shape)}")
    if k_shape[-2:] != q_shape[-2:] and (k_shape[-1] != q_shape[-1] or not k_shape[-2] or q_shape[-2] % k_shape[-2]):
        wanted, got = tuple(q_shape[-2:]), tuple(k_shape[-2:])
        raise ValueError(
            f"k must have the head width of q and its number of heads or a divisor of it, {wanted}, got {got}; the "
            "layout is (batch, length, heads, width)"
        )
    if not q_shape[-1]:
        raise ValueError(f"q must have a head width of at least 1, got shape {tuple(q_shape)}")
    if dtype not in FLOATS or k.dtype != dtype or v.dtype != dtype:
        raise ValueError(
            "q, k and v must have one dtype of float16, bfloat16, float32 and float64, got "
            f"{dtype}, {k.dtype} and {v.dtype}"
        )
    k_seqs = k_shape[0] if cu_seqlens_k is None else cu_seqlens_k.shape[0] - 1
    q_seqs = q_shape[0] if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1
    if key_index is None:
        if q_seqs != k_seqs:
            raise ValueError(f"k must have the {q_seqs} sequences of q (or give key_index), got {k_seqs}")
    else:
        _check_index("key_index", key_index, q_seqs, device)
        if q_seqs and not k_seqs:
            raise ValueError("k must have a sequence that key_index can name, got none")
    if key_lengths is not None:
        if cu_seqlens_k is not None:
            raise ValueError("key_lengths must be None where cu_seqlens_k gives the lengths, got a tensor")
        _check_index("key_lengths", key_lengths, k_seqs, device)
    if key_mask is not None:
        if cu_seqlens_k is not None:
            raise ValueError("key_mask must be None where cu_seqlens_k packs the keys, got a tensor")
        check_tensor("key_mask", key_mask, (), device)
        _check_mask(key_mask, k_seqs, k_shape[1])


def _check_mask(key_mask: Tensor, k_seqs: int, length: int) -> None:
    if key_mask.dtype not in (torch.bool, torch.int64):
        raise ValueError(
            f"key_mask must be bool, or int64 words from pack_key_mask, got {key_mask.dtype}; of a mask that is added "
            "to scores, pass mask == 0"
        )
    wanted = (k_seqs, length if key_mask.dtype == torch.bool else (length + 63) // 64)
    if key_mask.shape == wanted:
        return
    if key_mask.shape == (k_seqs, length):
        raise ValueError(
            f"key_mask must be bool, got {key_mask.dtype}, which is for the words of pack_key_mask; of a mask of 0 and "
            "1, pass mask.bool()"
        )
    raise ValueError(f"key_mask must have shape {wanted}, got {tuple(key_mask.shape)}")


def _check_side(name: str, x: Tensor, cu_seqlens: Tensor | None, max_len: int | None, device: torch.device) -> None:
    if cu_seqlens is None:
        if x.dim() != 4:
            raise ValueError(f"{name} must be (batch, length, heads, width), got shape {tuple(x.shape)}")
        if max_len is not None:
            raise ValueError(f"max_len_{name} must be None where {name} is dense, got {max_len}")
        return
    if x.dim() != 3:
        raise ValueError(f"{name} must be packed (rows, heads, width) with cu_seqlens_{name}, got {tuple(x.shape)}")
    check_tensor(f"cu_seqlens_{name}", cu_seqlens, INDICES, device)
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"cu_seqlens_{name} must have shape (sequences + 1,), got {tuple(cu_seqlens.shape)}")
    if max_len is not None:
        check_int(f"max_len_{name}", max_len, 0)


def invert_key_index(key_index: Tensor, sequences: int) -> tuple[Tensor, Tensor]:
    """Query sequences that read each key sequence: order (B,) and spans (B', 3), int64.

    A row of spans is a key sequence r, first and last: the query sequences order[first:last], ascending, read r. Key
    sequences with more readers come first, so that the programs of a grid with most work start first. An index outside
    [0, B') counts as the nearest one, so that exactly one program writes the gradient of each query sequence. That
    gradient is NaN. Made once for all calls with this index. sequences: B', at least 1.
    """

    def make() -> tuple[Tensor, Tensor]:
        sorted_index, order = torch.sort(key_index.long().clamp(0, sequences - 1), stable=True)
        bounds = torch.arange(sequences + 1, device=key_index.device)
        first, last = torch.searchsorted(sorted_index, bounds).unfold(0, 2, 1).unbind(1)
        rank = torch.argsort(first - last, stable=True)  # most readers first
        return order, torch.stack([rank, first[rank], last[rank]], dim=1)

    return kept_with(key_index, ("readers", sequences), make)


def _check_index(name: str, x: Tensor, length: int, device: torch.device) -> None:
    check_tensor(name, x, INDICES, device)
    if x.shape != (length,):
        raise ValueError(f"{name} must have shape ({length},), got {tuple(x.shape)}")


def check_values(q: Tensor, k: Tensor, sides: Sides, max_len_q: int, max_len_k: int) -> None:
    """Raise ValueError for lengths and indices out of range. On a GPU, reading them waits for the device."""
    for name, x, bounds, most in (("q", q, sides.cu_seqlens_q, max_len_q), ("k", k, sides.cu_seqlens_k, max_len_k)):
        if bounds is not None:
            check_bounds(name, x, bounds, most)
    check_ranges(k, sides)


def check_ranges(k: Tensor, sides: Sides) -> None:
    """Raise ValueError for key_lengths or key_index out of range. On a GPU, reading them waits for the device."""
    if sides.key_lengths is not None:
        _check_range("key_lengths", sides.key_lengths, k.shape[1])
    if sides.key_index is not None:
        _check_range("key_index", sides.key_index, key_sequences(k, sides) - 1)


def _check_range(name: str, x: Tensor, most: int) -> None:
    if x.numel():
        low, high = (int(y) for y in x.aminmax())
        if low < 0 or high > most:
            raise ValueError(f"{name} must be in 0..{most}, got {low}..{high}")


def check_bounds(name: str, x: Tensor, cu_seqlens: Tensor, max_len: int) -> None:
    """Raise ValueError for bounds that do not fit the rows of x, or max_len, which is negative if unknown."""
    lengths = cu_seqlens.diff()
    if int(cu_seqlens[0]) != 0 or int(cu_seqlens[-1]) > x.shape[0] or (lengths.numel() and int(lengths.min()) < 0):
        raise ValueError(
            f"cu_seqlens_{name} must rise from 0 to at most the {x.shape[0]} rows of {name}, got {cu_seqlens.tolist()}"
        )
    longest = int(lengths.max()) if lengths.numel() else 0
    if 0 <= max_len < longest:
        raise ValueError(f"max_len_{name} must be at least the longest sequence, {longest}, got {max_len}")
