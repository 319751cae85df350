"""MaskVLM: the network with its objectives (docs/explain/method.md)."""

from collections.abc import Callable, Sequence
from typing import Literal

from torch import Tensor

from mvlm.config.model import MaskVLMConfig
from mvlm.distributed.collectives import GlobalBatchLayout
from mvlm.model import fast, plain
from mvlm.model.implementation import Implementation
from mvlm.model.network import MaskVLMNetwork
from mvlm.model.pretrained import HubMixin
from mvlm.objectives.losses import Losses, at_least_float32
from mvlm.objectives.pretraining import ALL, OwnLoss
from mvlm.objectives.step import Features, Objective, Step
from mvlm_dataloading import Batch, Masks

IMPLEMENTATIONS: dict[str, Implementation] = {"plain": plain, "fast": fast}
"""Implementations of the training step, by the value of `plan` in calls, configurations and on the command line."""


class MaskVLM(MaskVLMNetwork, HubMixin):
    """MaskVLM: the network with its losses, `from_pretrained` and `save_pretrained`."""

    def forward(
        self,
        batch: Batch,
        masks: Masks,
        *,
        seed: int = 0,
        step: int | Tensor = 0,
        objectives: Sequence[Objective] = ALL,
        plan: Literal["plain", "fast"] = "plain",
        own_loss: Callable[[Features], Tensor] | None = None,
    ) -> Losses:
        """Compute the losses of one batch, on one rank and without microbatches.

        `mvlm.distributed.global_batch` computes the same losses over ranks and microbatches.

        Args:
            seed: seed of ITM's negatives.
            step: number of the update; with `seed` it determines the negatives. In CUDA graphs, an int64 scalar on the
                device. torch.compile compiles once for such a scalar, and twice for a Python number that changes.
            objectives: the losses of the total, with their weights. One of weight 0 is zero and is not computed, but
                for ITC if ITM has a weight.
            plan: name of the implementation; "plain" and "fast" give the same losses, up to rounding.
            own_loss: a further loss of what the step has computed, a scalar that is added to the total.

        ValueError for an unknown plan, and in training for masks or captions other than the configuration's loader has.
        """
        if plan not in IMPLEMENTATIONS:
            raise ValueError(f"plan: wanted {' or '.join(IMPLEMENTATIONS)}, got {plan!r}")
        if self.training:
            check_inputs(self.config, batch, masks)
        if own_loss is not None:
            objectives = (*objectives, OwnLoss(function=own_loss))
        alone = GlobalBatchLayout(rank=0, ranks=1, microbatches=1, pairs=len(batch.images))
        this = Step(objectives, IMPLEMENTATIONS[plan], alone, seed, step, [(batch, masks)])
        streams = this.implementation.encode(self, batch, masks, this.reads(self.config))
        shares = this.shares(Features(this, self, [(batch, masks)], [streams]))
        return this.losses(shares, at_least_float32(self.log_scale.new_zeros(())))


def check_inputs(config: MaskVLMConfig, batch: Batch, masks: Masks) -> None:
    """Raise ValueError if the shapes of a batch and its masks are not those of a loader that masks as configured.

    For training: evaluations may mask otherwise.
    """
    side, number = config.image_size, masks.patch_ids.shape[-1]
    if batch.images.shape[1:] != (3, side, side):
        raise ValueError(f"batch.images: wanted (B, 3, {side}, {side}), got {tuple(batch.images.shape)}; {_ADVICE}")
    if number != config.masked_patches:
        raise ValueError(
            f"masks.patch_ids: wanted {config.masked_patches} of {config.num_patches} patches of each image, as "
            f"configured, got {number}; {_ADVICE}"
        )


_ADVICE = "make the loader with `Loader(..., **config.loader_options())`"
