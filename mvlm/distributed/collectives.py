"""Features that travel between ranks, with gradients that travel back: gathering embeddings, fetching drawn rows.

The pairs of a global batch are numbered as the loader orders them: blocks of b pairs, block k belonging to rank k % W
as its microbatch k // W. Shape legend: W ranks, A microbatches a rank, b pairs of a microbatch, n = A b pairs of a
rank, G = W n pairs of the global batch, R rows asked for, L tokens a caption may have, C width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mvlm.model.encoders import PackedText


@dataclass(frozen=True, slots=True)
class Place:
    """Where the pairs of this rank stand in the global batch. All of it is known to the host."""

    rank: int
    ranks: int
    """W."""
    microbatches: int
    """A, of each rank."""
    pairs: int
    """b, of each microbatch."""

    @property
    def total(self) -> int:
        """G, the pairs of the global batch."""
        return self.ranks * self.microbatches * self.pairs

    def numbers(self, microbatch: int, device: torch.device) -> Tensor:
        """Global numbers int64 (b,) of the pairs of one of this rank's microbatches."""
        first = (microbatch * self.ranks + self.rank) * self.pairs
        return torch.arange(first, first + self.pairs, device=device)

    def own_numbers(self, device: torch.device) -> Tensor:
        """Global numbers int64 (n,) of all pairs of this rank, microbatch after microbatch."""
        return torch.cat([self.numbers(a, device) for a in range(self.microbatches)])


def gather(x: Tensor, place: Place) -> Tensor:
    """Rows (n, ...) of this rank -> those of all ranks (G, ...), by global number. Without gradient."""
    if place.ranks == 1:
        return x
    parts = x.new_empty(place.ranks, *x.shape)
    dist.all_gather(list(parts), x.contiguous())
    return parts.unflatten(1, (place.microbatches, place.pairs)).transpose(0, 1).flatten(0, 2)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, place: Place) -> Tensor:
        ctx.place = place
        return gather(x, place)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        place: Place = ctx.place
        parts = grad.unflatten(0, (place.microbatches, place.ranks, place.pairs)).transpose(0, 1).contiguous()
        own = torch.empty_like(parts[0])
        dist.reduce_scatter(own, list(parts))
        return own.flatten(0, 1), None


def gather_with_gradients(x: Tensor, place: Place) -> Tensor:
    """As `gather`; the gradient of a row is the sum of what all ranks have for it."""
    return x if place.ranks == 1 else _Gather.apply(x, place)  # pyright: ignore[reportReturnType]


class _Fetch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, wanted: Tensor, place: Place, *own: Tensor) -> Tensor:
        ctx.place, ctx.shape = place, own[0].shape
        ctx.save_for_backward(wanted)
        rows = wanted % place.pairs
        fetched = own[0].new_zeros(len(wanted), *own[0].shape[1:])
        for block in range(place.microbatches * place.ranks):
            microbatch, owner = divmod(block, place.ranks)
            sent = own[microbatch].contiguous() if owner == place.rank else torch.empty_like(own[microbatch])
            if place.ranks > 1:
                dist.broadcast(sent, owner)
            here = (wanted // place.pairs == block).view(-1, *[1] * (sent.ndim - 1))
            fetched = torch.where(here, sent.index_select(0, rows), fetched)
        return fetched

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        place: Place = ctx.place
        # Rows asked for more than once lie together in a stable order, so that they always add up in the same one.
        wanted, order = ctx.saved_tensors[0].sort(stable=True)
        grad = grad.index_select(0, order).flatten(1)  # (R, F)
        starts = torch.searchsorted(wanted, torch.arange(place.total + 1, device=wanted.device))
        own = []
        for block in range(place.microbatches * place.ranks):
            first, owner = block * place.pairs, block % place.ranks
            offsets = starts[first : first + place.pairs + 1]
            sums = torch.segment_reduce(grad, "sum", offsets=offsets, axis=0, unsafe=True)  # (b, F)
            if place.ranks > 1:
                dist.reduce(sums, owner)
            if owner == place.rank:
                own.append(sums.view(ctx.shape))
        return None, None, *own


def fetch(own: Sequence[Tensor], wanted: Tensor, place: Place) -> Tensor:
    """The rows with the global numbers wanted int64 (R,), whoever has them: (R, ...).

    own are this rank's features, (b, ...) for each of its microbatches. Every rank shows its blocks in turn and each
    takes what it asked for, so that no size depends on what was drawn, the host waits for nothing, and one block is in
    memory beside what is returned. Gradients go back the same way.
    """
    return _Fetch.apply(wanted, place, *own)  # pyright: ignore[reportReturnType]


def pack(x: Tensor, lengths: Tensor) -> PackedText:
    """Padded captions (R, L, C) of lengths int (R,) -> packed. The host knows no total: the tail is never read."""
    number, longest, _ = x.shape
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)  # (R+1,)
    place = torch.arange(number * longest, device=x.device)
    caption = torch.searchsorted(cu_seqlens[1:].long(), place, right=True).clamp(max=number - 1)
    rows = caption * longest + (place - cu_seqlens[caption]).clamp(max=longest - 1)
    return PackedText(x.flatten(0, 1).index_select(0, rows), cu_seqlens, longest)
