"""Times of a recorded step on a cluster: when each collective runs, and how long the computation waits for it.

The latencies of rings and trees are those by which NCCL chooses between them (its source, src/graph/tuning.cc). All
collectives of a rank run one after another, in the order in which they are queued.

Shape legend: W ranks.
"""

import math
from collections import defaultdict
from dataclasses import dataclass, replace
from typing import NamedTuple

from mvlm.costs.recorded_step import RecordedStep
from mvlm.costs.recording import Collective


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
