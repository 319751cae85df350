"""The real step of one rank among many, on fake tensors: its collectives, the work of ITC's logits, and its times.

`step_times` says when each collective of a recorded step runs on a cluster, and how long the computation waits for it.
The latencies of rings and trees are those by which NCCL chooses between them (its source, src/graph/tuning.cc). All
collectives of a rank run one after another, in the order in which they are queued.

Shape legend: W ranks.
"""

import math
from collections import defaultdict
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mvlm.config.model import MaskVLMConfig
from mvlm.costs.recording import Collective, Event, recorded_world
from mvlm.costs.step_cost import (
    CPU,
    MemoryTracker,
    StepShape,
    autocast_of,
    drawn_tokens,
    fake_microbatch,
    give_fake_tensors,
    uniform_draws,
)
from mvlm.distributed import parallel
from mvlm.distributed.collectives import GlobalBatchLayout, HostNumbers
from mvlm.distributed.global_batch import backward_global
from mvlm.distributed.loss_shares import Embeddings, sharded_contrastive_loss
from mvlm.distributed.parallel import checkpoint_activations, parallelize
from mvlm.distributed.world import World
from mvlm.model.maskvlm import MaskVLM
from mvlm.objectives.negatives import NegativeSampling


@dataclass(frozen=True, slots=True)
class RecordedStep:
    """Collectives of one step, and when they start and are waited for."""

    collectives: list[Collective]
    events: list[Event]
    flops: int
    """FLOPs of the step, the unit of the events' positions."""

    def received(self, label: str | None = None) -> int:
        """Bytes that enter the rank, of all collectives or of those with this label."""
        return sum(x.received for x in self.collectives if label in (None, x.label))


def record_step(
    config: MaskVLMConfig, shape: StepShape, kind: Literal["ddp", "fsdp"] = "ddp", nodes: int = 1
) -> RecordedStep:
    """Record a step of rank 0 among `shape.ranks` on `nodes` nodes. It takes seconds."""
    with torch.device("meta"):
        model = MaskVLM(config)
    model.set_attention("sdpa", "sdpa")
    if shape.checkpointed:
        checkpoint_activations(model)
    numbers, mesh_of = uniform_draws(shape), parallel._mesh  # pyright: ignore[reportPrivateUsage]

    def mesh(*args: Any) -> Any:
        with unset_fake_temporarily():  # a mesh reads its table of ranks
            return mesh_of(*args)

    with (
        recorded_world(shape.ranks) as recorder,
        patch.object(HostNumbers, "read", lambda _: numbers),
        patch.object(parallel, "_mesh", mesh),
        FakeTensorMode(),
    ):
        give_fake_tensors(model)
        world = World(0, shape.ranks, 0, CPU)
        ready = parallelize(model, world, kind, nodes=nodes)
        micro = [fake_microbatch(config, shape.pairs, shape.tokens, shape.longest) for _ in range(shape.microbatches)]
        with MemoryTracker(drawn_tokens(config, shape)) as tracker:
            recorder.clear()
            recorder.position = lambda: tracker.flops
            backward_global(
                ready,
                micro,
                world,
                seed=0,
                step=0,
                plan="fast",
                autocast=lambda: autocast_of(shape),
            )
    return RecordedStep(recorder.collectives, recorder.events, tracker.flops)


@dataclass(frozen=True, slots=True)
class LogitWork:
    """Work of one rank on the logits of ITC, and on drawing negatives from them. It grows with the global batch."""

    flops: int
    """Of matrix products, in fp32."""
    moved: int
    """Bytes that operations on blocks of logits read and write, if none of them stays in a cache."""


