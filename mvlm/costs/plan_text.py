"""Text of a cluster plan: figures, and the assumptions behind them."""

from collections import Counter

from mvlm.costs.cluster_plan import (
    ENOUGH,
    GB,
    NODES,
    ClusterSetting,
    Limits,
    gpu_memory,
    limits,
    most_logits,
    planned_step,
    rank_step_cost,
    rank_step_record,
    scaling,
)
from mvlm.costs.recorded_step import RecordedStep
from mvlm.costs.step_cost import LONGEST, TOKENS, StepCost
from mvlm.costs.timeline import MESSAGE, rescaled
from mvlm_kernels.hardware import GPUS


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
