"""Memory and time of fine-tuning on a cluster, counted on fake tensors.

Shape legend: B pairs of a microbatch.
"""

from dataclasses import replace

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mvlm.costs.cluster_plan import GB, ClusterSetting, Collective, memory_table
from mvlm.costs.step_cost import (
    LONGEST,
    TOKENS,
    StepCost,
    autocast_of,
    counted,
    fake_microbatch,
    give_fake_tensors,
    step_cost,
)
from mvlm.distributed.parallel import checkpoint_activations
from mvlm.model.adaptation import adapt
from mvlm.model.maskvlm import IMPLEMENTATIONS, MaskVLM
from mvlm.model.packing import round_up_length
from mvlm.tasks.load import find_task
from mvlm.tasks.retrieval import OBJECTIVES
from mvlm.tasks.task import TaskOptions
from mvlm_kernels.hardware import GPUS


def task_step_cost(task: str, setting: ClusterSetting) -> StepCost:
    """Memory and FLOPs of a rank's forward and backward pass in fine-tuning, without running it.

    They are of one microbatch; of all microbatches of a step for a task whose loss contrasts the whole batch
    (retrieval). ConfigError for an unknown task, or one without `Task.example`.
    """
    kind, config, shape = find_task(task), setting.model, setting.shape
    if kind.whole_batch:
        return step_cost(config, shape, OBJECTIVES)
    with torch.device("meta"):
        model = MaskVLM(config)
    model.set_attention("sdpa", "sdpa")
    if shape.checkpointed:
        checkpoint_activations(model)
    with FakeTensorMode():
        give_fake_tensors(model)
        state, targets = kind.example(shape.pairs)
        head = kind(model, TaskOptions(), state)
        adapt(model, shape.parts)
        if shape.parts.all_frozen:
            model.requires_grad_(False)
        batch, masks = fake_microbatch(config, shape.pairs, shape.tokens, shape.longest)
        images = state.get("images", 1)
        if images > 1:  # a strip of images, side by side
            batch = replace(batch, images=batch.images.repeat(1, 1, 1, images))

        def step() -> None:
            with autocast_of(shape):
                losses = head.losses_of_step(batch, masks, targets, IMPLEMENTATIONS["fast"])
            losses.total.backward()

        # A GPU's host does not know how many tokens the captions have together, and takes a bound.
        return counted(head, step, images * shape.pairs * round_up_length(batch.max_length), shape)


def format_task_plan(task: str, setting: ClusterSetting, samples: int, epochs: float) -> str:
    """The plan of a fine-tuning run as text.

    Args:
        samples: samples of the training split.
        epochs: passes over it.
    """
    cost = task_step_cost(task, setting)
    gpu = GPUS[setting.gpu]
    repeats = 1 if find_task(task).whole_batch else setting.accumulate
    flops = repeats * (cost.forward + cost.backward)
    computing = flops / (gpu.flops * setting.mfu)
    reduced = setting.seconds(Collective("all-reduce", "gradients", 4 * cost.trained, setting.ranks))
    step, steps = computing + reduced, samples * epochs / setting.batch_size
    length = setting.model.text_length
    return "\n".join(
        [
            f"fine-tuning on {task}: {setting.ranks} x {setting.gpu}, images of {setting.model.image_size} px, "
            f"{setting.batch_size:,} samples per step in microbatches of {setting.pairs}",
            f"{cost.sizes}; {flops * setting.ranks / setting.batch_size / GB:.1f} GFLOP per sample",
            "",
            *memory_table(setting, cost),
            "",
            "A step, milliseconds",
            f"  {'forward and backward':<34}{1e3 * computing:10.1f}",
            f"  {'gradients, after them':<34}{1e3 * reduced:10.1f}",
            f"{setting.batch_size / step:,.0f} samples/s; {steps:,.0f} steps, {steps * step / 3600:,.2f} hours",
            "",
            "Assumed",
            f"  {setting.mfu:.0%} of {gpu.flops / 1e12:.0f} TFLOP/s in bf16 ({gpu.source}); no GPU has timed this",
            "  the head of the published data set, of vqa the classifier's",
            f"  texts of {min(TOKENS, length)} tokens (at most {min(LONGEST, length)})",
            "  gradients are reduced after the backward pass, not during it; exchanged features are not counted",
            "  not counted: optimizer step, loader, evaluation, checkpoints, allocator overhead",
        ]
    )
