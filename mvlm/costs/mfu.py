"""Model FLOPs utilization (MFU): FLOPs of a step as a fraction of the GPUs' peak in the same time."""

import torch

from mvlm.config.pretrain import PretrainConfig
from mvlm.distributed.world import World
from mvlm.objectives.losses import loss_weights
from mvlm_kernels.hardware import peak_rates


def peak_flops(device: torch.device) -> float | None:
    """Peak bf16 FLOP/s of a GPU by its data sheet; None for an unknown GPU and for a CPU."""
    if device.type != "cuda":
        return None
    found = peak_rates(torch.cuda.get_device_name(device))
    return found.flops if found else None


class ModelFlopsUtilization:
    """MFU of a run.

    FLOPs are those of the fast implementation, forward and backward, counted once (`mvlm.costs.step_cost`) for captions
    of the run's mean length. Recomputation by activation checkpointing is not counted.
    """

    def __init__(self, config: PretrainConfig, world: World) -> None:
        self._config, self._world = config, world
        self._peak = peak_flops(world.device)
        self._flops: float | None = None
        """FLOPs of one pair."""

    def of_rate(self, pairs_per_s: float, tokens: float) -> float | None:
        """MFU from pairs of the global batch a second and the mean number of tokens of a caption.

        None if the peak is unknown. The first call counts FLOPs, which takes seconds.
        """
        if self._peak is None:
            return None
        if self._flops is None:
            self._flops = flops_per_pair(self._config, tokens, self._world.size)
        return self._flops * pairs_per_s / (self._peak * self._world.size)


def flops_per_pair(config: PretrainConfig, tokens: float, ranks: int = 1) -> float:
    """Count the FLOPs of a pair, forward and backward, for captions with a mean number of tokens."""
    from mvlm.costs.step_cost import StepShape, step_cost  # slow to import, and only needed if the peak is known

    pairs = config.batch_size // (ranks * config.accumulate)
    # gpu=False leaves out the padding rows that a GPU computes for captions: useful FLOPs only.
    shape = StepShape(pairs=pairs, tokens=max(3, round(tokens)), longest=config.model.text_length, gpu=False)
    found = step_cost(config.model, shape, loss_weights(config))
    return (found.forward + found.backward) / pairs
