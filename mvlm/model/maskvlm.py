"""MaskVLM: the network with its four objectives (docs/method.md).

Shape legend: B batch, E contrastive width.
"""

from typing import Literal

import torch
from torch import Tensor

from mvlm.model import fast, plain
from mvlm.model.implementation import Implementation
from mvlm.model.network import MaskVLMNetwork
from mvlm.model.pretrained import HubMixin
from mvlm.objectives import losses
from mvlm.objectives.losses import Losses
from mvlm.objectives.negatives import NegativeSampling, matching_pairs, matching_rows
from mvlm_dataloading import Batch, Masks

IMPLEMENTATIONS: dict[str, Implementation] = {"plain": plain, "fast": fast}
"""Implementations of the training step, by the value of `plan` in calls, configurations and on the command line."""


class MaskVLM(MaskVLMNetwork, HubMixin):
    """MaskVLM: the network with its four losses, `from_pretrained` and `save_pretrained`."""

    def forward(
        self,
        batch: Batch,
        masks: Masks,
        *,
        seed: int = 0,
        step: int | Tensor = 0,
        reconstruction_only: bool = False,
        plan: Literal["plain", "fast"] = "plain",
    ) -> Losses:
        """Compute the four losses of one batch, on one rank and without microbatches.

        `mvlm.distributed.global_batch` computes the same losses over ranks and microbatches.

        Args:
            seed: seed of ITM's negatives.
            step: number of the update; with `seed` it determines the negatives. Under torch.compile and CUDA graphs, an
                int64 scalar on the device.
            reconstruction_only: compute only MLM and MIM; ITC and ITM are zero and cost nothing.
            plan: name of the implementation; "plain" and "fast" give the same losses, up to rounding.

        ValueError for an unknown plan.
        """
        if plan not in IMPLEMENTATIONS:
            raise ValueError(f"plan: wanted {' or '.join(IMPLEMENTATIONS)}, got {plan!r}")
        implementation = IMPLEMENTATIONS[plan]
        streams = implementation.encode(self, batch, masks)
        mlm, mlm_accuracy = implementation.language_loss(self, streams, batch, masks)
        mim = implementation.image_loss(self, streams, batch, masks)
        if reconstruction_only:
            itc = itm = itc_accuracy = itm_accuracy = torch.zeros_like(mim)
        else:
            image, text = self.embed_image(streams.image), self.embed_text(streams.text.first())  # (B, E)
            logits = losses.contrastive_logits(image, text, self.log_scale)
            itc, itc_accuracy = losses.contrastive_loss(logits)
            negatives = NegativeSampling(batch.image_id, batch.text_id, seed, step).draw_both(logits)
            pairs = matching_pairs(negatives)
            packing = streams.text.packing
            max_rows = matching_rows(packing.total, len(packing) * packing.max_length)
            fused = implementation.fuse_pairs(
                self, streams.image, streams.text, pairs.images, pairs.texts, streams.caches, max_rows
            )  # (3B, C) each
            itm, itm_accuracy = losses.matching_loss(self.matching_logits(*fused), pairs.labels, pairs.weights)
        return Losses(mlm, mim, itc, itm, mlm + mim + itc + itm, mlm_accuracy, itc_accuracy, itm_accuracy)
