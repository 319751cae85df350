"""Packed sequences: rows of sequences of different lengths, one sequence after another, without padding.

Shape legend: B sequences, T packed rows, L rows of the longest sequence, M masked tokens, R selected sequences,
C width.
"""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from mvlm.device import chosen_precision
from mvlm_dataloading import Batch, Masks
from mvlm_kernels.cross_attention.packed import Layout, layout_of

LENGTH_MULTIPLE = 16
"""Longest lengths are rounded up to a multiple of this: shapes then repeat, and a CPU's matrix products run faster."""
TOTAL_MULTIPLE = 32
"""In bf16 on a CPU, totals of drawn captions are rounded up to a multiple of this, for the same reasons."""


def round_up(number: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `number`."""
    return -(-number // multiple) * multiple


def round_up_length(length: int) -> int:
    """Round the longest length of a batch up, so that few lengths occur."""
    return round_up(length, LENGTH_MULTIPLE)


def pad_to_bucket(batch: Batch, masks: Masks, text_length: int, buckets: int = 16) -> tuple[Batch, Masks]:
    """Round the numbers of tokens and of masked tokens of a batch up, so that few shapes occur.

    The number of tokens is rounded up to a multiple of B x text_length / `buckets`, and the number of masked tokens to
    a multiple of a third of that. Both multiples are themselves rounded up to multiples of 16. The longest length is
    rounded up by `round_up_length`, but not above `text_length`. The added tokens come after the last caption. The
    added masked tokens point at them. Both are ignored.
    """
    multiple = round_up(max(1, len(batch.image_id) * text_length // buckets), 16)
    total = len(batch.tokens)
    tokens = round_up(total + 1, multiple)  # at least one more, for the added masked tokens to point at
    masked = len(masks.token_ids)
    added = round_up(masked, round_up(multiple // 3, 16)) - masked
    masks = replace(masks, token_ids=_pad(masks.token_ids, added, tokens - 1))
    # Captions above `text_length` keep their length, for the model to refuse them.
    longest = max(batch.max_length, min(round_up_length(batch.max_length), text_length))
    return replace(batch, tokens=_pad(batch.tokens, tokens - total), max_length=longest), masks


def eager_buckets(device: torch.device, precision: str) -> int:
    """The argument `buckets` of `pad_to_bucket` for a fast eager step of one rank; 0 if batches stay as they are.

    On a CPU a new shape costs some milliseconds, where a graph costs seconds, so the totals grow less.
    """
    return 64 if device.type == "cpu" and chosen_precision(device, precision) == "bf16" else 0


def room_for(packing: "Packing", texts: Tensor, max_rows: int | None, dtype: torch.dtype) -> int:
    """Number of rows to allocate for the captions texts int64 (R,) of a packing: at least their tokens, a Python int.

    Only the device knows how many tokens they have. Asking costs nothing on a CPU; products in bf16 get the number
    rounded up. On a GPU asking would be a sync, so an upper bound is taken there: R of the longest length, and no more
    than `max_rows`, if given.
    """
    if texts.device.type == "cpu" and not torch.compiler.is_compiling():
        rows = int(packing.lengths.index_select(0, texts).sum())
        return round_up(rows, TOTAL_MULTIPLE) if dtype == torch.bfloat16 else rows
    bound = len(texts) * packing.max_length
    return bound if max_rows is None else min(bound, max_rows)


def _pad(x: Tensor, added: int, value: int = 0) -> Tensor:
    """Append `added` elements of a value to a 1-D tensor.

    The result is pinned if `x` is: its copy to a GPU does not wait.
    """
    padded = x.new_full((len(x) + added,), value, pin_memory=x.is_pinned())
    padded[: len(x)].copy_(x)
    return padded


def mask_tokens(tokens: Tensor, token_ids: Tensor, mask_token_id: int) -> Tensor:
    """A copy of the packed tokens int64 (T,) with [MASK] at the positions token_ids int64 (M,)."""
    return tokens.index_fill(0, token_ids, mask_token_id)


def pack_two(tokens: Tensor, others: Tensor, cu_seqlens: Tensor, max_length: int) -> tuple[Tensor, "Packing"]:
    """Pack two copies of the captions one after the other: each int64 (T,), with the bounds cu_seqlens int32 (B+1,).

    Returns tokens int64 (2T,) and the layout of 2B captions.
    """
    # A packing allows padding positions (see `pad_to_bucket`) only after its last sequence. The first caption of the
    # second copy therefore follows the last one of the first, and all padding comes at the end. `end` stays on the
    # device.
    total, end = len(tokens), cu_seqlens[-1:].long()
    rows = torch.arange(2 * total, device=end.device)
    copy = (rows >= end).long()
    index = copy * total + (rows - copy * end).clamp(max=total - 1)
    bounds = torch.cat([cu_seqlens[:-1], cu_seqlens + cu_seqlens[-1:]])
    return torch.cat([tokens, others]).index_select(0, index), Packing(bounds, max_length, 2 * total)


def second_of_two(x: Tensor, packing: "Packing") -> "PackedText":
    """Features of the second of two copies of the captions, from those of both, x (2T, C), packed by `pack_two`."""
    captions, total = len(packing) // 2, packing.total // 2
    cu_seqlens = packing.cu_seqlens[captions:] - packing.cu_seqlens[captions]
    rows = packing.cu_seqlens[captions].long() + torch.arange(total, device=x.device)
    rows = x.index_select(0, rows.clamp(max=packing.total - 1))
    return PackedText(rows, Packing(cu_seqlens, packing.max_length, total))


class Packing:
    """Layout of packed rows: the bounds of the sequences, and the place of each row after padding.

    Places are computed on the device from `cu_seqlens`, once, at first use.

    Args:
        cu_seqlens: int32 (B+1,), rising; sequence b is rows cu_seqlens[b] to cu_seqlens[b+1].
        max_length: L, at least the rows of the longest sequence; a host number.
        total: T, the number of rows; a host number. Rows from cu_seqlens[-1] on are padding rows: they belong to
            no sequence, may hold anything, and are ignored.
    """

    def __init__(self, cu_seqlens: Tensor, max_length: int, total: int) -> None:
        self.cu_seqlens, self.max_length, self.total = cu_seqlens, max_length, total
        self._layout: Layout | None = None

    def __len__(self) -> int:
        return len(self.cu_seqlens) - 1

    @property
    def lengths(self) -> Tensor:
        """int32 (B,), number of rows of each sequence."""
        return self.cu_seqlens[1:] - self.cu_seqlens[:-1]

    @property
    def layout(self) -> Layout:
        """The place of each row after padding."""
        if self._layout is None:
            self._layout = layout_of(self.cu_seqlens, self.max_length, self.total)
        return self._layout

    @property
    def sequence_of_row(self) -> Tensor:
        """int64 (T,), the sequence of each row; B for a padding row."""
        return self.layout.sequence_of_row

    @property
    def position(self) -> Tensor:
        """int64 (T,), position of each row in its sequence, below L; 0 for a padding row."""
        return self.layout.padded_index % self.max_length

    @property
    def key_mask(self) -> Tensor:
        """bool (B, L), True = a row of the sequence, False = padding."""
        return self.layout.exists

    def pad(self, x: Tensor) -> Tensor:
        """Pad rows (T, ...) with zeros -> (B, L, ...)."""
        return self.layout.pad(x)

    def unpad(self, x: Tensor) -> Tensor:
        """The inverse of `pad`: (B, L, ...) -> (T, ...). Padding rows are zero."""
        return self.layout.unpad(x)

    def with_rounded_length(self) -> "Packing":
        """Layout of the same sequences with the maximum length L rounded up, so that few shapes occur."""
        length = round_up_length(self.max_length)
        return self if length == self.max_length else Packing(self.cu_seqlens, length, self.total)

    def select(self, sequences: Tensor, capacity: int) -> tuple["Packing", Tensor]:
        """Select the sequences int64 (R,), in this order and with repetitions. Returns their layout and their rows.

        The rows are int64 (capacity,), indices of the rows of this layout; 0 for a padding row. `capacity` is a
        host number, at least the number of rows of the selected sequences together.
        """
        starts = self.cu_seqlens.long()
        lengths = (starts[1:] - starts[:-1]).index_select(0, sequences)  # (R,)
        bounds = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        selected = Packing(bounds.int(), self.max_length, capacity)
        # Padding rows take the last sequence here, to stay within bounds, and are set to 0 at the end.
        sequence = selected.sequence_of_row.clamp(max=len(sequences) - 1)
        first = starts.index_select(0, sequences).index_select(0, sequence)
        rows = first + torch.arange(capacity, device=starts.device) - bounds.index_select(0, sequence)
        return selected, torch.where(selected.sequence_of_row < len(sequences), rows, 0)


class PackedText(NamedTuple):
    """Features of B captions, packed one after another without padding."""

    rows: Tensor
    """(T, C), features of all tokens, one caption after another."""
    packing: Packing
    """Bounds of the captions among the rows."""

    def first(self) -> Tensor:
        """Features of the [CLS] of each caption: (B, 1, C)."""
        return self.rows.index_select(0, self.packing.cu_seqlens[:-1]).unsqueeze(1)

    def padded(self) -> tuple[Tensor, Tensor]:
        """Features (B, L, C), zeros for padding, and the key mask bool (B, L), True = a token."""
        return self.packing.pad(self.rows), self.packing.key_mask
