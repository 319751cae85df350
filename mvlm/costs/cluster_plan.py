"""Cluster plan: memory, time and traffic of a pretraining step on many GPUs, and its text.

FLOPs and memory are counted while the real step runs on fake tensors (`mvlm.costs.step_cost`). What ranks exchange
follows from the sizes of the model and the batch. Rates are those of data sheets and of the settings. The latencies of
rings and trees are those by which NCCL chooses between them (its source, src/graph/tuning.cc). No GPU has timed this.

Shape legend: W GPUs, A microbatches of a GPU, b pairs of a microbatch, n = A b pairs of a GPU.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Literal, NamedTuple

from mvlm.config.groups import FULL, MAX_GRAPHS, PartSettings
from mvlm.config.model import MaskVLMConfig
from mvlm.config.stages import parse_stages
from mvlm.costs.step_cost import LONGEST, TOKENS, StepCost, StepShape, step_cost
from mvlm.errors import ConfigError
from mvlm.objectives.step import MAX_LOGITS
from mvlm_kernels.hardware import GPUS

GB = 1e9


@dataclass(frozen=True, slots=True)
class Node:
    """Memory of a GPU, its speed in fp32, and its links in the kind of node that it usually comes in."""

    memory: float
    """Bytes of a GPU's memory."""
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


class Protocol(NamedTuple):
    """Times of one of NCCL's protocols, each of which trades bandwidth for latency otherwise."""

    bandwidth: float
    """Share of a link's bandwidth that the protocol uses, 0 to 1."""
    start: float
    """Seconds to start a collective."""
    ring: tuple[float, float]
    """Seconds of a hop of a ring, in a node and between nodes."""
    tree: tuple[float, float]
    """Seconds of a hop of a tree, in a node and between nodes."""


PROTOCOLS = (
    Protocol(0.25, 6.6e-6, (1.08e-6, 2.7e-6), (1.08e-6, 5.0e-6)),  # LL
    Protocol(0.92, 14.0e-6, (1.9e-6, 4.0e-6), (1.25e-6, 8.5e-6)),  # LL128
    Protocol(1.0, 8.4e-6, (3.4e-6, 14.0e-6), (4.0e-6, 14.0e-6)),  # Simple, which also carries an all-to-all
)
SIMPLE = PROTOCOLS[-1]
MESSAGE = 2e-6
"""Seconds that each message of an all-to-all takes, whatever its size: an assumption, not from NCCL's model."""
BUCKET = 25 << 20
"""Bytes of a bucket of gradients: DDP's default."""


