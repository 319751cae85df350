"""Model FLOPs utilization (MFU): FLOPs of a step as a fraction of the GPUs' peak in the same time."""

from collections.abc import Sequence
from dataclasses import fields
from functools import cache
from statistics import fmean

import torch

from mvlm.config.groups import PartSettings, RunConfig
from mvlm.config.model import MaskVLMConfig
from mvlm.config.pretrain import PretrainConfig
from mvlm.distributed.world import World
from mvlm.objectives.pretraining import objectives_of
from mvlm.objectives.step import Objective
from mvlm_kernels.hardware import peak_rates


def peak_flops(device: torch.device) -> float | None:
    """Peak bf16 FLOP/s of a GPU by its data sheet; None for an unknown GPU and for a CPU."""
    if device.type != "cuda":
        return None
    found = peak_rates(torch.cuda.get_device_name(device))
    return found.flops if found else None


class ModelFlopsUtilization:
    """Model FLOPs utilization of a run, from its measured speed.

    FLOPs are those of the fast implementation, forward and backward, counted once (`mvlm.costs.step_cost`) for captions
    of the run's mean length. Recomputation by activation checkpointing is not counted.
    """

    def __init__(self, config: RunConfig, world: World) -> None:
        self._config, self._world = config, world
        # The count is that of a pretraining step. A task's step is another one.
        self._peak = peak_flops(world.device) if isinstance(config, PretrainConfig) else None
        self._flops: dict[MaskVLMConfig, float] = {}
        """FLOPs of one pair, forward and backward, in each stage that was counted."""

    def of_rate(self, pairs_per_s: float, tokens: float, steps: Sequence[int]) -> float | None:
        """MFU from pairs of the global batch a second and the mean number of tokens of a caption.

        steps: numbers of the steps, from 1, in which that rate was reached.

        None if the peak is unknown, and for fine-tuning. The first call of a stage counts FLOPs, which takes seconds.
        """
        if self._peak is None or not isinstance(self._config, PretrainConfig):
            return None
        stages = [self._config.model_at(step - 1) for step in steps]
        for model in stages:
            if model not in self._flops:
                self._flops[model] = flops_per_pair(self._config, tokens, self._world.size, model)
        flops = fmean(self._flops[model] for model in stages)
        return flops * pairs_per_s / (self._peak * self._world.size)


def flops_per_pair(config: PretrainConfig, tokens: float, ranks: int = 1, model: MaskVLMConfig | None = None) -> float:
    """Count the FLOPs of one pair in a training step, forward and backward.

    Args:
        tokens: mean number of tokens of a caption.
        model: settings of the model in the stage that is counted. Default: the run's.
    """
    pairs = config.batch_size // (ranks * config.accumulate)
    how = max(3, round(tokens)), objectives_of(config), part_settings(config)
    return step_flops(model or config.model, pairs, *how) / pairs


def part_settings(config: PretrainConfig) -> PartSettings:
    """The settings of a run that say how each part of the model learns."""
    return PartSettings(**{field.name: getattr(config, field.name) for field in fields(PartSettings)})


@cache  # trials of a study differ in their seeds, which change no count
def step_flops(
    model: MaskVLMConfig, pairs: int, tokens: int, objectives: tuple[Objective, ...], parts: PartSettings
) -> int:
    """FLOPs of one rank's training step, forward and backward.

    pairs: number of pairs. tokens: number of tokens of each caption.
    """
    from mvlm.costs.step_cost import StepShape, step_cost  # slow to import, and only needed if the peak is known

    # gpu=False leaves out the padding rows that a GPU computes for captions: useful FLOPs only.
    shape = StepShape(pairs=pairs, tokens=tokens, longest=model.text_length, gpu=False, parts=parts)
    found = step_cost(model, shape, objectives)
    return found.forward + found.backward
