"""Collectives of one rank's step, recorded while the step runs on fake tensors in a process group that moves nothing.

The record says what each collective moves, where in the step's computation it starts, and where the computation, or the
lane beside it (`mvlm.distributed.collectives.Lane`), waits for it. `mvlm.costs.recorded_step` makes times of that.

Shape legend: W ranks.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple
from unittest.mock import patch

import torch.distributed as dist
from torch import Tensor
from torch.futures import Future
from torch.nn.parallel import distributed as data_parallel
from torch.testing._internal.distributed.fake_pg import FakeStore  # torch has no public name for it

from mvlm.distributed.collectives import Lane

Kind = Literal["all-reduce", "all-gather", "reduce-scatter", "all-to-all", "broadcast"]
BACKEND = "recording"
BUCKETS = [1 << 20, 25 << 20]
"""Bytes of DDP's first bucket of gradients and of each further one: torch's defaults."""


@dataclass(frozen=True, slots=True)
class Collective:
    """One collective, as this rank, the first of its group, sees it."""

    kind: Kind
    label: str
    """What it carries."""
    size: int
    """Bytes: of one rank's part in an all-gather and a reduce-scatter, of what an all-to-all brings, else of all."""
    ranks: int
    """Ranks of its group."""
    stride: int = 1
    """Distance of the group's ranks from one another: 1, or the ranks of a node for groups across nodes."""
    senders: int = 0
    """Other ranks from which an all-to-all brings anything."""
    own: int = 0
    """Bytes that an all-to-all brings from the rank itself."""

    @property
    def received(self) -> int:
        """Bytes that enter a rank. An all-reduce is a reduce-scatter and an all-gather, as in a ring."""
        others = self.ranks - 1
        if self.kind == "all-to-all":
            return self.size - self.own
        if self.kind in ("all-gather", "reduce-scatter"):
            return self.size * others
        return (2 * self.size * others // self.ranks) if self.kind == "all-reduce" else self.size


class Event(NamedTuple):
    """Something that the host queues, in the order in which it does so."""

    what: Literal["start", "wait", "enter", "join"]
    """Start of a collective, wait for one, start of work in the lane, or wait of the main stream for the lane."""
    position: int
    """FLOPs of the step that are queued before."""
    in_lane: bool = False
    """Queued in the lane, not in the main stream."""
    collective: int = -1
    """Number of the collective that starts or is waited for."""


class Recorder:
    """Record of one step. `position` gives the FLOPs so far."""

    def __init__(self) -> None:
        self.collectives: list[Collective] = []
        self.events: list[Event] = []
        self.position: Callable[[], int] = lambda: 0
        self._lane_depth = 0

    def clear(self) -> None:
        """Forget what has been recorded."""
        self.collectives.clear()
        self.events.clear()

    def start(self, collective: Collective, result: Any) -> "_Work":
        """Record the start of a collective."""
        number = len(self.collectives)
        self.collectives.append(collective)
        self.note("start", number)
        return _Work(lambda: self.note("wait", number), result)

    def note(self, what: Any, collective: int = -1) -> None:
        """Record an event at the current position."""
        self.events.append(Event(what, self.position(), self._lane_depth > 0, collective))

    @contextlib.contextmanager
    def lane(self, what: Any, before: bool, value: Any = None) -> Iterator[Any]:
        """Context of the lane; its event, if any, comes before the work of the context or after it."""
        if before and what:
            self.note(what)
        self._lane_depth += 1
        try:
            yield value
        finally:
            self._lane_depth -= 1
        if not before:
            self.note(what)


# torch's stubs leave out private names, and give these methods the names of one version.
_dist: Any = dist
_Group: Any = dist.ProcessGroup


class _Work(_dist._Work):
    def __init__(self, waited: Callable[[], None], result: Any) -> None:
        super().__init__()
        self._waited, self._result = waited, result

    def wait(self, timeout: Any = None) -> bool:
        self._waited()
        return True

    def get_future(self) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(self._result)
        return future


_recorders: list[Recorder] = []
"""The recorder of the process groups that torch makes now."""


class RecordingGroup(_Group):
    """Process group whose collectives are recorded and leave their outputs as they are."""

    def __init__(self, rank: int, size: int) -> None:
        super().__init__(rank, size)
        self._size, self._recorder = size, _recorders[-1]

    def getBackendName(self) -> str:
        """Name of the backend."""
        return BACKEND

    @property
    def group_name(self) -> str:
        """Name under which torch knows the group."""
        return _dist.distributed_c10d._world.pg_names[self]

    def _start(self, kind: Kind, size: int, like: Tensor, result: Any, **more: Any) -> _Work:
        stride = 1 if self._size == 1 else _stride(self)
        found = Collective(kind, _label(kind, like, stride), size, self._size, stride, **more)
        return self._recorder.start(found, result)

    def allreduce(self, tensors: list[Tensor], opts: Any = None) -> Any:
        """Sum over ranks."""
        return self._start("all-reduce", sum(x.nbytes for x in tensors), tensors[0], tensors)

    def broadcast(self, tensors: list[Tensor], opts: Any = None) -> Any:
        """Tensors of one rank for all."""
        return self._start("broadcast", sum(x.nbytes for x in tensors), tensors[0], tensors)

    def all_gather_single(self, out: Tensor, own: Tensor, opts: Any = None) -> Any:
        """Parts of all ranks for all."""
        return self._start("all-gather", own.nbytes, own, out)

    def reduce_scatter_single(self, own: Tensor, parts: Tensor, opts: Any = None) -> Any:
        """Sum of each rank's part."""
        return self._start("reduce-scatter", own.nbytes, own, own)

    def alltoall_base(self, out: Tensor, parts: Tensor, received: list[int], sent: list[int], opts: Any = None) -> Any:
        """A part from each rank for each."""
        row = out.nbytes // max(1, len(out))
        senders = sum(rows > 0 for rows in received[1:])
        return self._start("all-to-all", out.nbytes, out, out, senders=senders, own=received[0] * row)

    # Names of torch 2.11, and of 2.13.
    _allgather_base = all_gather_single
    _reduce_scatter_base = reduce_scatter_single
    all_to_all_single = alltoall_base


def _stride(group: Any) -> int:
    ranks = dist.get_process_group_ranks(group)
    return ranks[1] - ranks[0]


def _label(kind: Kind, like: Tensor, stride: int) -> str:
    """Content of a collective, by the code that starts it."""
    files = set()
    frame: Any = sys._getframe(2)
    while frame is not None:
        files.add(frame.f_code.co_filename.rsplit("torch/", 1)[-1])
        frame = frame.f_back
    if kind == "all-to-all":
        return "features"
    if any("fsdp" in file for file in files):
        return "parameters" if kind == "all-gather" else "gradients"
    if not like.is_floating_point():
        return "ids and draws"
    if kind in ("all-gather", "reduce-scatter"):
        return "embeddings"
    return "gradients" if like.numel() > 1024 else "losses and counts"


def _make_group(store: Any, rank: int, size: int, timeout: Any) -> RecordingGroup:
    return RecordingGroup(rank, size)


dist.Backend.register_backend(BACKEND, _make_group, devices=["cpu"])


@contextlib.contextmanager
def recorded_world(ranks: int) -> Iterator[Recorder]:
    """Process group of W ranks, of which this process is the first, and the record of its collectives.

    RuntimeError inside a process group.
    """
    recorder = Recorder()
    _recorders.append(recorder)
    lane = {
        "mark": lambda _self: "mark",
        "after": lambda _self, event, *_inputs: recorder.lane("enter" if event else None, before=True),
        "joined": lambda _self: recorder.lane("join", before=False, value=lambda x: x),
    }
    # DDP compares the ranks' shapes and copies the first rank's weights to the others; both read data.
    ignored = ("_verify_param_shape_across_processes", "_sync_module_states")
    assign = _dist._compute_bucket_assignment_by_size

    def assign_by_size(tensors: Any, limits: list[int], *rest: Any) -> Any:
        """Buckets of a run's second step. DDP makes one bucket for the first step, and then reads data to divide it."""
        return assign(tensors, BUCKETS, *rest)

    try:
        with contextlib.ExitStack() as stack:
            for name, replacement in lane.items():
                stack.enter_context(patch.object(Lane, name, replacement))
            for name in ignored:
                stack.enter_context(patch.object(data_parallel, name, lambda *_, **__: None))
            stack.enter_context(patch.object(dist, "_compute_bucket_assignment_by_size", assign_by_size))
            if ranks > 1:
                dist.init_process_group(BACKEND, rank=0, world_size=ranks, store=FakeStore())
                stack.callback(dist.destroy_process_group)
            yield recorder
    finally:
        _recorders.pop()
