"""Cluster plan: memory, time and traffic of a pretraining step on many GPUs, and its text.

FLOPs and memory are counted (`mvlm.costs.step_cost`) and collectives recorded (`mvlm.costs.recorded_step`) while the
real step runs on fake tensors. Rates are those of data sheets and of the settings. No GPU has timed this.

Shape legend: W GPUs, n pairs of a GPU.
"""

import re
from collections import Counter
from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

from mvlm.config.model import MaskVLMConfig
from mvlm.costs.recorded_step import (
    MESSAGE,
    Links,
    RecordedStep,
    StepTimes,
    logit_work,
    record_step,
    rescaled,
    step_times,
)
from mvlm.costs.step_cost import LONGEST, TOKENS, StepCost, StepShape, step_cost
from mvlm.distributed.loss_shares import MAX_LOGITS
from mvlm.errors import ConfigError
from mvlm_kernels.hardware import GPUS

GB = 1e9


@dataclass(frozen=True, slots=True)
class Node:
    """A GPU's memory, and its links in the node that it usually comes in."""

    memory: float
    """Bytes of a GPU."""
    intra_node: float
    """Bytes per second, each way, from a GPU to the other GPUs of its node."""
    inter_node: float
    """Bytes per second, each way, from a GPU to other nodes."""
    fp32: float
    """FLOPs per second in fp32 without tensor cores, in which ITC's logits are computed."""
    source: str


