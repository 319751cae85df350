"""MaskVLM: the network with its four objectives (docs/explain/method.md).

Shape legend: B batch, E contrastive width.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

from torch import Tensor

from mvlm.config.model import MaskVLMConfig
from mvlm.model import fast, plain
from mvlm.model.implementation import ALL, Implementation, Streams
from mvlm.model.network import MaskVLMNetwork
from mvlm.model.pretrained import HubMixin
from mvlm.objectives import losses
from mvlm.objectives.losses import Losses, LossWeights
from mvlm.objectives.negatives import NegativeSampling, matching_pairs, matching_rows
from mvlm_dataloading import Batch, Masks

IMPLEMENTATIONS: dict[str, Implementation] = {"plain": plain, "fast": fast}
"""Implementations of the training step, by the value of `plan` in calls, configurations and on the command line."""


class Features(NamedTuple):
    """What a step has computed of its batch, before its losses: the input of `own_loss` of `MaskVLM.forward`."""

    streams: Streams
    """Features of all patches and tokens, before the two streams are fused."""
    image: Tensor | None
    """Contrastive embeddings of the images (B, E), of unit length; None if neither ITC nor ITM has a weight."""
    text: Tensor | None
    """Contrastive embeddings of the captions (B, E), likewise."""


class MaskVLM(MaskVLMNetwork, HubMixin):
    """MaskVLM: the network with its four losses, `from_pretrained` and `save_pretrained`."""

    def forward(
        self,
        batch: Batch,
        masks: Masks,
        *,
        seed: int = 0,
        step: int | Tensor = 0,
        weights: LossWeights = ALL,
        plan: Literal["plain", "fast"] = "plain",
        own_loss: Callable[[Features], Tensor] | None = None,
    ) -> Losses:
        """Compute the four losses of one batch, on one rank and without microbatches.

        `mvlm.distributed.global_batch` computes the same losses over ranks and microbatches.

        Args:
            seed: seed of ITM's negatives.
            step: number of the update; with `seed` it determines the negatives. In CUDA graphs, an int64 scalar on the
                device. torch.compile compiles once for such a scalar, and twice for a Python number that changes.
            weights: weights of the losses in the total. A loss of weight 0 is zero and is not computed, but for ITC if
                ITM has a weight.
            plan: name of the implementation; "plain" and "fast" give the same losses, up to rounding.
            own_loss: a further loss of what the step has computed, a scalar that is added to the total.

        ValueError for an unknown plan, and in training for masks or captions other than the configuration's loader has.
        """
        if plan not in IMPLEMENTATIONS:
            raise ValueError(f"plan: wanted {' or '.join(IMPLEMENTATIONS)}, got {plan!r}")
        if self.training:
            check_inputs(self.config, batch, masks)
        implementation = IMPLEMENTATIONS[plan]
        streams = implementation.encode(self, batch, masks, weights)
        image = text = None
        zero = losses.at_least_float32(self.log_scale.new_zeros(()))
        mlm = mim = itc = itm = mlm_accuracy = itc_accuracy = itm_accuracy = zero
        if weights.mlm > 0:
            mlm, mlm_accuracy = implementation.language_loss(self, streams, batch, masks)
        if weights.mim > 0:
            mim = implementation.image_loss(self, streams, batch, masks)
        if weights.contrasts:
            image, text = self.embed_image(streams.image), self.embed_text(streams.text.first())  # (B, E)
            logits = losses.contrastive_logits(image, text, self.log_scale)
            itc, itc_accuracy = losses.contrastive_loss(logits, self.logit_bias)
            if self.config.contrast_masked and streams.masked_text is not None:
                masked = losses.contrastive_logits(image, self.embed_text(streams.masked_text.first()), self.log_scale)
                itc = (itc + losses.contrastive_loss(masked, self.logit_bias)[0]) / 2
            if weights.itm > 0:
                itm, itm_accuracy = self._matching(implementation, streams, batch, logits, seed, step)
        total = weights.total((mlm, mim, itc, itm))
        if own_loss is not None:
            total = total + own_loss(Features(streams, image, text))
        return Losses(mlm, mim, itc, itm, total, mlm_accuracy, itc_accuracy, itm_accuracy)

    def _matching(
        self,
        implementation: Implementation,
        streams: Streams,
        batch: Batch,
        logits: Tensor,
        seed: int,
        step: int | Tensor,
    ) -> tuple[Tensor, Tensor]:
        """ITM and its accuracy; negatives are drawn from the contrastive logits (B, B)."""
        negatives = NegativeSampling(batch.image_id, batch.text_id, seed, step).draw_both(logits)
        pairs = matching_pairs(negatives)
        packing = streams.text.packing
        max_rows = matching_rows(packing.total, len(packing) * packing.max_length)
        fused = implementation.fuse_pairs(
            self, streams.image, streams.text, pairs.images, pairs.texts, streams.caches, max_rows
        )  # (3B, C) each
        return losses.matching_loss(self.matching_logits(*fused), pairs.labels, pairs.weights)


def check_inputs(config: MaskVLMConfig, batch: Batch, masks: Masks) -> None:
    """Raise ValueError for a batch and masks of a loader that does not mask as configured, as far as shapes tell.

    Evaluations may mask otherwise.
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
