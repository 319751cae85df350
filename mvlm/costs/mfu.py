"""Model FLOPs utilization (MFU): operations of the step as a share of what the GPUs could do in its time."""

import torch

from mvlm.config.pretrain import PretrainConfig
from mvlm.distributed.world import World
from mvlm_kernels.hardware import peak_rates


def peak_flops(device: torch.device) -> float | None:
    """Peak bf16 operations a second of a GPU by its data sheet; None for an unknown GPU and for a CPU."""
    if device.type != "cuda":
        return None
    found = peak_rates(torch.cuda.get_device_name(device))
    return found.flops if found else None


class ModelFlopsUtilization:
    """MFU of a run.

    The operations are those of the fast implementation, forward and backward, counted once (`mvlm.costs.step_cost`) for
    captions of the run's mean length. Recomputation by activation checkpointing is not counted.
    """

    def __init__(self, config: PretrainConfig, world: World) -> None:
        self._config, self._world = config, world
        self._peak = peak_flops(world.device)
        self._operations: float | None = None
        """Operations of one pair."""

    def of_rate(self, pairs_per_s: float, tokens: float) -> float | None:
        """MFU at a rate of pairs of the global batch a second, with a mean number of tokens a caption.

        None where the peak is unknown. The first call counts operations, which takes seconds.
        """
        if self._peak is None:
            return None
        if self._operations is None:
            self._operations = self._count(tokens)
        return self._operations * pairs_per_s / (self._peak * self._world.size)

    def _count(self, tokens: float) -> float:
        from mvlm.costs.step_cost import StepShape, step_cost  # slow to import, and only needed where the peak is known

        pairs = self._config.batch_size // (self._world.size * self._config.accumulate)
        # gpu=False leaves out the rows that a GPU computes for captions that might be longer: they are not needed.
        shape = StepShape(pairs=pairs, tokens=max(3, round(tokens)), longest=self._config.model.text_length, gpu=False)
        found = step_cost(self._config.model, shape)
        return (found.forward + found.backward) / pairs