NODES = {
    "A100": Node(
        80e9, 300e9, 25e9, 19.5e12, "DGX A100 data sheet: 600 GB/s NVLink both ways, a 200 Gb/s adapter per GPU"
    ),
    "H100": Node(
        80e9, 450e9, 50e9, 67e12, "DGX H100 data sheet: 900 GB/s NVLink both ways, a 400 Gb/s adapter per GPU"
    ),
    "H200": Node(
        141e9, 450e9, 50e9, 67e12, "DGX H200 data sheet: 900 GB/s NVLink both ways, a 400 Gb/s adapter per GPU"
    ),
    "B200": Node(
        180e9, 900e9, 50e9, 75e12, "DGX B200 data sheet: 1.8 TB/s NVLink both ways, a 400 Gb/s adapter per GPU"
    ),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterSetting:
    """Model, cluster and settings of a planned run."""

    model: MaskVLMConfig
    gpu: str
    per_node: int
    nodes: int
    batch_size: int
    """Pairs of the global batch."""
    accumulate: int = 1
    checkpointed: bool = False
    sharded: bool = False
    """FSDP2 instead of DDP."""
    mfu: float = 0.4
    """Model FLOPs utilization during forward and backward, in (0, 1]."""

    inter_node: float = 0.0
    """Bytes per second, each way, from a GPU to other nodes; 0: those of the node's data sheet."""

    @property
    def ranks(self) -> int:
        """W, number of GPUs."""
        return self.per_node * self.nodes

    @property
    def pairs(self) -> int:
        """Pairs of a microbatch."""
        return self.batch_size // (self.ranks * self.accumulate)

    @property
    def links(self) -> Links:
        """Links of the cluster."""
        node = NODES[self.gpu]
        return Links(self.per_node, self.nodes, node.intra_node, self.inter_node or node.inter_node)


MOST_GPUS = 1_000_000


def parse_gpus(words: tuple[str, ...]) -> tuple[int, int]:
    """Parse GPUs per node and nodes: ("8", "x", "16"), ("8 x 16",) or ("8x16",) -> (8, 16); ("8",) -> (8, 1).

    ConfigError for anything else.
    """
    found = re.fullmatch(r"\s*(\d+)(?:\s*x\s*(\d+))?\s*", " ".join(words).lower())
    if found is None or not 1 <= int(found[1]) * int(found[2] or 1) <= MOST_GPUS:
        raise ConfigError(f"gpus: wanted GPUs per node x nodes, as in 8 x 16, got {' '.join(words)!r}")
    return int(found[1]), int(found[2] or 1)


def parse_count(text: str) -> int:
    """Parse a number of pairs such as 400M; k, M and B stand for 1e3, 1e6 and 1e9. ConfigError for anything else."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([kMB]?)", text)
    if found is None or not float(found[1]):
        raise ConfigError(f"data: wanted a number of pairs such as 400M, got {text!r}")
    return round(float(found[1]) * {"": 1, "k": 1e3, "M": 1e6, "B": 1e9}[found[2]])


def rank_step_cost(setting: ClusterSetting) -> StepCost:
    """Count one rank's step. ConfigError if the batch does not divide evenly among ranks and microbatches."""
    parts = setting.ranks * setting.accumulate
    if setting.batch_size % parts:
        raise ConfigError(
            f"batch_size: wanted a multiple of {setting.ranks} GPUs x {setting.accumulate} microbatches = {parts}, "
            f"got {setting.batch_size}"
        )
    return step_cost(setting.model, _shape(setting, setting.ranks))


def _shape(setting: ClusterSetting, ranks: int) -> StepShape:
    return StepShape(
        pairs=setting.pairs,
        ranks=ranks,
        microbatches=setting.accumulate,
        tokens=min(TOKENS, setting.model.text_length),
        longest=min(LONGEST, setting.model.text_length),
        checkpointed=setting.checkpointed,
    )


def rank_step_record(setting: ClusterSetting) -> RecordedStep:
    """Record the collectives of one rank's step, on at least two nodes so that every collective occurs."""
    nodes = max(2, setting.nodes)
    shape = _shape(setting, setting.per_node * nodes)
    return record_step(setting.model, shape, "fsdp" if setting.sharded else "ddp", nodes)


def gpu_memory(setting: ClusterSetting, cost: StepCost) -> dict[str, float]:
    """Bytes of one GPU by part. Weights and moments of AdamW are in fp32; Muon has one moment of most weights.

    Gradients may be counted twice: as buffers, and in `activations: backward` if they are alive at the peak.
    """
    weights = 4 * cost.parameters
    share = weights / setting.per_node if setting.sharded else weights
    rows = {"parameters": share, "gradients": share, "optimizer (two moments)": 2 * share}
    if setting.sharded:  # parameters outside blocks stay gathered through a step; blocks are gathered two at a time
        config = setting.model
        outside = 4 * config.width * (2 * config.vocab_size + config.patch_values + 4 * config.width)
        rows["gathered parameters"] = outside + 2 * 4 * 16 * config.width**2
    rows |= {f"activations: {name}": size for name, size in sorted(cost.parts.items())}
    return rows


def most_logits(setting: ClusterSetting) -> int:
    """Bound of ITC's logits in memory at a time. One GPU without microbatches makes no blocks of them."""
    alone = setting.ranks == setting.accumulate == 1
    return max(MAX_LOGITS, setting.batch_size**2 if alone else 0)


class PlannedStep(NamedTuple):
    """Seconds of a step."""

    forward: float
    backward: float
    logits: float
    """ITC's logits and the draws from them, which grow with the global batch."""
    times: StepTimes
    """The step without its logits, whose work is not overlapped with anything here."""

    @property
    def step(self) -> float:
        """All of it."""
        return self.times.step + self.logits

    @property
    def others(self) -> dict[str, float]:
        """Seconds that are neither forward nor backward, by what they are, the largest first."""
        found = {"logits of ITC and draws": self.logits}
        found |= {f"waiting for {name}": time for name, time in self.times.waiting.items()}
        return dict(sorted(found.items(), key=lambda item: -item[1]))

    @property
    def computing(self) -> float:
        """Part of the step, 0 to 1, that is forward and backward: neither waiting nor ITC's logits."""
        return (self.forward + self.backward) / self.step


def planned_step(setting: ClusterSetting, cost: StepCost, record: RecordedStep, batch: float = 1.0) -> PlannedStep:
    """Seconds of one step. `cost` and `record` may be of another number of GPUs.

    batch: pairs of a GPU, as a multiple of those of `cost` and `record`.
    """
    gpu = GPUS[setting.gpu]
    forward, backward = (batch * flops / (gpu.flops * setting.mfu) for flops in (cost.forward, cost.backward))
    scaled = rescaled(record, setting.ranks, setting.per_node, setting.pairs, batch)
    times = step_times(scaled, setting.links, forward + backward)
    pairs = max(1, round(setting.pairs * setting.accumulate * batch))
    work = _logit_work(setting.model, pairs, setting.ranks)
    logits = work.flops / NODES[setting.gpu].fp32 + work.moved / gpu.bandwidth
    return PlannedStep(forward, backward, logits, times)


_logit_work = cache(logit_work)


def wider(setting: ClusterSetting, nodes: int) -> ClusterSetting:
    """The setting on another number of nodes, with as many pairs on each GPU."""
    each = setting.batch_size // setting.ranks
    return replace(setting, nodes=nodes, batch_size=each * setting.per_node * nodes)


def scaling(
    setting: ClusterSetting, cost: StepCost, record: RecordedStep, most: int = 4096
) -> list[tuple[ClusterSetting, PlannedStep]]:
    """Weak scaling over doubling numbers of nodes, to `most` GPUs: the pairs of a GPU stay constant."""
    rows, nodes = [], 1
    while setting.per_node * nodes <= most:
        row = wider(setting, nodes)
        rows.append((row, planned_step(row, cost, record)))
        nodes *= 2
    return rows


ENOUGH = 0.9
"""Part of a step that is to be computing."""


class Limits(NamedTuple):
    """Changes that take a step below `ENOUGH`, each alone. None: no such change, or the step is below already."""

    inter_node: float | None
    """Bytes per second between nodes."""
    straggler: float | None
    """How much slower one GPU is, as a part of the step: all wait for it."""
    pairs: int | None
    """Pairs of a GPU, a power of two times those of the plan."""
    gpus: int | None
    """Number of GPUs, with the same pairs on each; those of the plan if its step is below already."""
    gpus_by: str
    """Largest part of the step of so many GPUs that is not computing, in words."""


def limits(setting: ClusterSetting, cost: StepCost, record: RecordedStep) -> Limits:
    """Find the changes that take the planned step below `ENOUGH`; numbers of GPUs up to those of `scaling`."""

    def computing(changed: ClusterSetting, batch: float = 1.0) -> float:
        return planned_step(changed, cost, record, batch).computing

    planned = planned_step(setting, cost, record)
    now = planned.computing
    if now < ENOUGH:
        return Limits(None, None, None, setting.ranks, next(iter(planned.others)))
    below = next((found for found in scaling(setting, cost, record) if found[1].computing < ENOUGH), None)
    gpus, by = (below[0].ranks, next(iter(below[1].others))) if below else (None, "")
    rate = setting.links.inter_node
    rates = [rate * 0.9**k for k in range(60)] if setting.nodes > 1 else []
    batches = [0.5**k for k in range(1, 12) if setting.pairs * 0.5**k >= 1]
    return Limits(
        next((slow for slow in rates if computing(replace(setting, inter_node=slow)) < ENOUGH), None),
        now / ENOUGH - 1,
        next((round(setting.pairs * part) for part in batches if computing(setting, part) < ENOUGH), None),
        gpus,
        by,
    )


def format_plan(setting: ClusterSetting, pairs: int, epochs: float, loader_rate: float = 0.0) -> str:
    """Format the plan as text.

    Args:
        pairs: pairs of the data set.
        epochs: passes over it.
        loader_rate: measured pairs per second of one node's loader; 0 for not measured.
    """
    cost, record = rank_step_cost(setting), rank_step_record(setting)
    node, gpu, links = NODES[setting.gpu], GPUS[setting.gpu], setting.links
    planned = planned_step(setting, cost, record)
    step = planned.step
    steps = pairs * epochs / setting.batch_size
    per_second = setting.batch_size / step
    own, length = setting.batch_size // setting.ranks, setting.model.text_length
    waiting = sorted(planned.times.waiting.items(), key=lambda item: -item[1])
    lines = [
        f"{setting.ranks} x {setting.gpu} ({setting.nodes} nodes of {setting.per_node}), "
        f"{setting.batch_size:,} pairs per step: {own} per GPU in microbatches of {setting.pairs}, "
        + ("FSDP2" if setting.sharded else "DDP"),
        f"{cost.parameters / 1e6:.1f} M parameters; {(cost.forward + cost.backward) / own / GB:.1f} GFLOP per pair",
        "",
        *memory_table(setting, cost),
        f"  of the activations, logits at most {4 * most_logits(setting) / GB:.2f}, embeddings of all "
        f"{2 * 4 * setting.batch_size * setting.model.itc_width / GB:.2f}",
        "",
        "A step, milliseconds",
        f"  {'forward':<34}{1e3 * planned.forward:10.1f}",
        f"  {'backward':<34}{1e3 * planned.backward:10.1f}",
        f"  {'logits of ITC and draws':<34}{1e3 * planned.logits:10.1f}",
        *(f"  {'waiting for ' + name:<34}{1e3 * time:10.1f}" for name, time in waiting),
        f"  {'step':<34}{1e3 * step:10.1f}",
        "",
        *_traffic(setting, record, planned.times.network),
        "",
        f"{per_second:,.0f} pairs/s; {steps:,.0f} steps, {steps * step / 3600:,.1f} hours",
        f"The loader of each node has to deliver {per_second / setting.nodes:,.0f} pairs/s"
        + (f"; measured {loader_rate:,.0f}" + (": it is the limit" if loader_rate < per_second / setting.nodes else "")
           if loader_rate else ""),
        "",
        "More nodes, same pairs per GPU",
        *(f"  {row.ranks:6,} GPUs {row.batch_size:10,} pairs {1e3 * at.step:8.1f} ms, "
          f"{100 * at.computing:3.0f} % computing, {100 * at.logits / at.step:3.0f} % logits, "
          f"{100 * sum(at.times.waiting.values()) / at.step:3.0f} % waiting"
          for row, at in scaling(setting, cost, record)),
        "",
        f"Below {ENOUGH:.0%} computing, if one of these changes",
        *_limits(setting, limits(setting, cost, record)),
        "",
        "Assumed",
        f"  {setting.mfu:.0%} of {gpu.flops / 1e12:.0f} TFLOP/s in bf16 ({gpu.source})",
        f"  {links.intra_node / GB:.0f} GB/s to GPUs of a node, {links.inter_node / GB:.0f} GB/s to other nodes, "
        "each way",
        f"  ({node.source})",
        f"  latencies of rings and trees as in NCCL's own model; {1e6 * MESSAGE:.0f} us a message of an all-to-all",
        "  collectives run one after another, in the order in which the recorded step queues them",
        "  all pairs equally likely as negatives; every GPU as fast as the others",
        "  operations, activations and collectives recorded, not measured, for the fast implementation, with captions",
        f"  of {min(TOKENS, length)} tokens (at most {min(LONGEST, length)}) and the dtypes of CUDA's autocast; "
        "logits at the rate of memory, and in fp32",
        "  not counted in memory: allocator overhead, CUDA context, NCCL buffers, kernel workspace",
        "  not counted in time: optimizer step, loader, evaluation, checkpoints",
    ]  # fmt: skip
    return "\n".join(lines)


def memory_table(setting: ClusterSetting, cost: StepCost) -> list[str]:
    """Memory of one GPU by part, and whether it fits."""
    parts, room = gpu_memory(setting, cost), NODES[setting.gpu].memory
    total = sum(parts.values())
    fits = "" if total < 0.9 * room else "   DOES NOT FIT: more microbatches or checkpointed activations"
    return [
        "Memory per GPU, GB",
        *(f"  {name:<34}{size / GB:10.2f}" for name, size in parts.items()),
        f"  {'all':<34}{total / GB:10.2f}   of {room / GB:.0f}{fits}",
    ]


def _traffic(setting: ClusterSetting, record: RecordedStep, network: dict[str, float]) -> list[str]:
    """Table of the collectives of a step, by content."""
    here = rescaled(record, setting.ranks, setting.per_node, setting.pairs)
    calls = Counter(x.label for x in here.collectives)
    return [
        "Collectives of a step   calls   received per GPU, MB   on the network, ms",
        *(f"  {label:<22}{number:5}{here.received(label) / 1e6:22.2f}{1e3 * network.get(label, 0):21.1f}"
          for label, number in calls.most_common()),
    ]  # fmt: skip


def _limits(setting: ClusterSetting, found: Limits) -> list[str]:
    """Changes that would break the plan, a line each."""
    rate = setting.links.inter_node / GB
    lines = []
    if found.inter_node is not None:
        lines.append(f"  links between nodes: {found.inter_node / GB:.1f} GB/s for each GPU instead of {rate:.0f}")
    if found.straggler is not None:
        lines.append(f"  a straggler: one GPU {found.straggler:.0%} slower than the others, for which all wait")
    if found.pairs is not None:
        lines.append(f"  small batches: {found.pairs} pairs in a microbatch instead of {setting.pairs}")
    if found.gpus is not None:
        more = f"more GPUs: {found.gpus:,}" if found.gpus > setting.ranks else "it is already"
        lines.append(f"  {more}, mainly by {found.gpus_by}")
    return lines or ["  nothing that this model knows"]
