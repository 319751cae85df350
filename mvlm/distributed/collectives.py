"""Collectives that run beside other work: gathers of rows, exchanges of rows, and the return of their gradients.

Global indices follow the loader's order. The batch consists of blocks of b pairs; block k is microbatch k // W of rank
k % W.

Shape legend: W ranks, A microbatches a rank, b pairs of a microbatch, n = A b pairs of a rank, G = W n pairs of the
global batch.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

# torch 2.13 renamed both; 2.11 has only the old names.
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


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

    def owner(self, index: Tensor) -> Tensor:
        """Ranks that have the pairs of these global indices, int64 like `index`."""
        return index // self.pairs % self.ranks

    def position(self, index: Tensor) -> Tensor:
        """Positions 0 to n - 1 of pairs among all pairs of their ranks, from global indices; int64 like `index`."""
        return index // (self.pairs * self.ranks) * self.pairs + index % self.pairs


class Pending:
    """Result of work in flight. `wait` returns it; on a GPU the stream waits, not the host."""

    def __init__(self, work: "dist.Work | None", result: Callable[[], Tensor]) -> None:
        self._work, self._result = work, result
        self._value: Tensor | None = None

    def wait(self) -> Tensor:
        """The result, the same tensor at every call."""
        if self._value is None:
            if self._work is not None:
                self._work.wait()
            self._value = self._result()
        return self._value


def start_gather(x: Tensor, layout: GlobalBatchLayout) -> Pending:
    """Start to gather rows (n, ...) of every rank into (G, ...), ordered by global index. No gradient."""
    if layout.ranks == 1:
        return Pending(None, lambda: x)
    parts = x.new_empty(layout.ranks * len(x), *x.shape[1:])
    work = _all_gather(parts, x.contiguous(), async_op=True)
    # (W A b, ...) -> (A W b, ...): global order deals a microbatch to every rank before the next microbatch.
    sizes = (layout.ranks, layout.microbatches, layout.pairs)
    return Pending(work, lambda: parts.unflatten(0, sizes).transpose(0, 1).flatten(0, 2))


class Journey(Protocol):
    """Rows that travel between ranks while other work runs, and their gradients, which travel back."""

    def arrive(self) -> Tensor:
        """Wait for the rows."""
        ...

    def start_return(self, grad: Tensor) -> None:
        """Start to send the gradient of the rows back."""
        ...

    def finish_return(self) -> Tensor:
        """Wait for the gradient of this rank's own rows: the sum over all ranks that received them."""
        ...


class Gather(Journey):
    """Gather rows (n, ...) of every rank into (G, ...), ordered by global index, with gradients.

    Rows travel in the dtype `wire` and arrive in their own. Gradients travel and add up in the rows' own dtype.
    """

    def __init__(self, x: Tensor, layout: GlobalBatchLayout, wire: torch.dtype) -> None:
        self._layout, self._dtype = layout, x.dtype
        self._rows = start_gather(x.detach() if layout.ranks == 1 else x.detach().to(wire), layout)
        self._sum: Pending | None = None

    def arrive(self) -> Tensor:
        return self._rows.wait().to(self._dtype)

    def start_return(self, grad: Tensor) -> None:
        layout = self._layout
        if layout.ranks == 1:
            self._sum = Pending(None, lambda: grad)
            return
        parts = grad.unflatten(0, (layout.microbatches, layout.ranks, layout.pairs)).transpose(0, 1).flatten(0, 2)
        own = parts.new_empty(len(parts) // layout.ranks, *parts.shape[1:])
        self._sum = Pending(_reduce_scatter(own, parts.contiguous(), async_op=True), lambda: own)

    def finish_return(self) -> Tensor:
        assert self._sum is not None
        return self._sum.wait()


class InFlight:
    """A journey in the autograd graph.

    Backward starts the return where the rows were used, and waits for it where they set out. Backward passes run later
    operations first: what stands between `InFlight(x, ...)` and `arrive` in forward stands between start and end of the
    return in backward.
    """

    def __init__(self, x: Tensor, journey: Journey) -> None:
        self._journey = journey
        self._token: Any = _Depart.apply(x, journey)

    def arrive(self) -> Tensor:
        """The rows, differentiable."""
        return _Arrive.apply(self._token, self._journey)  # pyright: ignore[reportReturnType]


class _Depart(torch.autograd.Function):
    """A scalar that stands for rows on their journey. Its gradient is ignored: that of the rows is the journey's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, journey: Journey) -> Tensor:
        ctx.journey = journey
        return x.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.journey.finish_return(), None


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, token: Tensor, journey: Journey) -> Tensor:
        ctx.journey, ctx.dtype = journey, token.dtype
        return journey.arrive()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        ctx.journey.start_return(grads[0])
        return torch.zeros((), dtype=ctx.dtype, device=grads[0].device), None


class Lane:
    """CUDA stream beside that of the computation. On a CPU its methods do nothing, and work runs at once.

    A collective waits for all that the current stream holds when the collective is queued. One that is queued late, but
    needs only early results, is therefore queued in a stream of its own.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def mark(self) -> "torch.cuda.Event | None":
        """Mark the work that the current stream holds now."""
        if self._stream is None:
            return None
        event = torch.cuda.Event()
        event.record()
        return event

    @contextmanager
    def after(self, event: "torch.cuda.Event | None", *inputs: Tensor) -> Iterator[None]:
        """Context whose operations run in the lane, after the marked work. They read `inputs`, made elsewhere."""
        if self._stream is None:
            yield
            return
        if event is not None:
            self._stream.wait_event(event)
        for x in inputs:
            x.record_stream(self._stream)
        with torch.cuda.stream(self._stream):
            yield

    @contextmanager
    def joined(self) -> Iterator[Callable[[Tensor], Tensor]]:
        """Context whose operations run in the lane; afterwards the current stream waits for them.

        It yields a function that takes and returns a tensor of the lane which the current stream is going to read.
        """
        if self._stream is None:
            yield lambda x: x
            return
        current, stream = torch.cuda.current_stream(), self._stream

        def hand_over(x: Tensor) -> Tensor:
            x.record_stream(current)
            return x

        with torch.cuda.stream(stream):
            yield hand_over
        current.wait_stream(stream)


@cache
def lane_of(device: torch.device) -> Lane:
    """The lane of a device."""
    return Lane(device)


class HostNumbers:
    """Numbers on their way from the device to the host."""

    def __init__(self, x: Tensor) -> None:
        """Start to copy x (..., K), after the device's current work."""
        self._copy, self._event = x, None
        if x.is_cuda:
            self._copy = torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    @property
    def on_the_way(self) -> bool:
        """False on a CPU, where the numbers are there at once."""
        return self._event is not None

    def read(self) -> list[Any]:
        """The numbers, as nested lists.

        The one place in a step where the host waits for the device: for the event behind the copy, never for the work
        that was queued later. Call it when enough of that is queued to keep the device busy.
        """
        if self._event is not None:
            self._event.synchronize()
        return self._copy.tolist()
