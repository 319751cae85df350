"""Shares of the losses of a global batch, and the pairs of ITM.

Each rank computes a share of every loss from each of its microbatches. The shares of all ranks and microbatches add up
to the loss that one rank would compute from the whole batch.

Shape legend: W ranks, A microbatches a rank, b pairs of a microbatch, n = A b pairs of a rank, G = W n pairs, N
patches, L tokens a caption may have, C width.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mvlm.distributed.collectives import GlobalBatchLayout, Pending
from mvlm.distributed.exchange import Arrived
from mvlm.distributed.world import World
from mvlm.model.implementation import Implementation, PairCaches, Streams
from mvlm.model.network import MaskVLMNetwork
from mvlm.model.packing import PackedText, Packing
from mvlm.objectives.losses import matching_loss
from mvlm.objectives.negatives import (
    MatchingPairs,
    Negatives,
    NegativeSampling,
    matching_pairs,
    matching_rows,
    matching_weights,
)
from mvlm_dataloading import Batch, Masks

Microbatch = tuple[Batch, Masks]
Shares = dict[str, Tensor]
"""Shares of losses and accuracies by name: scalars."""
OBJECTIVES = ("mlm", "mim", "itc", "itm")
"""Losses that add up to the total."""
SHARE_NAMES = (*OBJECTIVES, "mlm_accuracy", "itc_accuracy", "itm_accuracy")


class GlobalStep(NamedTuple):
    """Values that all parts of one training step share."""

    layout: GlobalBatchLayout
    world: World
    implementation: Implementation
    autocast: Callable[[], AbstractContextManager[object]]
    seed: int
    """Seed of ITM's negatives."""
    step: int | Tensor
    """Number of the update; with the seed it determines the negatives."""
    local_negatives: bool
    """Draw negatives within a microbatch, not from the global batch."""
    ids: Pending
    """int64 (G, 3): image_id, text_id and number of tokens of each pair of the global batch."""
    masked_tokens: Pending
    """Number of masked tokens of the global batch, a scalar on the device."""

    @property
    def sampling(self) -> NegativeSampling:
        """Sampling of ITM's negatives."""
        image_id, text_id, _ = self.ids.wait().unbind(1)
        block = self.layout.pairs if self.local_negatives else None
        return NegativeSampling(image_id, text_id, self.seed, self.step, block)

    @property
    def lengths(self) -> Tensor:
        """int64 (G,), number of tokens of each caption of the global batch."""
        return self.ids.wait()[:, 2]


class MatchingInputs(NamedTuple):
    """Features of images and captions, and the 3b pairs that ITM forms of them for one microbatch."""

    image: Tensor
    """(.., 1+N, C)."""
    text: PackedText
    pairs: MatchingPairs
    """Rows of `image` and captions of `text`."""
    max_rows: int
    """Bound of the rows of the captions of all pairs together."""
    caches: PairCaches | None = None
    """Key/value caches of both, if the implementation has made them."""


def local_pairs(
    image: Tensor, text: PackedText, own: Negatives, pairs: int, caches: PairCaches | None = None
) -> MatchingInputs:
    """Form pairs of a microbatch's features, and negatives (b,) from the same microbatch, given by global indices."""
    rows = own._replace(texts=own.texts % pairs, images=own.images % pairs)
    bound = matching_rows(text.packing.total, pairs * text.packing.max_length)
    return MatchingInputs(image, text, matching_pairs(rows), bound, caches)