class Collective(NamedTuple):
    """Collective operations of one kind and size in a training step."""

    kind: Literal["all-reduce", "all-gather", "reduce-scatter", "all-to-all"]
    label: str
    """Name for what the messages carry, such as gradients."""
    size: float
    """Bytes of one call: one rank's part in an all-gather or a reduce-scatter, all rows that arrive in an all-to-all,
    or the whole tensor of an all-reduce."""
    ranks: int
    """Number of ranks in the group."""
    calls: int = 1
    across: bool = False
    """True if the group has one rank in each node."""
    senders: int = 0
    """Number of other ranks from which an all-to-all brings rows."""

    @property
    def received(self) -> float:
        """Bytes that enter a rank. An all-reduce is a reduce-scatter and an all-gather, as in a ring."""
        parts = {"all-reduce": 2 / self.ranks, "all-to-all": 1 / self.ranks}.get(self.kind, 1)
        return self.calls * self.size * (self.ranks - 1) * parts


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
    """True for FSDP2, False for DDP."""
    graphs: bool = False
    """True if steps are replayed from CUDA graphs."""
    parts: PartSettings = FULL
    """Learning of each part of the model: all weights, none, or adapters. All weights with FSDP2."""
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
        """Number of pairs of a microbatch."""
        return self.batch_size // (self.ranks * self.accumulate)

    @property
    def shape(self) -> StepShape:
        """Sizes of the step of one GPU. ConfigError if the batch does not divide evenly among GPUs and microbatches."""
        parts = self.ranks * self.accumulate
        if self.batch_size % parts:
            raise ConfigError(
                f"batch_size: wanted a multiple of {self.ranks} GPUs x {self.accumulate} microbatches = {parts}, "
                f"got {self.batch_size}"
            )
        return StepShape(
            pairs=self.pairs,
            ranks=self.ranks,
            nodes=self.nodes,
            microbatches=self.accumulate,
            tokens=min(TOKENS, self.model.text_length),
            longest=min(LONGEST, self.model.text_length),
            checkpointed=self.checkpointed,
            sharded=self.sharded,
            parts=self.parts,
        )

    @property
    def between_nodes(self) -> float:
        """Bytes per second, each way, from a GPU to other nodes: `inter_node`, or else the data sheet's."""
        return self.inter_node or NODES[self.gpu].inter_node

    def seconds(self, moved: Collective) -> float:
        """Seconds per step that collectives of one kind and size take on the network, by rings or trees."""
        if moved.ranks == 1:
            return 0.0
        intra_node = NODES[self.gpu].intra_node
        here = 1 if moved.across else min(moved.ranks, self.per_node)
        nodes = moved.ranks // here
        if moved.kind == "all-to-all":
            far = 1 - (here - 1) / (moved.ranks - 1)  # of what comes from others, if all ranks are equally likely
            others = moved.received / moved.calls
            carried = max(others * (1 - far) / intra_node, others * far / self.between_nodes)
            hop = SIMPLE.ring[1] if nodes > 1 else SIMPLE.ring[0]
            return moved.calls * (SIMPLE.start + hop + moved.senders * MESSAGE + carried)
        in_parts = moved.kind != "all-reduce"
        passes, size = (1, moved.size * moved.ranks) if in_parts else (2, moved.size)
        # Rings in parallel use all adapters of a node, and each passes all but a rank's own part over every link.
        far = 0.0 if nodes == 1 else (1 - 1 / moved.ranks) / (here * self.between_nodes)
        carried = passes * size * max((1 - 1 / here) / intra_node, far)
        times = []
        for protocol in PROTOCOLS:
            hops = [(moved.ranks - nodes) * protocol.ring[0] + (nodes - 1) * protocol.ring[1]]
            if not in_parts:
                hops.append((here - 1) * protocol.tree[0] + math.log2(nodes) * protocol.tree[1])
            times.append(protocol.start + passes * min(hops) + carried / protocol.bandwidth)
        return moved.calls * min(times)


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


def gpu_memory(setting: ClusterSetting, cost: StepCost) -> dict[str, float]:
    """Bytes of one GPU's memory by what they hold.

    Weights and moments of AdamW are in fp32; Muon has one moment of most weights. Gradients may be counted twice: as
    buffers, and in `activations: backward` if they are alive at the peak.
    """
    ranks = setting.per_node if setting.sharded else 1
    weights, learned = 4 * cost.parameters / ranks, 4 * cost.trained / ranks
    rows = {"parameters": weights, "gradients": learned, "optimizer (two moments)": 2 * learned}
    if setting.sharded:  # parameters outside blocks stay gathered through a step; blocks are gathered two at a time
        config = setting.model
        outside = 4 * config.width * (2 * config.vocab_size + config.patch_values + 4 * config.width)
        rows["gathered parameters"] = outside + 2 * 2 * 16 * config.width**2
    if cost.copies:
        rows["weights in bf16"] = cost.copies
    if setting.graphs:  # beside the memory of eager steps, which the first batch of each shape takes
        rows |= {"graphs: activations": cost.peak, f"graphs: gradients of at most {MAX_GRAPHS}": MAX_GRAPHS * learned}
    return rows | {f"activations: {name}": size for name, size in sorted(cost.parts.items())}


