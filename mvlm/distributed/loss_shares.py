"""A rank's shares of the losses of a global batch, and the features that ITC and ITM compute them from.

The shares of all ranks and microbatches add up to the loss of one rank that has the whole batch.

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
from mvlm.model.implementation import Implementation, PairCaches, Streams
from mvlm.model.network import MaskVLMNetwork
from mvlm.model.packing import PackedText, pack
from mvlm.objectives.losses import matching_loss
from mvlm.objectives.negatives import Negatives, NegativeSampling, matching_pairs, matching_weights
from mvlm_dataloading import Batch, Masks

Microbatch = tuple[Batch, Masks]
Shares = dict[str, Tensor]
"""Shares of losses and accuracies, by name: scalars."""
OBJECTIVES = ("mlm", "mim", "itc", "itm")
NAMES = (*OBJECTIVES, "mlm_accuracy", "itc_accuracy", "itm_accuracy")


class GlobalStep(NamedTuple):
    """State shared by the parts of one training step."""

    layout: GlobalBatchLayout
    world: World
    implementation: Implementation
    autocast: Callable[[], AbstractContextManager[object]]
    sampling: NegativeSampling
    """Negatives come from one microbatch where its `block` is set, else from the global batch."""
    lengths: Tensor
    """int64 (G,), tokens of every caption of the global batch."""
    masked_tokens: Tensor
    """Number of masked tokens of the global batch, a scalar on the device."""

    @property
    def local_negatives(self) -> bool:
        """True where negatives are drawn within a microbatch."""
        return self.sampling.block is not None


class PairFeatures(NamedTuple):
    """Features of the pairs of one microbatch, for ITC and ITM."""

    image: Tensor
    """v (b, 1+N, C)."""
    text: Tensor
    """w (b, L, C), zeros for padding."""
    lengths: Tensor
    """int64 (b,), tokens of each caption."""


class MatchingInputs(NamedTuple):
    """Features that ITM's pairs of one microbatch are taken from."""

    image: Tensor
    """(b, 1+N, C), or (2b, 1+N, C) with the drawn images after the own."""
    text: PackedText
    """b or 2b captions, likewise."""
    caches: PairCaches | None = None
    """Key/value caches for both, where the implementation has made them."""


def pair_features(image: Tensor, text: PackedText, length: int) -> PairFeatures:
    """Features from v (b, 1+N, C) and w; captions are padded to `length`, the model's text length."""
    padded, _ = PackedText(text.rows, text.packing.with_max_length(length)).padded()
    return PairFeatures(image, padded, text.packing.lengths.long())


def append_negatives(own: PairFeatures, drawn: PairFeatures) -> MatchingInputs:
    """Own rows 0 to b - 1, followed by the rows drawn for them."""
    text = pack(torch.cat([own.text, drawn.text]), torch.cat([own.lengths, drawn.lengths]))
    return MatchingInputs(torch.cat([own.image, drawn.image]), text)


def fetch_negatives(own: list[PairFeatures], negatives: Negatives, step: GlobalStep) -> PairFeatures:
    """Features (n, ...) of the drawn images and captions, from whichever rank has them."""
    image = fetch_rows([features.image for features in own], negatives.images, step.layout)
    text = fetch_rows([features.text for features in own], negatives.texts, step.layout)
    return PairFeatures(image, text, step.lengths.index_select(0, negatives.texts))


def contrastive_parameters(model: MaskVLMNetwork) -> list[nn.Parameter]:
    """The parameters that ITC and ITM alone use."""
    modules = (model.image_projection, model.text_projection, model.matching_head)
    return [model.log_scale, *(p for module in modules for p in module.parameters())]


def count_masked_tokens(batch: Batch, masks: Masks) -> Tensor:
    """Number of masked tokens, a scalar on the device. Positions after the last caption are padding."""
    return (masks.token_ids < batch.cu_seqlens[-1]).sum()


def reconstruction_shares(
    model: MaskVLMNetwork, streams: Streams, batch: Batch, masks: Masks, step: GlobalStep
) -> Shares:
    """Shares of MLM, MIM and MLM's accuracy."""
    mlm, mim, accuracy = step.implementation.reconstruction_losses(model, streams, batch, masks)
    # MLM is a mean over masked tokens, whose number differs between microbatches; that of masked patches does not.
    mlm, accuracy = (x * count_masked_tokens(batch, masks) / step.masked_tokens for x in (mlm, accuracy))
    return {"mlm": mlm, "mim": mim / (step.layout.ranks * step.layout.microbatches), "mlm_accuracy": accuracy}


def total_matching_weight(negatives: Negatives, step: GlobalStep) -> Tensor:
    """Sum of the weights of ITM's pairs over the global batch, a scalar on the device."""
    return step.world.all_reduce(matching_weights(negatives).sum())


def matching_shares(
    model: MaskVLMNetwork, inputs: MatchingInputs, negatives: Negatives, total: Tensor, step: GlobalStep
) -> Shares:
    """Shares of ITM and its accuracy, of one microbatch and the negatives (b,) drawn for it."""
    pairs = step.layout.pairs
    if step.local_negatives:  # global numbers to rows of the microbatch
        rows = negatives._replace(texts=negatives.texts % pairs, images=negatives.images % pairs)
    else:  # the negative of row i is row b + i of the inputs
        drawn = torch.arange(pairs, device=total.device) + pairs
        rows = negatives._replace(texts=drawn, images=drawn)
    matching = matching_pairs(rows)
    logits = step.implementation.match_pairs(
        model, inputs.image, inputs.text, matching.images, matching.texts, inputs.caches
    )
    loss, accuracy = matching_loss(logits, matching.labels, matching.weights)
    share = matching.weights.sum() / total
    return {"itm": loss * share, "itm_accuracy": accuracy * share}


def backward_root(model: MaskVLMNetwork, shares: Shares, step: GlobalStep) -> tuple[Tensor, Tensor]:
    """The scalar that backward starts from, and the shares (7,) in the order of NAMES, 0 for those not given.

    The scalar is W times the sum of the losses' shares, because DDP and FSDP2 average the ranks' gradients.
    """
    losses = [shares[name] for name in OBJECTIVES if name in shares]
    # DDP waits for a gradient of every parameter, so an empty sum gives one to those that nothing has used.
    unused = sum(p.flatten()[:0].sum() for p in contrastive_parameters(model))
    zero = torch.zeros_like(losses[0])
    found = torch.stack([shares.get(name, zero).detach() for name in NAMES])
    return step.world.size * torch.stack(losses).sum() + unused, found
