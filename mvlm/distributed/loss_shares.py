"""Shares of the losses of a global batch, and the features from which ITC and ITM are computed.

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

from mvlm.distributed.collectives import GlobalBatchLayout, fetch_rows
from mvlm.distributed.world import World
from mvlm.model.implementation import Implementation, PairCaches, Streams, needs_masked
from mvlm.model.network import MaskVLMNetwork
from mvlm.model.packing import PackedText, pack
from mvlm.objectives.losses import LossWeights, matching_loss
from mvlm.objectives.negatives import Negatives, NegativeSampling, matching_pairs, matching_rows, matching_weights
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
    sampling: NegativeSampling
    """Sampling of ITM's negatives: within a microbatch if its `block` is set, else from the global batch."""
    lengths: Tensor
    """int64 (G,), number of tokens of each caption of the global batch."""
    masked_tokens: Tensor
    """Number of masked tokens of the global batch, a scalar on the device."""
    weights: LossWeights
    """Weights of the losses. An objective of weight 0 is not computed."""

    @property
    def local_negatives(self) -> bool:
        """True if negatives are drawn within a microbatch."""
        return self.sampling.block is not None


class PairFeatures(NamedTuple):
    """Features of the pairs of one microbatch, for ITC and ITM."""

    image: Tensor
    """v (b, 1+N, C)."""
    text: Tensor
    """w (b, L, C), zeros for padding."""
    lengths: Tensor
    """int64 (b,), number of tokens of each caption."""


class MatchingInputs(NamedTuple):
    """Image and text features of which ITM forms the pairs of one microbatch."""

    image: Tensor
    """(b, 1+N, C), or (2b, 1+N, C) with the drawn images after the microbatch's own."""
    text: PackedText
    """b captions, or 2b with the drawn captions after the microbatch's own."""
    caches: PairCaches | None = None
    """Key/value caches of both, if the implementation has made them."""


def pair_features(image: Tensor, text: PackedText, length: int) -> PairFeatures:
    """Features from v (b, 1+N, C) and w. Captions are padded to `length`, the model's text length.

    One length for all ranks keeps the sizes of `fetch_rows` static.
    """
    padded, _ = PackedText(text.rows, text.packing.with_max_length(length)).padded()
    return PairFeatures(image, padded, text.packing.lengths.long())


def append_negatives(own: PairFeatures, drawn: PairFeatures) -> MatchingInputs:
    """Concatenate a microbatch's own features (rows 0 to b - 1) and those of its drawn negatives (b to 2b - 1)."""
    text = pack(torch.cat([own.text, drawn.text]), torch.cat([own.lengths, drawn.lengths]))
    return MatchingInputs(torch.cat([own.image, drawn.image]), text)


def fetch_negatives(own: list[PairFeatures], negatives: Negatives, step: GlobalStep) -> PairFeatures:
    """Fetch the features (n, ...) of the drawn images and captions from the ranks that have them."""
    image = fetch_rows([features.image for features in own], negatives.images, step.layout)
    text = fetch_rows([features.text for features in own], negatives.texts, step.layout)
    return PairFeatures(image, text, step.lengths.index_select(0, negatives.texts))


def idle_parameters(model: MaskVLMNetwork, weights: LossWeights) -> list[nn.Parameter]:
    """Parameters that no loss of some weight uses."""
    matching = weights.itm > 0
    masked_images, _ = needs_masked(model.config, weights)
    users: list[tuple[nn.Module, bool]] = [
        (model.image_projection, weights.contrasts),
        (model.text_projection, weights.contrasts),
        (model.matching_head, matching),
        (model.text_cross, matching or weights.mlm > 0),
        (model.language_head, weights.mlm > 0),
        (model.image_cross, matching or weights.mim > 0),
        (model.image_decoder, weights.mim > 0),
        (model.pixel_head, weights.mim > 0),
    ]
    idle = [parameter for module, used in users if not used for parameter in module.parameters()]
    idle += [] if weights.contrasts else [model.log_scale]
    lightly = weights.mlm > 0 and model.config.partner_image == "lightly masked"
    return idle if masked_images or lightly else [*idle, model.image_encoder.mask_token]


