"""Packed rows: sequences of different lengths one after another, with no padding between.

Shape legend: B sequences, T packed rows, L rows of the longest sequence.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from mvlm_dataloading import Batch, Masks


def round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


KEY_MULTIPLE = 16
"""Longest captions are rounded up to a multiple of this: shapes repeat, and a CPU's products like it."""


def rounded(length: int) -> int:
    """A longest length that repeats from batch to batch."""
    return round_up(length, KEY_MULTIPLE)


def bucketed(batch: Batch, masks: Masks, text_length: int) -> tuple[Batch, Masks]:
    """The same batch with its totals rounded up, so that few shapes occur: for the fast plan, compiled or in a CUDA
    graph.

    Tokens come in multiples of a 16th of what B captions of text_length have at most, masked tokens in multiples of a
    third of that. What is added lies behind the last caption and behind the last masked token, and is read by nobody.
    The longest length is rounded up too.
    """
    multiple = round_up(max(1, len(batch.image_id) * text_length // 16), 16)
    total, masked = len(batch.tokens), len(masks.token_ids)
    tokens = round_up(total + 1, multiple)  # at least one more, for the added masked tokens to point at
    added = round_up(masked, round_up(multiple // 3, 16)) - masked
    return (
        replace(batch, tokens=F.pad(batch.tokens, (0, tokens - total)), max_length=rounded(batch.max_length)),
        replace(masks, token_ids=F.pad(masks.token_ids, (0, added), value=tokens - 1)),
    )


class Packing:
    """Where packed rows lie. Everything is computed on the device from `cu_seqlens`, once, when it is first needed.

    Args:
        cu_seqlens: int32 (B+1,), rising; sequence b is rows cu_seqlens[b] to cu_seqlens[b+1].
        max_length: at least the rows of the longest sequence, L; a host number.
        total: rows that there are, T; a host number. Those from cu_seqlens[-1] on belong to no sequence: they may hold
            anything, and nothing is ever read from them.
    """

    def __init__(self, cu_seqlens: Tensor, max_length: int, total: int) -> None:
        self.cu_seqlens, self.max_length, self.total = cu_seqlens, max_length, total
        self._owner: Tensor | None = None
        self._place: Tensor | None = None
        self._exists: Tensor | None = None

    def __len__(self) -> int:
        return len(self.cu_seqlens) - 1

    @property
    def owner(self) -> Tensor:
        """int64 (T,), the sequence of each row; B for a row of none."""
        if self._owner is None:
            rows = torch.arange(self.total, device=self.cu_seqlens.device)
            self._owner = torch.searchsorted(self.cu_seqlens[1:].long(), rows, right=True)
        return self._owner

    @property
    def place(self) -> Tensor:
        """int64 (T,), where each row lies in (B, L) flattened; B*L for a row of none."""
        if self._place is None:
            rows = torch.arange(self.total, device=self.cu_seqlens.device)
            starts = self.cu_seqlens.long().index_select(0, self.owner)
            inside = self.owner * self.max_length + rows - starts
            self._place = torch.where(self.owner < len(self), inside, len(self) * self.max_length)
        return self._place

    @property
    def exists(self) -> Tensor:
        """bool (B, L), True = a row of the sequence, False = padding."""
        if self._exists is None:
            lengths = self.cu_seqlens[1:] - self.cu_seqlens[:-1]
            self._exists = torch.arange(self.max_length, device=lengths.device) < lengths[:, None]
        return self._exists

    def pad(self, x: Tensor) -> Tensor:
        """(T, ...) -> (B, L, ...), zeros for padding. One more row takes what belongs to no sequence."""
        padded = x.new_zeros(len(self) * self.max_length + 1, *x.shape[1:]).index_copy(0, self.place, x)
        return padded[:-1].unflatten(0, (len(self), self.max_length))

    def unpad(self, x: Tensor) -> Tensor:
        """(B, L, ...) -> (T, ...); rows of no sequence get the last place, whatever it holds."""
        return x.flatten(0, 1).index_select(0, self.place.clamp(max=len(self) * self.max_length - 1))

    def select(self, sequences: Tensor, capacity: int) -> tuple["Packing", Tensor]:
        """The packing of the sequences int64 (R,), in this order and with repetitions, and the rows int64 (capacity,)
        that it takes of this one. `capacity` is at least the rows that they have together; 0 stands for a row of none.
        """
        starts = self.cu_seqlens.long()
        lengths = (starts[1:] - starts[:-1]).index_select(0, sequences)  # (R,)
        bounds = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        chosen = Packing(bounds.int(), self.max_length, capacity)
        owner = chosen.owner.clamp(max=len(sequences) - 1)
        first = starts.index_select(0, sequences).index_select(0, owner)
        rows = first + torch.arange(capacity, device=starts.device) - bounds.index_select(0, owner)
        return chosen, torch.where(chosen.owner < len(sequences), rows, 0)
