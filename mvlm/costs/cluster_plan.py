"""A pretraining run on paper: memory, time and traffic of a step on many GPUs, from what the code counts
(`mvlm.costs.step_cost`) and from rates that are stated. The assumptions are printed with the figures that rest on them.

Shape legend: W GPUs, n pairs of a GPU, N patches, L tokens a caption may have, C width, E contrastive width.
"""

import re
from dataclasses import dataclass, replace

from mvlm.config.model import MaskVLMConfig
from mvlm.costs.step_cost import StepCost, StepShape, step_cost
from mvlm.distributed.contrastive import LOGITS
from mvlm.errors import ConfigError
from mvlm_kernels.hardware import GPUS

GB = 1e9


@dataclass(frozen=True, slots=True)
class Machine:
    """What is around a GPU: bytes of memory; bytes a second, each way, to GPUs of its node and to other nodes."""

    memory: float
    within: float
    between: float
    source: str


MACHINES = {
    "A100": Machine(80e9, 300e9, 25e9, "DGX A100 data sheet: 600 GB/s NVLink both ways, a 200 Gb/s adapter a GPU"),
    "H100": Machine(80e9, 450e9, 50e9, "DGX H100 data sheet: 900 GB/s NVLink both ways, a 400 Gb/s adapter a GPU"),
    "H200": Machine(141e9, 450e9, 50e9, "DGX H200 data sheet: 900 GB/s NVLink both ways, a 400 Gb/s adapter a GPU"),
    "B200": Machine(180e9, 900e9, 50e9, "DGX B200 data sheet: 1.8 TB/s NVLink both ways, a 400 Gb/s adapter a GPU"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterSetting:
    """What is planned."""

    model: MaskVLMConfig
    gpu: str
    per_node: int
    nodes: int
    batch_size: int
    """Pairs of the global batch."""
    accumulate: int = 1
    checkpointed: bool = False
    local_negatives: bool = False
    split: bool = False
    """FSDP2 instead of DDP."""
    mfu: float = 0.4
    """Share of the peak rate that matrix products reach over a whole step."""

    @property
    def ranks(self) -> int:
        """W."""
        return self.per_node * self.nodes


MOST_GPUS = 1_000_000


def parse_gpus(words: tuple[str, ...]) -> tuple[int, int]:
    """("8", "x", "16"), ("8 x 16",) or ("8x16",) -> 8 GPUs a node, 16 nodes; ("8",) is one node.

    ConfigError for anything else.
    """
    found = re.fullmatch(r"\s*(\d+)(?:\s*x\s*(\d+))?\s*", " ".join(words).lower())
    if found is None or not 1 <= int(found[1]) * int(found[2] or 1) <= MOST_GPUS:
        raise ConfigError(f"gpus: wanted GPUs a node x nodes, as in 8 x 16, got {' '.join(words)!r}")
    return int(found[1]), int(found[2] or 1)


def parse_count(text: str) -> int:
    """A number of pairs such as 400M; k, M and B stand for 1e3, 1e6 and 1e9. ConfigError for anything else."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([kMB]?)", text)
    if found is None or not float(found[1]):
        raise ConfigError(f"data: wanted a number of pairs such as 400M, got {text!r}")
    return round(float(found[1]) * {"": 1, "k": 1e3, "M": 1e6, "B": 1e9}[found[2]])


def count(setting: ClusterSetting) -> StepCost:
    """What one rank's step does. ConfigError when ranks and microbatches cannot share the batch."""
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


def memory(setting: ClusterSetting, found: StepCost) -> dict[str, float]:
    """Bytes of one GPU by part, of weights and AdamW in fp32. Gradients that the step made count as activations."""
    whole = 4 * found.parameters
    share = whole / setting.per_node if setting.split else whole
    rows = {"parameters": share, "gradients": share, "optimizer (two moments)": 2 * share}
    if setting.split:  # what is in no block stays gathered through a step; of blocks, two at a time
        config = setting.model
        outside = 4 * config.width * (2 * config.vocab_size + config.patch_values + 4 * config.width)
        rows["gathered parameters"] = outside + 2 * 4 * 16 * config.width**2
    rows |= {f"activations: {name}": size for name, size in sorted(found.parts.items())}
    return rows


def exchange_bytes(setting: ClusterSetting) -> dict[str, float]:
    """Bytes that one GPU takes in for the objectives, forward; backward gives as many back."""
    if setting.ranks == 1:
        return {"embeddings": 0.0, "features": 0.0}
    config, others = setting.model, setting.batch_size * (1 - 1 / setting.ranks)
    rows = 1 + config.num_patches + config.text_length
    features = 0.0 if setting.local_negatives else 4.0 * others * rows * config.width
    return {"embeddings": 2 * 4.0 * others * config.itc_width, "features": features}


def seconds(setting: ClusterSetting, found: StepCost) -> dict[str, float]:
    """Seconds of one step by what they go to, and `step`, all of them.

    Gradients (and FSDP2's parameters) travel behind the computation of backward: what does not fit there shows.
    Features travel before ITM, when there is nothing else to compute. A message to all enters a node through all its
    adapters.
    """
    machine, rate = MACHINES[setting.gpu], GPUS[setting.gpu].flops * setting.mfu
    forward, backward = found.forward / rate, found.backward / rate
    entering = machine.within if setting.nodes == 1 else min(machine.within, setting.per_node * machine.between)
    moved = 4.0 * found.parameters
    passes = 3 * setting.accumulate if setting.split else 2  # gather twice and scatter, each microbatch; or all-reduce
    inside = passes * moved * (1 - 1 / setting.per_node) / machine.within
    outside = 2 * moved * (1 - 1 / setting.nodes) / (setting.per_node * machine.between)
    shown = max(0.0, inside + outside - backward)
    exchanged = 2 * sum(exchange_bytes(setting).values()) / entering
    rows = {"forward": forward, "backward": backward, "gradients that show": shown, "features": exchanged}
    return rows | {"step": sum(rows.values())}


def scaling(setting: ClusterSetting, found: StepCost) -> list[tuple[int, int, float, float]]:
    """(GPUs, pairs of a global batch, seconds a step, share of the time that computes), nodes doubling.

    The pairs of a GPU stay what they are, so the global batch grows.
    """
    rows, nodes = [], 1
    while setting.per_node * nodes <= 1024:
        wider = replace(setting, nodes=nodes, batch_size=setting.batch_size // setting.ranks * setting.per_node * nodes)
        times = seconds(wider, found)
        rows.append(
            (wider.ranks, wider.batch_size, times["step"], (times["forward"] + times["backward"]) / times["step"])
        )
        nodes *= 2
    return rows


def report(setting: ClusterSetting, pairs: int, epochs: float, loader_rate: float = 0.0) -> str:
    """The plan as a page of text, for `pairs` pairs of data seen `epochs` times.

    `loader_rate` is what a node's loader was measured to give, in pairs a second; 0 where nobody has measured.
    """
    found = count(setting)
    machine, gpu = MACHINES[setting.gpu], GPUS[setting.gpu]
    parts, times, carried = memory(setting, found), seconds(setting, found), exchange_bytes(setting)
    total, step = sum(parts.values()), times["step"]
    steps = pairs * epochs / setting.batch_size
    per_second = setting.batch_size / step
    own = setting.batch_size // setting.ranks
    lines = [
        f"{setting.ranks} x {setting.gpu} ({setting.nodes} nodes of {setting.per_node}), {setting.batch_size:,} pairs a"
        f" step: {own} a GPU in microbatches of {own // setting.accumulate}, {'FSDP2' if setting.split else 'DDP'}",
        f"{found.parameters / 1e6:.1f} M parameters; {(found.forward + found.backward) / own / GB:.1f} GFLOP a pair",
        "",
        "Memory of a GPU, GB",
        *(f"  {name:<34}{size / GB:10.2f}" for name, size in parts.items()),
        f"  {'all':<34}{total / GB:10.2f}   of {machine.memory / GB:.0f}"
        + ("" if total < 0.9 * machine.memory else "   DOES NOT FIT: more microbatches or checkpointed activations"),
        f"  of the activations, logits at most {4 * LOGITS / GB:.2f}, embeddings of all "
        f"{2 * 4 * setting.batch_size * setting.model.itc_width / GB:.2f}",
        "",
        "A step, milliseconds",
        *(f"  {name:<34}{1e3 * time:10.1f}" for name, time in times.items()),
        f"  taken in by a GPU for features, GB{carried['features'] / GB:10.2f}   and given back as gradients",
        "",
        f"{per_second:,.0f} pairs/s; {steps:,.0f} steps, {steps * step / 3600:,.1f} hours",
        f"The loader has to give {per_second / setting.nodes:,.0f} pairs/s on each node"
        + (f"; measured {loader_rate:,.0f}" + (": it is the limit" if loader_rate < per_second / setting.nodes else "")
           if loader_rate else ""),
        "",
        "The same pairs a GPU on more nodes",
        *(f"  {gpus:6,} GPUs {batch:10,} pairs {1e3 * time:8.0f} ms, {100 * share:3.0f} % computing"
          for gpus, batch, time, share in scaling(setting, found)),
        stops(setting, found),
        "",
        "Assumed",
        f"  {setting.mfu:.0%} of {gpu.flops / 1e12:.0f} TFLOP/s in bf16 ({gpu.source})",
        f"  {machine.within / GB:.0f} GB/s to GPUs of a node, {machine.between / GB:.0f} GB/s to other nodes, each way",
        f"  ({machine.source})",
        "  operations and activations counted, not measured: the fast plan, captions of 12 tokens, the longest of 30,",
        "  dtypes of CUDA's autocast; no allocator's waste, no CUDA context, no NCCL buffers, no kernel workspace",
        "  the optimizer's step, the loader's wait, evaluation and checkpoints take no time",
    ]  # fmt: skip
    return "\n".join(lines)


def stops(setting: ClusterSetting, found: StepCost) -> str:
    """Where more nodes no longer help: what travels takes longer than what is computed."""
    for gpus, _, _, share in scaling(setting, found):
        if share < 0.5:
            return f"  It stops scaling at {gpus:,} GPUs: more than half of a step is spent on what travels"
    return "  More than half of a step computes as far as this goes"