def collectives(setting: ClusterSetting, trained: int) -> list[Collective]:
    """Collectives of one GPU's step. Features and embeddings travel in bf16.

    Every pair is equally likely drawn as a negative. The last of the list are the gradients that are reduced last.
    trained: number of parameters that learn.
    """
    model, ranks, repeats, pairs = setting.model, setting.ranks, setting.accumulate, setting.pairs
    own, width = repeats * pairs, model.width
    senders = round((ranks - 1) * (1 - (1 - 1 / ranks) ** pairs))
    image, text = 2 * pairs * (1 + model.num_patches) * width, 2 * pairs * min(TOKENS, model.text_length) * width
    embedding = model.itc_width * (1 if in_blocks(setting) else 2)  # of a pair: the caption, or the image too
    return [
        *_gathers(setting, "all-gather", "ids and draws", 3 * 8 * own),
        *_gathers(setting, "all-gather", "ids and draws", 2 * 4 * own),
        *_gathers(setting, "all-gather", "embeddings", 2 * embedding * own),
        *_gathers(setting, "reduce-scatter", "embeddings", 4 * embedding * own),  # their gradients, in fp32
        Collective("all-to-all", "features", image, ranks, 2 * repeats, senders=senders),
        Collective("all-to-all", "features", text, ranks, 2 * repeats, senders=senders),
        *(_columns(setting) if in_blocks(setting) else ()),
        Collective("all-reduce", "losses and counts", 8, ranks),
        Collective("all-reduce", "losses and counts", 7 * 4, ranks),
        Collective("all-reduce", "verdict and figures", 4 * (3 + 3 * ranks), ranks),  # mvlm.distributed.step_exchange
        *(_sharded if setting.sharded else _replicated)(setting, trained),
    ]


def _gathers(
    setting: ClusterSetting, kind: Literal["all-gather", "reduce-scatter"], label: str, part: float
) -> list[Collective]:
    """Gather of a rank's part, in bytes, or its way back: between nodes and in each node, if there are several."""
    if setting.nodes == 1 or setting.per_node == 1:
        return [Collective(kind, label, part, setting.ranks)]
    return [
        Collective(kind, label, part, setting.nodes, across=True),
        Collective(kind, label, part * setting.nodes, setting.per_node),
    ]


def _columns(setting: ClusterSetting) -> list[Collective]:
    """Collectives of a step that join the columns of ITC's logits over ranks, each of which has some rows only.

    Forward: the largest logit and the drawn negative of each column, and the column's sum. Backward: its gradient.
    """
    every, ranks = setting.batch_size, setting.ranks
    return [
        Collective("all-reduce", "columns of logits", 3 * 4 * every, ranks),
        Collective("all-reduce", "columns of logits", 8 * every, ranks),
        Collective("all-reduce", "columns of logits", 4 * every, ranks, 2),
    ]


def _replicated(setting: ClusterSetting, trained: int) -> list[Collective]:
    """All-reduces of gradients with DDP, as buckets of their mean size.

    The embedding of tokens and the LM head fill a bucket each. trained: number of parameters that learn.
    """
    buckets = 2 + max(0, math.ceil(4 * (trained - 2 * setting.model.vocab_size * setting.model.width) / BUCKET))
    return [Collective("all-reduce", "gradients", 4 * trained / buckets, setting.ranks, buckets)]


def _sharded(setting: ClusterSetting, parameters: int) -> list[Collective]:
    """Collectives of parameters and gradients with FSDP2: blocks are sharded in a node, and copied on every node.

    A block's parameters are gathered, in bf16, for each of its calls and again for each backward pass. Both losses that
    use a cross block call it twice, once for its keys and values. The other parameters, and gradients, are in fp32.
    """
    model, repeats = setting.model, setting.accumulate
    plain, crossing = (k * model.width**2 + m * model.width for k, m in ((12, 13), (16, 19)))
    encoders, cross, decoder = model.image_layers + model.text_layers, 2 * model.cross_layers, model.decoder_layers
    outside = parameters - encoders * plain - (cross + decoder) * crossing
    once = repeats == 1
    gathers = [  # bytes of parameters, and how often they are gathered
        (4 * outside, 1 if once else 2 * repeats + 1),
        (2 * plain, repeats * encoders * (2 if once else 3)),
        (2 * crossing, repeats * (8 * cross + 4 * decoder)),
    ]
    reduced = parameters - outside + (0 if once else cross * crossing)
    calls = encoders + 2 * decoder + (2 if once else 4) * cross
    gradients = [(reduced / calls, repeats * calls), (outside, repeats)]
    part = 4 / setting.per_node
    found = [
        Collective("all-gather", "parameters", size / setting.per_node, setting.per_node, calls)
        for size, calls in gathers
    ]
    for x, calls in gradients:
        found.append(Collective("reduce-scatter", "gradients", part * x, setting.per_node, calls))
        found.append(Collective("all-reduce", "gradients", part * x, setting.nodes, calls, across=True))
    return found