class _MovedBytes(TorchDispatchMode):
    """Counts the bytes of operations that read or make a tensor with `columns` columns."""

    def __init__(self, columns: int) -> None:
        super().__init__()
        self.columns, self.moved = columns, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs or {})) if isinstance(x, Tensor)]
        made = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        known = {id(x.untyped_storage()) for x in tensors}
        wide = [x for x in (*made, *tensors) if x.ndim == 2 and x.shape[1] == self.columns]
        in_place = func._schema.name.endswith("_")
        if wide and (in_place or any(id(x.untyped_storage()) not in known for x in made)):
            # An expanded tensor is smaller than its elements, and a view is smaller than its storage.
            self.moved += sum(min(x.nbytes, x.untyped_storage().nbytes()) for x in (*tensors, *made))
        return out


def logit_work(config: MaskVLMConfig, pairs: int, ranks: int) -> LogitWork:
    """Count forward and backward of the logits of a rank with `pairs` pairs, among `ranks` ranks."""
    layout = GlobalBatchLayout(0, ranks, 1, pairs)
    with recorded_world(ranks), FakeTensorMode():
        image, text = (torch.empty(pairs, config.itc_width, requires_grad=True) for _ in range(2))
        ids, scale = torch.empty(layout.total, dtype=torch.int64), torch.empty(1, requires_grad=True)
        with MemoryTracker(0) as tracker, _MovedBytes(layout.total) as counted:
            sampling = NegativeSampling(ids, ids, 0, 0)
            loss, _, _ = sharded_contrastive_loss(Embeddings(image, text, layout), scale, sampling, layout)
            loss.backward()
    return LogitWork(tracker.flops, counted.moved)


class Protocol(NamedTuple):
    """Seconds of one of NCCL's protocols, which trades bandwidth for latency."""

    bandwidth: float
    """Part of a link's rate that it uses."""
    start: float
    """Start of a collective."""
    ring: tuple[float, float]
    """A hop of a ring, in a node and between nodes."""
    tree: tuple[float, float]
    """A hop of a tree, in a node and between nodes."""


PROTOCOLS = (
    Protocol(0.25, 6.6e-6, (1.08e-6, 2.7e-6), (1.08e-6, 5.0e-6)),  # LL
    Protocol(0.92, 14.0e-6, (1.9e-6, 4.0e-6), (1.25e-6, 8.5e-6)),  # LL128
    Protocol(1.0, 8.4e-6, (3.4e-6, 14.0e-6), (4.0e-6, 14.0e-6)),  # Simple, which also carries an all-to-all
)
SIMPLE = PROTOCOLS[-1]
MESSAGE = 2e-6
"""Seconds that each message of an all-to-all takes, whatever its size: an assumption, not from NCCL's model."""
HIDDEN = frozenset({"parameters", "gradients"})
"""Collectives for which DDP and FSDP2 let the computation wait only at the end of a step, or when a GPU needs them."""


