"""Model FLOP utilisation (MFU): the operations that the step needs, over what the GPUs could do in its time."""

import torch

from mvlm.distributed import World
from mvlm.pretrain_config import PretrainConfig
from mvlm_kernels.hardware import peak_rates


def peak_flops(device: torch.device) -> float | None:
    """bf16 operations a second of a GPU by its data sheet; None for one that is in no table, and for a CPU."""
    if device.type != "cuda":
        return None
    found = peak_rates(torch.cuda.get_device_name(device))
    return found.flops if found else None


class Utilisation:
    """MFU of a run. The operations are those of the fast plan, forward and backward, counted once (`mvlm.footprint`)
    for captions of the length that they have here; what activation checkpointing runs again is not work.
    """

    def __init__(self, config: PretrainConfig, world: World) -> None:
        self._config, self._world = config, world
        self._peak = peak_flops(world.device)
        self._operations: float | None = None
        """Of one pair."""

    def mfu(self, pairs_per_s: float, tokens: float) -> float | None:
        """Share of the peak of all ranks at so many pairs a second of the global batch, with so many tokens a caption.

        None where the peak is not known. The first call counts operations, which takes seconds.
        """
        if self._peak is None:
            return None
        if self._operations is None:
            self._operations = self._count(tokens)
        return self._operations * pairs_per_s / (self._peak * self._world.size)

    def _count(self, tokens: float) -> float:
        from mvlm.footprint import Shape, footprint  # slow to import, and only needed where the peak is known

        pairs = self._config.batch_size // (self._world.size * self._config.accumulate)
        # Not the rows that a GPU makes for captions which might be longer: nobody needs them.
        shape = Shape(pairs=pairs, tokens=max(3, round(tokens)), longest=self._config.model.text_length, gpu=False)
        found = footprint(self._config.model, shape)
        return (found.forward + found.backward) / pairs