class PlannedStep(NamedTuple):
    """Planned seconds of one training step, by the work that takes them."""

    forward: float
    backward: float
    logits: float
    """Seconds of ITC's logits and of the draws from them, which grow with the global batch and overlap with nothing."""
    network: dict[str, float]
    """Seconds of all collectives, by `Collective.label`."""
    waiting: dict[str, float]
    """Seconds of the collectives that no computation hides, by `Collective.label`, the largest first."""

    @property
    def step(self) -> float:
        """Seconds of the whole step."""
        return self.forward + self.backward + self.logits + sum(self.waiting.values())

    @property
    def computing(self) -> float:
        """Fraction of the step, 0 to 1, in which forward and backward passes run: neither waiting nor ITC's logits."""
        return (self.forward + self.backward) / self.step


OVERLAP = {
    "ids and draws": 1 / 6,
    "embeddings": 1 / 60,
    "columns of logits": 0.0,
    "features": 1 / 6,
    "losses and counts": 1 / 6,
    "verdict and figures": 0.0,
    "gradients": 0.4,
    "parameters": 1.0,
}
"""Fraction of forward and backward during which collectives can run, by `Collective.label`: in the FLOPs of `base`,
those of MLM for embeddings, of MIM for features, of the encoders' backward pass for gradients."""


def planned_step(setting: ClusterSetting, cost: StepCost) -> PlannedStep:
    """Plan the seconds of one step.

    cost: of one GPU's step. It may have been counted for another number of GPUs with as many pairs on each.
    """
    gpu = GPUS[setting.gpu]
    forward, backward = (flops / (gpu.flops * setting.mfu) for flops in (cost.forward, cost.backward))
    repeats = setting.accumulate
    moved, computing = collectives(setting, cost.trained), forward + backward
    network = {label: 0.0 for _, label, *_ in moved}
    for x in moved:
        network[x.label] += setting.seconds(x)
    # What nothing can hide: the last gradients, and the counts that follow the backward pass.
    last = moved[-2:] if setting.sharded else moved[-1:]
    least = {"gradients": sum(setting.seconds(x) / x.calls for x in last)}
    least["losses and counts"] = network["losses and counts"] / 2
    if repeats > 1:  # gradient caching: ITC follows the encoders at once, and ITM of the first microbatch follows ITC
        least["embeddings"], least["ids and draws"] = network["embeddings"], network["ids and draws"] / 2
        least["features"] = network["features"] / (2 * repeats)
    beside = {label: part * computing for label, part in OVERLAP.items()}
    if not setting.sharded:  # DDP reduces gradients in the backward pass of the last microbatch
        beside["gradients"] /= repeats
    waiting = {label: max(least.get(label, 0), time - beside[label]) for label, time in network.items()}
    found = {label: time for label, time in sorted(waiting.items(), key=lambda item: -item[1]) if time > 0}
    return PlannedStep(forward, backward, _logit_seconds(setting), dict(network), found)


def _logit_seconds(setting: ClusterSetting) -> float:
    """Seconds of the work on ITC's logits and on the draws from them: matrix products in fp32, and memory traffic."""
    own, every, width = setting.batch_size // setting.ranks, setting.batch_size, setting.model.itc_width
    # Counted by `python -m mvlm_benchmarks.kernels.contrastive`: products, values that move for each logit, and how
    # often a product reads or writes a value of the width.
    products, values, times = (4, 175, 2) if in_blocks(setting) else (6, 182, 1)
    flops, moved = 2 * products * width, 4 * (values + times * products * width / own)  # of one logit
    return own * every * (flops / NODES[setting.gpu].fp32 + moved / GPUS[setting.gpu].bandwidth)