def count_masked_tokens(batch: Batch, masks: Masks) -> Tensor:
    """Number of masked tokens, a scalar on the device. Padding positions point past the last caption: not counted."""
    return (masks.token_ids < batch.cu_seqlens[-1]).sum()


def reconstruction_shares(
    model: MaskVLMNetwork, streams: Streams, batch: Batch, masks: Masks, step: GlobalStep
) -> Shares:
    """Shares of MLM, MIM and MLM's accuracy, from one microbatch."""
    shares: Shares = {}
    if step.weights.mlm > 0:
        found = step.implementation.language_loss(model, streams, batch, masks)
        # MLM is a mean over masked tokens. Microbatches have different numbers of them, so the mean of their means
        # would not be the loss of the global batch: each is weighted by its number.
        mlm, accuracy = (x * count_masked_tokens(batch, masks) / step.masked_tokens for x in found)
        shares |= {"mlm": mlm, "mlm_accuracy": accuracy}
    if step.weights.mim > 0:  # all microbatches have equally many masked patches
        mim = step.implementation.image_loss(model, streams, batch, masks)
        shares["mim"] = mim / (step.layout.ranks * step.layout.microbatches)
    return shares


def total_matching_weight(negatives: Negatives, step: GlobalStep) -> Tensor:
    """Sum of the weights of ITM's pairs over the global batch, a scalar on the device.

    It is known only after all ranks have drawn: a pair without an admissible negative has weight 0.
    """
    return step.world.all_reduce(matching_weights(negatives).sum())


def matching_shares(
    model: MaskVLMNetwork, inputs: MatchingInputs, negatives: Negatives, total: Tensor, step: GlobalStep
) -> Shares:
    """Shares of ITM and its accuracy, from one microbatch and the negatives (b,) drawn for it."""
    pairs = step.layout.pairs
    if step.local_negatives:  # global indices -> rows of the microbatch
        rows = negatives._replace(texts=negatives.texts % pairs, images=negatives.images % pairs)
        max_rows = matching_rows(inputs.text.packing.total, pairs * inputs.text.packing.max_length)
    else:  # `append_negatives` put the negative of row i into row b + i
        drawn = torch.arange(pairs, device=total.device) + pairs
        rows = negatives._replace(texts=drawn, images=drawn)
        max_rows = 2 * inputs.text.packing.total  # no caption is in more than two pairs
    matching = matching_pairs(rows)
    fused = step.implementation.fuse_pairs(
        model, inputs.image, inputs.text, matching.images, matching.texts, inputs.caches, max_rows
    )
    loss, accuracy = matching_loss(model.matching_logits(*fused), matching.labels, matching.weights)
    # `matching_loss` divides by this microbatch's weights; the share divides by those of the global batch.
    share = matching.weights.sum() / total
    return {"itm": loss * share, "itm_accuracy": accuracy * share}


def scaled_total(model: MaskVLMNetwork, shares: Shares, step: GlobalStep) -> tuple[Tensor, Tensor]:
    """Weighted sum of the losses' shares times W, to call backward on, and all shares (7,), without weights.

    The factor W is there because DDP and FSDP2 average gradients over ranks. Shares are in the order of SHARE_NAMES; a
    missing one is 0.
    """
    weights = step.weights._asdict()
    losses = [weights[name] * shares[name] for name in OBJECTIVES if name in shares and weights[name] > 0]
    # DDP waits for a gradient of every parameter. A sum of no elements gives a zero gradient to those that this pass
    # does not use: with several microbatches, the last pass computes no ITC and no ITM.
    reconstruction = step.weights.reconstructing() if step.layout.microbatches > 1 else step.weights
    dtype = next((x.dtype for x in shares.values()), torch.float32)
    zero = torch.zeros((), dtype=dtype, device=step.masked_tokens.device)
    unused = sum((p.flatten()[:0].sum() for p in idle_parameters(model, reconstruction)), zero)
    found = torch.stack([shares.get(name, zero).detach() for name in SHARE_NAMES])
    return step.world.size * torch.stack([zero, *losses]).sum() + unused, found
