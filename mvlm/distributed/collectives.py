"""Differentiable collectives on rows of the global batch: gather all rows, or fetch rows by global index.

Global indices follow the loader's order. The batch consists of blocks of b pairs; block k is microbatch k // W of rank
k % W.

Shape legend: W ranks, A microbatches a rank, b pairs of a microbatch, n = A b pairs of a rank, G = W n pairs of the
global batch, R requested rows, F elements of a row.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True, slots=True)
class GlobalBatchLayout:
    """Positions of this rank's pairs in the global batch: numbers on the host."""

    rank: int
    ranks: int
    """W, number of ranks."""
    microbatches: int
    """A, microbatches of each rank."""
    pairs: int
    """b, pairs of each microbatch."""

    @property
    def total(self) -> int:
        """G, the pairs of the global batch."""
        return self.ranks * self.microbatches * self.pairs

    def indices(self, microbatch: int, device: torch.device) -> Tensor:
        """Global indices int64 (b,) of the pairs of one of this rank's microbatches."""
        first = (microbatch * self.ranks + self.rank) * self.pairs
        return torch.arange(first, first + self.pairs, device=device)

    def own_indices(self, device: torch.device) -> Tensor:
        """Global indices int64 (n,) of all pairs of this rank, in the order of its microbatches."""
        return torch.cat([self.indices(a, device) for a in range(self.microbatches)])


def gather_rows(x: Tensor, layout: GlobalBatchLayout) -> Tensor:
    """Gather rows (n, ...) of every rank into (G, ...), ordered by global index. No gradient."""
    if layout.ranks == 1:
        return x
    parts = x.new_empty(layout.ranks, *x.shape)
    dist.all_gather(list(parts), x.contiguous())
    # (W, A, b, ...) -> (A, W, b, ...): global order deals a microbatch to every rank before the next microbatch.
    return parts.unflatten(1, (layout.microbatches, layout.pairs)).transpose(0, 1).flatten(0, 2)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layout: GlobalBatchLayout) -> Tensor:
        ctx.layout = layout
        return gather_rows(x, layout)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        layout: GlobalBatchLayout = ctx.layout
        parts = grad.unflatten(0, (layout.microbatches, layout.ranks, layout.pairs)).transpose(0, 1).contiguous()
        own = torch.empty_like(parts[0])
        dist.reduce_scatter(own, list(parts))
        return own.flatten(0, 1), None


def gather_rows_with_gradient(x: Tensor, layout: GlobalBatchLayout) -> Tensor:
    """`gather_rows` with a gradient: the owner of a row gets the sum of its gradients on all ranks."""
    return x if layout.ranks == 1 else _GatherRows.apply(x, layout)  # pyright: ignore[reportReturnType]


class _FetchRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, wanted: Tensor, layout: GlobalBatchLayout, *own: Tensor) -> Tensor:
        ctx.layout, ctx.shape = layout, own[0].shape
        ctx.save_for_backward(wanted)
        rows = wanted % layout.pairs
        # All ranks broadcast all blocks, whatever is wanted. To send only the wanted rows, the host would have to know
        # how many each rank wants, and wait for the device.
        fetched = own[0].new_zeros(len(wanted), *own[0].shape[1:])
        for block in range(layout.microbatches * layout.ranks):
            microbatch, owner = divmod(block, layout.ranks)
            sent = own[microbatch].contiguous() if owner == layout.rank else torch.empty_like(own[microbatch])
            if layout.ranks > 1:
                dist.broadcast(sent, owner)
            in_block = (wanted // layout.pairs == block).view(-1, *[1] * (sent.ndim - 1))
            fetched = torch.where(in_block, sent.index_select(0, rows), fetched)
        return fetched

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        layout: GlobalBatchLayout = ctx.layout
        # A row may be requested several times, and index_add_ would sum its gradients in an arbitrary order on CUDA. A
        # stable sort puts them next to each other in a fixed order, and segment_reduce sums them in that order.
        wanted, order = ctx.saved_tensors[0].sort(stable=True)
        grad = grad.index_select(0, order).flatten(1)  # (R, F)
        starts = torch.searchsorted(wanted, torch.arange(layout.total + 1, device=wanted.device))
        own = []
        for block in range(layout.microbatches * layout.ranks):
            first, owner = block * layout.pairs, block % layout.ranks
            offsets = starts[first : first + layout.pairs + 1]
            sums = torch.segment_reduce(grad, "sum", offsets=offsets, axis=0, unsafe=True)  # (b, F)
            if layout.ranks > 1:
                dist.reduce(sums, owner)
            if owner == layout.rank:
                own.append(sums.view(ctx.shape))
        return None, None, *own


def fetch_rows(own: Sequence[Tensor], wanted: Tensor, layout: GlobalBatchLayout) -> Tensor:
    """Fetch rows by global index wanted int64 (R,), from the ranks that own them: (R, ...).

    own are this rank's rows, (b, ...) for each of its microbatches. Ranks broadcast their blocks in turn and keep the
    rows they asked for: sizes are static, the host never waits, and one remote block is in memory at a time. Backward
    returns gradients the same way, one block at a time.
    """
    return _FetchRows.apply(wanted, layout, *own)  # pyright: ignore[reportReturnType]