def in_blocks(setting: ClusterSetting) -> bool:
    """True if ITC computes its logits in blocks, both directions at once."""
    own, alone = setting.batch_size // setting.ranks, setting.ranks == setting.accumulate == 1
    return not alone and own >= max(1, MAX_LOGITS // setting.batch_size)


def most_logits(setting: ClusterSetting) -> int:
    """Most logits of ITC in memory at a time. One GPU without microbatches holds all of them."""
    alone = setting.ranks == setting.accumulate == 1
    return max(MAX_LOGITS, setting.batch_size**2 if alone else 0)


def scaling(setting: ClusterSetting, cost: StepCost, most: int = 4096) -> list[tuple[ClusterSetting, PlannedStep]]:
    """Plans of steps for 1, 2, 4, ... nodes, up to `most` GPUs, with as many pairs on each GPU as now (weak scaling).

    cost: of one GPU's step.
    """
    rows, nodes, own = [], 1, setting.batch_size // setting.nodes
    while setting.per_node * nodes <= most:
        row = replace(setting, nodes=nodes, batch_size=own * nodes)
        rows.append((row, planned_step(row, cost)))
        nodes *= 2
    return rows


def format_plan(
    setting: ClusterSetting, pairs: int, epochs: float, loader_rate: float = 0.0, stages: Sequence[str] = ()
) -> str:
    """Format the plan of a run as text.

    Args:
        pairs: number of pairs of the data set.
        epochs: passes over the data set.
        loader_rate: measured pairs per second of one node's loader; 0 for not measured.
        stages: sides of images by stage, as of a run (`mvlm.config.stages`). The rest of the plan is for the model's.
    """
    cost = step_cost(setting.model, setting.shape)
    node, gpu = NODES[setting.gpu], GPUS[setting.gpu]
    planned, moved = planned_step(setting, cost), collectives(setting, cost.trained)
    step = planned.step
    steps = pairs * epochs / setting.batch_size
    per_second = setting.batch_size / step
    own, length = setting.batch_size // setting.ranks, setting.model.text_length
    lines = [
        f"{setting.ranks} x {setting.gpu} ({setting.nodes} nodes of {setting.per_node}), "
        f"{setting.batch_size:,} pairs per step: {own} per GPU in microbatches of {setting.pairs}, "
        + ("FSDP2" if setting.sharded else "DDP"),
        f"{cost.sizes}; {(cost.forward + cost.backward) / own / GB:.1f} GFLOP per pair",
        "",
        *memory_table(setting, cost),
        f"  of the activations, logits at most {4 * most_logits(setting) / GB:.2f}, embeddings of all "
        f"{2 * 4 * setting.batch_size * setting.model.itc_width / GB:.2f}",
        "",
        "A step, milliseconds",
        f"  {'forward':<34}{1e3 * planned.forward:10.1f}",
        f"  {'backward':<34}{1e3 * planned.backward:10.1f}",
        f"  {'logits of ITC and draws':<34}{1e3 * planned.logits:10.1f}",
        *(f"  {'waiting for ' + name:<34}{1e3 * time:10.1f}" for name, time in planned.waiting.items()),
        f"  {'step':<34}{1e3 * step:10.1f}",
        "",
        "Collectives of a step   calls   received per GPU, MB   on the network, ms",
        *(f"  {label:<22}{sum(x.calls for x in moved if x.label == label):5}"
          f"{sum(x.received for x in moved if x.label == label) / 1e6:22.2f}{1e3 * time:21.1f}"
          for label, time in planned.network.items()),
        "",
        f"{per_second:,.0f} pairs/s; {steps:,.0f} steps, {steps * step / 3600:,.1f} hours",
        f"The loader of each node has to deliver {per_second / setting.nodes:,.0f} pairs/s"
        + (f"; measured {loader_rate:,.0f}" + (": it is the limit" if loader_rate < per_second / setting.nodes else "")
           if loader_rate else ""),
        *_stage_rows(setting, stages, steps, step),
        "",
        "More nodes, same pairs per GPU",
        *(f"  {row.ranks:6,} GPUs {row.batch_size:10,} pairs {1e3 * at.step:8.1f} ms, "
          f"{100 * at.computing:3.0f} % computing, {100 * at.logits / at.step:3.0f} % logits, "
          f"{100 * sum(at.waiting.values()) / at.step:3.0f} % waiting"
          for row, at in scaling(setting, cost)),
        "",
        "Assumed",
        f"  {setting.mfu:.0%} of {gpu.flops / 1e12:.0f} TFLOP/s in bf16 ({gpu.source})",
        f"  {node.intra_node / GB:.0f} GB/s to GPUs of a node, {setting.between_nodes / GB:.0f} GB/s to other nodes, "
        "each way",
        f"  ({node.source})",
        f"  latencies of rings and trees as in NCCL's own model; {1e6 * MESSAGE:.0f} us a message of an all-to-all",
        "  collectives hidden as far as the FLOPs beside them in `base` last, each kind for itself",
        "  all pairs equally likely as negatives; every GPU as fast as the others",
        "  operations and activations counted, not measured, for the fast implementation, with captions",
        f"  of {min(TOKENS, length)} tokens (at most {min(LONGEST, length)}) and the dtypes of CUDA's autocast; "
        "logits at the rate of memory, and in fp32",
        "  not counted in memory: allocator overhead, CUDA context, NCCL buffers, kernel workspace",
        "  not counted in time: optimizer step, loader, evaluation, checkpoints",
    ]  # fmt: skip
    return "\n".join(lines)


def _stage_rows(setting: ClusterSetting, stages: Sequence[str], steps: float, whole: float) -> list[str]:
    """Time of each stage, and of all against steps of `whole` seconds; none for a run of one stage."""
    if not stages:
        return []
    found, seconds = parse_stages(stages, setting.model, math.ceil(steps)), 0.0
    rows = ["", "Stages                        steps   GFLOP per pair   memory, GB   step, ms   pairs/s a node   hours"]
    for stage, following in zip_longest(found, found[1:]):
        at = replace(setting, model=stage.model)
        cost = step_cost(at.model, at.shape)
        step, made = planned_step(at, cost).step, (steps if following is None else following.start) - stage.start
        seconds += made * step
        patches = f"{stage.model.image_size} px, {stage.model.masked_patches} of {stage.model.num_patches} masked"
        flops = (cost.forward + cost.backward) * at.ranks / at.batch_size
        memory = sum(gpu_memory(at, cost).values())
        rows.append(
            f"  {patches:<25}{made:8,.0f}{flops / GB:17.1f}{memory / GB:13.2f}{1e3 * step:11.1f}"
            f"{at.batch_size / at.nodes / step:17,.0f}{made * step / 3600:8.1f}"
        )
    return [
        *rows,
        f"  all in {seconds / 3600:,.1f} hours, {100 * seconds / (steps * whole):.0f} % of those in one stage",
    ]


def memory_table(setting: ClusterSetting, cost: StepCost) -> list[str]:
    """Lines of text: memory of one GPU by what it holds, and whether it fits."""
    parts, room = gpu_memory(setting, cost), NODES[setting.gpu].memory
    total = sum(parts.values())
    way_out = "a smaller batch, or no graphs" if setting.graphs else "more microbatches or checkpointed activations"
    fits = "" if total < 0.9 * room else f"   DOES NOT FIT: {way_out}"
    return [
        "Memory per GPU, GB",
        *(f"  {name:<34}{size / GB:10.2f}" for name, size in parts.items()),
        f"  {'all':<34}{total / GB:10.2f}   of {room / GB:.0f}{fits}",
    ]
