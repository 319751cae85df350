"""Asynchronous collectives of a step, their gradients, and the CUDA stream of what they wait for.

In a world of one a collective returns its argument. Global indices follow the loader's order: the batch consists of
blocks of b pairs; block k is microbatch k // W of rank k % W.

Shape legend: W ranks, A microbatches a rank, b pairs of a microbatch, n = A b pairs of a rank, G = W n pairs of the
global batch.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

# torch 2.13 renamed both; 2.11 has only the old names.
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass(frozen=True, slots=True)
class Nodes:
    """Process groups of a rank for collectives in two steps, where K nodes have L ranks each, one after another.

    With many ranks a gather is as slow as the hops of its ring: W - 1 in one ring of all, K - 1 and L - 1 in two steps.
    """

    number: int
    """K, number of nodes."""
    across: "dist.ProcessGroup"
    """This rank, and those of its local rank on the other nodes."""
    within: "dist.ProcessGroup"
    """The ranks of this node."""


@dataclass(frozen=True, slots=True)
class GlobalBatchLayout:
    """Layout of the global batch as one rank sees it: numbers of ranks, microbatches and pairs, all Python ints."""

    rank: int
    ranks: int
    """W, number of ranks."""
    microbatches: int
    """A, microbatches of each rank."""
    pairs: int
    """b, pairs of each microbatch."""
    nodes: Nodes | None = None
    """Groups for gathers in two steps; None for one ring of all ranks."""

    @property
    def alone(self) -> bool:
        """True if one microbatch of one rank is the whole batch."""
        return self.ranks == self.microbatches == 1

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
        """Rank that has each of the pairs with these global indices; int64 like `index`."""
        return index // self.pairs % self.ranks

    def position(self, index: Tensor) -> Tensor:
        """Place of each pair, 0 to n - 1, among the pairs of the rank that has it. index: global indices, int64."""
        return index // (self.pairs * self.ranks) * self.pairs + index % self.pairs


class Handle:
    """Handle of an asynchronous collective: torch's work handle, None in a world of one, and a way to its result.

    result: function that returns the result when the collective has ended.
    """

    def __init__(self, work: "dist.Work | None", result: Callable[[], Tensor]) -> None:
        self._work, self._result = work, result
        self._value: Tensor | None = None

    def wait(self) -> Tensor:
        """The result, the same tensor at every call. On a GPU the current stream waits for it, not the host."""
        if self._value is None:
            if self._work is not None:
                self._work.wait()
            self._value = self._result()
        return self._value


def all_reduce(x: Tensor, layout: GlobalBatchLayout, operation: Literal["sum", "max", "min"] = "sum") -> Handle:
    """Start to reduce x over the ranks, in place: to the sum, the largest or the smallest value. The handle gives x."""
    if layout.ranks == 1:
        return Handle(None, lambda: x)
    return Handle(dist.all_reduce(x, getattr(dist.ReduceOp, operation.upper()), async_op=True), lambda: x)


def all_gather(x: Tensor, layout: GlobalBatchLayout) -> Handle:
    """Start to gather the rows x (n, ...) of all ranks. The handle gives them as (G, ...), ordered by global index."""
    if layout.ranks == 1:
        return Handle(None, lambda: x)
    if layout.nodes is not None:
        return _gather_in_two_steps(x, layout, layout.nodes)
    parts = x.new_empty(layout.ranks * len(x), *x.shape[1:])
    work = _all_gather(parts, x.contiguous(), async_op=True)
    # (W A b, ...) -> (A W b, ...): global order deals a microbatch to every rank before the next microbatch.
    sizes = (layout.ranks, layout.microbatches, layout.pairs)
    return Handle(work, lambda: parts.unflatten(0, sizes).transpose(0, 1).flatten(0, 2))


def reduce_scatter(x: Tensor, layout: GlobalBatchLayout) -> Handle:
    """Start to add up rows x (G, ...) over the ranks. The handle gives the sums of this rank's own pairs, (n, ...)."""
    if layout.ranks == 1:
        return Handle(None, lambda: x)
    if layout.nodes is not None:
        return _reduce_scatter_in_two_steps(x, layout, layout.nodes)
    parts = x.unflatten(0, (layout.microbatches, layout.ranks, layout.pairs)).transpose(0, 1).flatten(0, 2)
    own = parts.new_empty(len(parts) // layout.ranks, *parts.shape[1:])
    return Handle(_reduce_scatter(own, parts.contiguous(), async_op=True), lambda: own)


def _gather_in_two_steps(x: Tensor, layout: GlobalBatchLayout, nodes: Nodes) -> Handle:
    """`all_gather` between nodes, and then in each node. Both are queued in the side stream: nothing waits for one."""
    with side_stream(x.device, x):
        parts = x.new_empty(nodes.number * len(x), *x.shape[1:])
        _all_gather(parts, x.contiguous(), group=nodes.across, async_op=True).wait()
        every = x.new_empty(layout.ranks * len(x), *x.shape[1:])
        work = _all_gather(every, parts, group=nodes.within, async_op=True)

    def result() -> Tensor:
        join_side_stream(every)
        # (L K A b, ...) -> (A K L b, ...): rank r is number r % L of node r // L.
        sizes = (layout.ranks // nodes.number, nodes.number, layout.microbatches, layout.pairs)
        return every.unflatten(0, sizes).movedim((2, 1, 0), (0, 1, 2)).flatten(0, 3)

    return Handle(work, result)


def _reduce_scatter_in_two_steps(x: Tensor, layout: GlobalBatchLayout, nodes: Nodes) -> Handle:
    """`reduce_scatter` in each node, and then between nodes: the way back of `_gather_in_two_steps`."""
    each = layout.ranks // nodes.number
    sizes = (layout.microbatches, nodes.number, each, layout.pairs)
    parts = x.unflatten(0, sizes).movedim((2, 1, 0), (0, 1, 2)).flatten(0, 3).contiguous()  # (L K A b, ...)
    with side_stream(x.device, parts):
        of_node = parts.new_empty(len(parts) // each, *parts.shape[1:])
        _reduce_scatter(of_node, parts, group=nodes.within, async_op=True).wait()
        own = parts.new_empty(len(of_node) // nodes.number, *parts.shape[1:])
        work = _reduce_scatter(own, of_node, group=nodes.across, async_op=True)

    def result() -> Tensor:
        join_side_stream(own)
        return own

    return Handle(work, result)


def all_to_all(x: Tensor, sent: list[int], received: list[int]) -> Handle:
    """Start to send rows x (S, ...) to the ranks. The handle gives the rows that arrive.

    sent, received: numbers of rows to and from each rank, which come in the order of the ranks.
    """
    if len(sent) == 1:
        return Handle(None, lambda: x)
    out = x.new_empty(sum(received), *x.shape[1:])
    return Handle(dist.all_to_all_single(out, x, received, sent, async_op=True), lambda: out)


class AsyncOp:
    """An asynchronous collective as an operation of autograd. Another collective carries its gradient.

    Backward passes run later operations first. The work between `AsyncOp(...)` and `wait` runs beside the collective in
    forward, and beside that of the gradient in backward.

    Args:
        x: tensor that the collective sends.
        result: function that waits for the collective and returns its result.
        backward: function of the result's gradient that starts the collective of the gradient; it gives the gradient of
            x.
    """

    def __init__(self, x: Tensor, result: Callable[[], Tensor], backward: Callable[[Tensor], Handle]) -> None:
        handles, dtype = [], x.dtype

        def start(grad: Tensor) -> Tensor:
            handles.append(backward(grad))
            return grad.new_zeros((), dtype=dtype)

        self._result, self._start = result, start
        # A scalar in place of x, whose own gradient is ignored: that of x is the result of a collective.
        self._token = _Function.apply(x, lambda: x.new_zeros(()), lambda _: handles.pop().wait())

    def wait(self) -> Tensor:
        """Wait for the collective, and return its result as a part of the autograd graph."""
        return _Function.apply(self._token, self._result, self._start)  # pyright: ignore[reportReturnType]


class _Function(torch.autograd.Function):
    """Operation of autograd on x given by two functions: result() in forward, and backward(gradient) in backward."""

    @staticmethod
    def forward(ctx: Any, x: Any, result: Callable[[], Tensor], backward: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.function = backward
        return result()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return ctx.function(grads[0]), None, None


@cache
def _side_stream(device: torch.device) -> "torch.cuda.Stream | None":
    return torch.cuda.Stream(device) if device.type == "cuda" else None


@contextmanager
def side_stream(device: torch.device, *inputs: Tensor) -> Iterator[None]:
    """Context whose operations are queued in a second CUDA stream, beside that of the computation.

    On a CPU they run at once. A collective waits for all that the current stream holds when it is queued. One that is
    queued late, but needs only early results, is therefore queued here. With inputs, the operations wait for what the
    current stream holds now.

    NOTE: give every tensor that the current stream made and the block reads first, and call `join_side_stream` before
    the current stream reads a result. Else memory is read before it is written, or when others use it: wrong numbers,
    and no error.
    """
    stream = _side_stream(device)
    if stream is None:
        yield
        return
    if inputs:
        stream.wait_stream(torch.cuda.current_stream(device))
    for x in inputs:
        x.record_stream(stream)
    with torch.cuda.stream(stream):
        yield


def join_side_stream(*tensors: Tensor) -> None:
    """Make the current CUDA stream wait for the side stream, in which these tensors were made, before it reads them."""
    stream = _side_stream(tensors[0].device)
    if stream is not None:
        current = torch.cuda.current_stream(tensors[0].device)
        current.wait_stream(stream)
        for x in tensors:
            x.record_stream(current)


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