def global_pairs(image: Tensor, text: PackedText, own: Negatives, arrived: Arrived) -> MatchingInputs:
    """Form pairs of a microbatch's features, and the features of its negatives (b,), which have arrived.

    What has arrived comes first, because the microbatch's own captions may end in padding rows.
    """
    theirs, ours = arrived.text.packing, text.packing
    bounds = torch.cat([theirs.cu_seqlens, ours.cu_seqlens[1:] + theirs.total])
    packing = Packing(bounds, max(theirs.max_length, ours.max_length), theirs.total + ours.total)
    drawn = own._replace(texts=arrived.text_place, images=arrived.image_place)
    return MatchingInputs(
        torch.cat([arrived.image.to(image.dtype), image]),
        PackedText(torch.cat([arrived.text.rows.to(text.rows.dtype), text.rows]), packing),
        matching_pairs(drawn, len(arrived.image), len(theirs)),
        matching_rows(ours.total, arrived.drawn_rows),
    )


def own_negatives(negatives: Negatives, microbatch: int, layout: GlobalBatchLayout) -> Negatives:
    """Those of one of this rank's microbatches (b,), of the negatives of all G pairs."""
    rows = layout.indices(microbatch, negatives.texts.device)
    return Negatives(*(x.index_select(0, rows) for x in negatives))


def contrastive_parameters(model: MaskVLMNetwork) -> list[nn.Parameter]:
    """Parameters that only ITC and ITM use."""
    modules = (model.image_projection, model.text_projection, model.matching_head)
    return [model.log_scale, *(p for module in modules for p in module.parameters())]


def count_masked_tokens(batch: Batch, masks: Masks) -> Tensor:
    """Number of masked tokens, a scalar on the device. Padding positions point past the last caption: not counted."""
    return (masks.token_ids < batch.cu_seqlens[-1]).sum()


def reconstruction_shares(
    model: MaskVLMNetwork, streams: Streams, batch: Batch, masks: Masks, step: GlobalStep
) -> Shares:
    """Shares of MLM, MIM and MLM's accuracy, from one microbatch."""
    mlm, mim, accuracy = step.implementation.reconstruction_losses(model, streams, batch, masks)
    # MLM is a mean over masked tokens. Microbatches have different numbers of them, so the mean of their means would
    # not be the loss of the global batch: each is weighted by its number. All have equally many masked patches.
    mlm, accuracy = (x * count_masked_tokens(batch, masks) / step.masked_tokens.wait() for x in (mlm, accuracy))
    return {"mlm": mlm, "mim": mim / (step.layout.ranks * step.layout.microbatches), "mlm_accuracy": accuracy}


def matching_shares(model: MaskVLMNetwork, inputs: MatchingInputs, negatives: Negatives, step: GlobalStep) -> Shares:
    """Shares of ITM and its accuracy, from the pairs of one microbatch.

    negatives: those of all G pairs. The loss is a weighted mean, and the weights of the whole batch add up to its
    denominator.
    """
    pairs = inputs.pairs
    fused = step.implementation.fuse_pairs(
        model, inputs.image, inputs.text, pairs.images, pairs.texts, inputs.caches, inputs.max_rows
    )
    loss, accuracy = matching_loss(model.matching_logits(*fused), pairs.labels, pairs.weights)
    # `matching_loss` divides by this microbatch's weights; the share divides by those of the global batch.
    share = pairs.weights.sum() / matching_weights(negatives).sum()
    return {"itm": loss * share, "itm_accuracy": accuracy * share}


def scaled_total(model: MaskVLMNetwork, shares: Shares, step: GlobalStep) -> tuple[Tensor, Tensor]:
    """Sum of the losses' shares times W, to call backward on, and all shares (7,).

    The factor W is there because DDP and FSDP2 average gradients over ranks. Shares are in the order of SHARE_NAMES; a
    missing one is 0.
    """
    losses = [shares[name] for name in OBJECTIVES if name in shares]
    # DDP waits for a gradient of every parameter. A sum of no elements gives a zero gradient to the unused ones.
    unused = sum(p.flatten()[:0].sum() for p in contrastive_parameters(model))
    zero = torch.zeros_like(losses[0])
    found = torch.stack([shares.get(name, zero).detach() for name in SHARE_NAMES])
    return step.world.size * torch.stack(losses).sum() + unused, found