@dataclass(frozen=True, slots=True)
class Links:
    """Links of a cluster of equal nodes."""

    per_node: int
    nodes: int
    intra_node: float
    """Bytes per second, each way, from a GPU to the other GPUs of its node."""
    inter_node: float
    """Bytes per second, each way, from a GPU to other nodes."""

    def seconds(self, moved: Collective) -> float:
        """Time of a collective once it has started."""
        here, nodes = (1, moved.ranks) if moved.stride > 1 else self._shape(moved.ranks)
        if moved.ranks == 1:
            return 0.0
        if moved.kind == "all-to-all":
            inside = (here - 1) / (moved.ranks - 1)  # of what comes from others, if all ranks are equally likely
            bytes_here, bytes_far = moved.received * inside, moved.received * (1 - inside)
            carried = max(bytes_here / self.intra_node, bytes_far / self.inter_node)
            hop = SIMPLE.ring[1] if nodes > 1 else SIMPLE.ring[0]
            return SIMPLE.start + hop + moved.senders * MESSAGE + carried
        passes = 2 if moved.kind == "all-reduce" else 1
        size = moved.size * (moved.ranks if moved.kind in ("all-gather", "reduce-scatter") else 1)
        # Rings in parallel use all adapters of a node, and each passes all but a rank's own part over every link.
        far = 0.0 if nodes == 1 else (1 - 1 / moved.ranks) / (here * self.inter_node)
        carried = passes * size * max((1 - 1 / here) / self.intra_node, far)
        times = []
        for protocol in PROTOCOLS:
            hops = [((moved.ranks - nodes) * protocol.ring[0] + (nodes - 1) * protocol.ring[1])]
            if moved.kind not in ("all-gather", "reduce-scatter"):
                hops.append((here - 1) * protocol.tree[0] + math.log2(nodes) * protocol.tree[1])
            times.append(protocol.start + passes * min(hops) + carried / protocol.bandwidth)
        return min(times)

    def _shape(self, ranks: int) -> tuple[int, int]:
        """Ranks of a group of neighbours in each node, and nodes."""
        here = min(ranks, self.per_node)
        return here, ranks // here


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Seconds of a step."""

    computing: float
    waiting: dict[str, float]
    """Seconds in which the computation waits, by what it waits for."""
    network: dict[str, float]
    """Seconds in which collectives run, by what they carry."""

    @property
    def step(self) -> float:
        """All of it."""
        return self.computing + sum(self.waiting.values())


def step_times(recorded: RecordedStep, links: Links, computing: float) -> StepTimes:
    """Play a recorded step: `computing` seconds of computation, spread evenly over its FLOPs."""
    main = lane = free = 0.0
    computed = 0
    runs: list[tuple[float, float, str]] = []
    """Start, end and label of each collective."""
    waiting: defaultdict[str, float] = defaultdict(float)
    network: defaultdict[str, float] = defaultdict(float)

    def wait_until(then: float, fallback: str) -> None:
        """Let the main stream wait, and say for what: for the collectives that run meanwhile."""
        nonlocal main
        if then <= main:
            return
        left = then - main
        for start, end, label in runs:
            overlap = min(end, then) - max(start, main)
            if overlap > 0:
                waiting[label] += overlap
                left -= overlap
        waiting[fallback] += max(0.0, left)
        main = then

    for event in recorded.events:
        main += (event.position - computed) / recorded.flops * computing
        computed = event.position
        if event.what == "enter":
            lane = max(lane, main)
        elif event.what == "join":
            wait_until(lane, "features")
        elif event.what == "start":
            moved = recorded.collectives[event.collective]
            start = max(free, lane if event.in_lane else main)
            free = start + links.seconds(moved)
            runs.append((start, free, moved.label))
            network[moved.label] += free - start
        else:
            label = recorded.collectives[event.collective].label
            end = runs[event.collective][1]
            if event.in_lane:
                lane = max(lane, end)
            elif label not in HIDDEN:
                wait_until(end, label)
    main += (recorded.flops - computed) / recorded.flops * computing
    wait_until(free, "gradients")
    return StepTimes(computing, dict(waiting), dict(network))


def rescaled(recorded: RecordedStep, ranks: int, per_node: int, pairs: int, batch: float = 1.0) -> RecordedStep:
    """The record as it would be with another number of ranks, and with `batch` times the `pairs` of a microbatch.

    Each rank's part in a collective stays as large. Of what an all-to-all brings, the rank's own share falls; the
    negatives of n pairs come from (W - 1) (1 - (1 - 1/W)^n) other ranks, if all are equally likely.
    """
    was = max((x.ranks for x in recorded.collectives), default=1)
    drawn = pairs * batch

    def scaled(x: Collective) -> Collective:
        if x.stride > 1:
            return replace(x, ranks=ranks // per_node)
        if x.ranks != was:
            return x
        size = x.size if x.label in ("gradients", "parameters", "losses and counts") else round(x.size * batch)
        if x.kind != "all-to-all":
            return replace(x, size=size, ranks=ranks)
        senders = round((ranks - 1) * (1 - (1 - 1 / ranks) ** drawn)) if ranks > 1 else 0
        return replace(x, size=size, ranks=ranks, own=size // ranks, senders=senders)

    return replace(recorded, collectives=[scaled(x) for x in recorded.collectives])
