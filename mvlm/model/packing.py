"""Packed sequences: rows of different lengths one after another, with no padding between.

Shape legend: B sequences, T packed rows, L rows of the longest sequence, M masked tokens, R drawn sequences, C width.
"""

from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mvlm_dataloading import Batch, Masks

KEY_MULTIPLE = 16
"""Multiple that longest captions are rounded up to: shapes then repeat, and a CPU's matrix products run faster."""


def round_up(number: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `number`."""
    return -(-number // multiple) * multiple


def round_up_length(length: int) -> int:
    """A longest length that repeats from batch to batch."""
    return round_up(length, KEY_MULTIPLE)


def pad_to_bucket(batch: Batch, masks: Masks, text_length: int) -> tuple[Batch, Masks]:
    """The batch with its totals rounded up, so that few shapes occur. For compiled steps and CUDA graphs.

    The number of tokens is rounded up to a multiple of a 16th of B x text_length, the number of masked tokens to a
    multiple of a third of that, and the longest length as `round_up_length` does. The added tokens come after the last
    caption. The added masked tokens point at them. Both are ignored.
    """
    multiple = round_up(max(1, len(batch.image_id) * text_length // 16), 16)
    total, masked = len(batch.tokens), len(masks.token_ids)
    tokens = round_up(total + 1, multiple)  # at least one more, for the added masked tokens to point at
    added = round_up(masked, round_up(multiple // 3, 16)) - masked
    return (
        replace(batch, tokens=F.pad(batch.tokens, (0, tokens - total)), max_length=round_up_length(batch.max_length)),
        replace(masks, token_ids=F.pad(masks.token_ids, (0, added), value=tokens - 1)),
    )


def mask_tokens(tokens: Tensor, token_ids: Tensor, mask_token_id: int) -> Tensor:
    """A copy of the packed tokens int64 (T,) with [MASK] at the positions token_ids int64 (M,)."""
    return tokens.index_fill(0, token_ids, mask_token_id)


class Packing:
    """Layout of packed rows: sequence bounds, and each row's place once padded.

    Everything is computed on the device from `cu_seqlens`, once, when it is first needed.

    Args:
        cu_seqlens: int32 (B+1,), rising; sequence b is rows cu_seqlens[b] to cu_seqlens[b+1].
        max_length: at least the rows of the longest sequence, L; a host number.
        total: number of rows, T; a host number. Rows from cu_seqlens[-1] on belong to no sequence: they may hold
            anything and are never read.
    """

    def __init__(self, cu_seqlens: Tensor, max_length: int, total: int) -> None:
        self.cu_seqlens, self.max_length, self.total = cu_seqlens, max_length, total
        self._owner: Tensor | None = None
        self._place: Tensor | None = None
        self._exists: Tensor | None = None

    def __len__(self) -> int:
        return len(self.cu_seqlens) - 1

    @property
    def lengths(self) -> Tensor:
        """int32 (B,), rows of each sequence."""
        return self.cu_seqlens[1:] - self.cu_seqlens[:-1]

    @property
    def owner(self) -> Tensor:
        """int64 (T,), the sequence of each row; B for a row of no sequence."""
        if self._owner is None:
            rows = torch.arange(self.total, device=self.cu_seqlens.device)
            self._owner = torch.searchsorted(self.cu_seqlens[1:].long(), rows, right=True)
        return self._owner

    @property
    def place(self) -> Tensor:
        """int64 (T,), each row's index in (B, L) flattened; B*L for a row of no sequence."""
        if self._place is None:
            rows = torch.arange(self.total, device=self.cu_seqlens.device)
            starts = self.cu_seqlens.long().index_select(0, self.owner)
            inside = self.owner * self.max_length + rows - starts
            self._place = torch.where(self.owner < len(self), inside, len(self) * self.max_length)
        return self._place

    @property
    def position(self) -> Tensor:
        """int64 (T,), each row's position in its sequence, below L; 0 for a row of no sequence."""
        return self.place % self.max_length

    @property
    def exists(self) -> Tensor:
        """bool (B, L), True = a row of the sequence, False = padding."""
        if self._exists is None:
            self._exists = torch.arange(self.max_length, device=self.cu_seqlens.device) < self.lengths[:, None]
        return self._exists

    def pad(self, x: Tensor) -> Tensor:
        """(T, ...) -> (B, L, ...), zeros for padding."""
        # One row more than B*L receives the rows of no sequence, whatever they hold.
        padded = x.new_zeros(len(self) * self.max_length + 1, *x.shape[1:]).index_copy(0, self.place, x)
        return padded[:-1].unflatten(0, (len(self), self.max_length))

    def unpad(self, x: Tensor) -> Tensor:
        """(B, L, ...) -> (T, ...); rows of no sequence get the last place, whatever it holds."""
        return x.flatten(0, 1).index_select(0, self.place.clamp(max=len(self) * self.max_length - 1))

    def with_max_length(self, length: int) -> "Packing":
        """The same rows with another bound of their lengths."""
        return self if length == self.max_length else Packing(self.cu_seqlens, length, self.total)

    def select(self, sequences: Tensor, capacity: int) -> tuple["Packing", Tensor]:
        """Packing of the sequences int64 (R,), in this order and with repetitions, and their rows here.

        The rows are int64 (capacity,), 0 for a row of no sequence. `capacity` is a host number, at least the rows that
        the chosen sequences have together.
        """
        starts = self.cu_seqlens.long()
        lengths = (starts[1:] - starts[:-1]).index_select(0, sequences)  # (R,)
        bounds = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        chosen = Packing(bounds.int(), self.max_length, capacity)
        owner = chosen.owner.clamp(max=len(sequences) - 1)
        first = starts.index_select(0, sequences).index_select(0, owner)
        rows = first + torch.arange(capacity, device=starts.device) - bounds.index_select(0, owner)
        return chosen, torch.where(chosen.owner < len(sequences), rows, 0)


class PackedText(NamedTuple):
    """Features of packed captions."""

    rows: Tensor
    """(T, C)."""
    packing: Packing
    """Layout of the rows."""

    def first(self) -> Tensor:
        """[CLS] of each caption: (B, 1, C)."""
        return self.rows.index_select(0, self.packing.cu_seqlens[:-1]).unsqueeze(1)

    def padded(self) -> tuple[Tensor, Tensor]:
        """Features (B, L, C), zeros for padding, and the key mask bool (B, L), True = a token."""
        return self.packing.pad(self.rows), self.packing.exists


def pack(x: Tensor, lengths: Tensor) -> PackedText:
    """Padded captions (R, L, C) of lengths int (R,), packed.

    The host does not know the sum of the lengths, so R*L rows are returned; those after the last caption are ignored.
    """
    number, longest, _ = x.shape
    cu_seqlens = F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)  # (R+1,)
    place = torch.arange(number * longest, device=x.device)
    caption = torch.searchsorted(cu_seqlens[1:].long(), place, right=True).clamp(max=number - 1)
    rows = caption * longest + (place - cu_seqlens[caption]).clamp(max=longest - 1)
    return PackedText(x.flatten(0, 1).index_select(0, rows), Packing(cu_seqlens, longest, number * longest))
