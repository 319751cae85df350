"""Cluster plan: memory, time and traffic of a pretraining step on many GPUs.

FLOPs and bytes are counted from the code (`mvlm.costs.step_cost`). Rates are those of data sheets and of the settings.
The plan prints its assumptions with its figures. No GPU has timed this.

Shape legend: W GPUs, n pairs of a GPU, N patches, L tokens a caption may have, C width, E contrastive width.
"""

import re
from dataclasses import dataclass, replace

from mvlm.config.model import MaskVLMConfig
from mvlm.costs.step_cost import StepCost, StepShape, step_cost
from mvlm.distributed.contrastive import MAX_LOGITS
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
    source: str


NODES = {
    "A100": Node(80e9, 300e9, 25e9, "DGX A100 data sheet: 600 GB/s NVLink both ways, a 200 Gb/s adapter per GPU"),
    "H100": Node(80e9, 450e9, 50e9, "DGX H100 data sheet: 900 GB/s NVLink both ways, a 400 Gb/s adapter per GPU"),
    "H200": Node(141e9, 450e9, 50e9, "DGX H200 data sheet: 900 GB/s NVLink both ways, a 400 Gb/s adapter per GPU"),
    "B200": Node(180e9, 900e9, 50e9, "DGX B200 data sheet: 1.8 TB/s NVLink both ways, a 400 Gb/s adapter per GPU"),
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
    local_negatives: bool = False
    sharded: bool = False
    """FSDP2 instead of DDP."""
    mfu: float = 0.4
    """Model FLOPs utilization during forward and backward, in (0, 1]."""

    @property
    def ranks(self) -> int:
        """W, number of GPUs."""
        return self.per_node * self.nodes


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
    shape = StepShape(
        pairs=setting.batch_size // parts,
        ranks=setting.ranks,
        microbatches=setting.accumulate,
        checkpointed=setting.checkpointed,
        local_negatives=setting.local_negatives,
    )
    return step_cost(setting.model, shape)


def gpu_memory(setting: ClusterSetting, cost: StepCost) -> dict[str, float]:
    """Bytes of one GPU by part. Weights and AdamW are in fp32.

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


def exchange_bytes(setting: ClusterSetting) -> dict[str, float]:
    """Bytes that one GPU receives in forward for ITC (embeddings) and ITM (features). Backward sends as many back."""
    if setting.ranks == 1:
        return {"embeddings": 0.0, "features": 0.0}
    config, others = setting.model, setting.batch_size * (1 - 1 / setting.ranks)
    rows = 1 + config.num_patches + config.text_length
    features = 0.0 if setting.local_negatives else 4.0 * others * rows * config.width
    return {"embeddings": 2 * 4.0 * others * config.itc_width, "features": features}


def step_seconds(setting: ClusterSetting, cost: StepCost) -> dict[str, float]:
    """Seconds of one step by activity, and their sum, `step`.

    Communication of gradients (and of FSDP2's parameters) overlaps with backward; only the rest counts. Communication
    of embeddings and features precedes ITC and ITM, and overlaps with nothing. A broadcast enters a node through all of
    its adapters.
    """
    node, rate = NODES[setting.gpu], GPUS[setting.gpu].flops * setting.mfu
    forward, backward = cost.forward / rate, cost.backward / rate
    entering = node.intra_node if setting.nodes == 1 else min(node.intra_node, setting.per_node * node.inter_node)
    moved = 4.0 * cost.parameters
    passes = (
        3 * setting.accumulate if setting.sharded else 2
    )  # gather twice and scatter, each microbatch; or all-reduce
    inside = passes * moved * (1 - 1 / setting.per_node) / node.intra_node
    outside = 2 * moved * (1 - 1 / setting.nodes) / (setting.per_node * node.inter_node)
    shown = max(0.0, inside + outside - backward)
    exchanged = 2 * sum(exchange_bytes(setting).values()) / entering
    rows = {"forward": forward, "backward": backward, "gradients, not overlapped": shown}
    rows["embeddings and features"] = exchanged
    return rows | {"step": sum(rows.values())}


def scaling(setting: ClusterSetting, cost: StepCost) -> list[tuple[int, int, float, float]]:
    """Weak scaling over doubling numbers of nodes: the pairs of a GPU stay constant, so the global batch grows.

    Each row has GPUs, global batch, seconds per step, and the fraction of the time that is computation.
    """
    rows, nodes = [], 1
    while setting.per_node * nodes <= 1024:
        wider = replace(setting, nodes=nodes, batch_size=setting.batch_size // setting.ranks * setting.per_node * nodes)
        times = step_seconds(wider, cost)
        rows.append(
            (wider.ranks, wider.batch_size, times["step"], (times["forward"] + times["backward"]) / times["step"])
        )
        nodes *= 2
    return rows


def format_plan(setting: ClusterSetting, pairs: int, epochs: float, loader_rate: float = 0.0) -> str:
    """Format the plan as text.

    Args:
        pairs: pairs of the data set.
        epochs: passes over it.
        loader_rate: measured pairs per second of one node's loader; 0 for not measured.
    """
    cost = rank_step_cost(setting)
    node, gpu = NODES[setting.gpu], GPUS[setting.gpu]
    parts, times, carried = gpu_memory(setting, cost), step_seconds(setting, cost), exchange_bytes(setting)
    total, step = sum(parts.values()), times["step"]
    steps = pairs * epochs / setting.batch_size
    per_second = setting.batch_size / step
    own = setting.batch_size // setting.ranks
    lines = [
        f"{setting.ranks} x {setting.gpu} ({setting.nodes} nodes of {setting.per_node}), "
        f"{setting.batch_size:,} pairs per step: {own} per GPU in microbatches of {own // setting.accumulate}, "
        + ("FSDP2" if setting.sharded else "DDP"),
        f"{cost.parameters / 1e6:.1f} M parameters; {(cost.forward + cost.backward) / own / GB:.1f} GFLOP per pair",
        "",
        "Memory per GPU, GB",
        *(f"  {name:<34}{size / GB:10.2f}" for name, size in parts.items()),
        f"  {'all':<34}{total / GB:10.2f}   of {node.memory / GB:.0f}"
        + ("" if total < 0.9 * node.memory else "   DOES NOT FIT: more microbatches or checkpointed activations"),
        f"  of the activations, logits at most {4 * MAX_LOGITS / GB:.2f}, embeddings of all "
        f"{2 * 4 * setting.batch_size * setting.model.itc_width / GB:.2f}",
        "",
        "A step, milliseconds",
        *(f"  {name:<34}{1e3 * time:10.1f}" for name, time in times.items()),
        f"  received per GPU in forward, GB: embeddings {carried['embeddings'] / GB:.2f}, features "
        f"{carried['features'] / GB:.2f}; backward returns as many",
        "",
        f"{per_second:,.0f} pairs/s; {steps:,.0f} steps, {steps * step / 3600:,.1f} hours",
        f"The loader of each node has to deliver {per_second / setting.nodes:,.0f} pairs/s"
        + (f"; measured {loader_rate:,.0f}" + (": it is the limit" if loader_rate < per_second / setting.nodes else "")
           if loader_rate else ""),
        "",
        "More nodes, same pairs per GPU",
        *(f"  {gpus:6,} GPUs {batch:10,} pairs {1e3 * time:8.0f} ms, {100 * share:3.0f} % computing"
          for gpus, batch, time, share in scaling(setting, cost)),
        scaling_limit(setting, cost),
        "",
        "Assumed",
        f"  {setting.mfu:.0%} of {gpu.flops / 1e12:.0f} TFLOP/s in bf16 ({gpu.source})",
        f"  {node.intra_node / GB:.0f} GB/s to GPUs of a node, {node.inter_node / GB:.0f} GB/s to other nodes, "
        "each way",
        f"  ({node.source})",
        "  operations and activations counted, not measured, for the fast implementation, with captions of 12 tokens",
        "  (at most 30) and the dtypes of CUDA's autocast",
        "  not counted in memory: allocator overhead, CUDA context, NCCL buffers, kernel workspace",
        "  not counted in time: optimizer step, loader, evaluation, checkpoints",
    ]  # fmt: skip
    return "\n".join(lines)


def scaling_limit(setting: ClusterSetting, cost: StepCost) -> str:
    """Number of GPUs from which a step spends more time on communication than on computation, as a line of text."""
    for gpus, _, _, share in scaling(setting, cost):
        if share < 0.5:
            return f"  From {gpus:,} GPUs on, communication takes more than half of a step"
    return "  Computation takes at least half of a step at all sizes above"
