"""Gradient caching: a step of several microbatches in the memory of one (GradCache, Gao et al., 2021).

ITC and ITM need the features of all pairs at once; their graphs would not fit into memory. Features are therefore
computed twice:

1. Without a graph, for all microbatches. ITC and ITM then give the gradients of the losses with respect to these
   features. Only the gradients are kept: the cache.
2. With a graph, one microbatch at a time, together with MLM and MIM. The loss of this pass contains the inner product
   of the features with their cached gradients. Its derivative with respect to the features is the cached gradient, so
   backward carries ITC and ITM into the encoders.

Shape legend: A microbatches, b pairs of a microbatch, n = A b pairs of a rank, E contrastive width.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from mvlm.distributed.contrastive import sharded_contrastive_loss
from mvlm.distributed.loss_shares import (
    SHARE_NAMES,
    GlobalStep,
    MatchingInputs,
    Microbatch,
    PairFeatures,
    append_negatives,
    fetch_negatives,
    matching_shares,
    pair_features,
    reconstruction_shares,
    scaled_total,
    total_matching_weight,
)
from mvlm.distributed.parallel import Parallel
from mvlm.model.maskvlm import MaskVLM
from mvlm.model.packing import pack
from mvlm.objectives.negatives import Negatives
from mvlm_dataloading import Batch, Masks


def backward_cached(parallel: Parallel, microbatches: Sequence[Microbatch], step: GlobalStep) -> Tensor:
    """Forward and backward of several microbatches. Returns the rank's shares (7,), in the order of SHARE_NAMES.

    Without ITC and ITM there is only the second pass.
    """
    contrastive, reconstruction = step.weights.contrasts, step.weights.reconstructing()
    cached: list[PairFeatures] = []
    shares = torch.zeros(len(SHARE_NAMES), device=step.masked_tokens.device)
    if contrastive:
        for batch, _ in microbatches:
            cached.append(parallel(partial(_features_without_graph, batch=batch, step=step), last=False))
        shares = _backward_to_features(parallel, cached, step)
    for number, (batch, masks) in enumerate(microbatches):
        # Defaults bind this microbatch. A plain closure would see the loop's variables as they are when it runs.
        def forward(model: MaskVLM, batch: Batch = batch, masks: Masks = masks, number: int = number):
            with step.autocast():
                streams = step.implementation.encode(model, batch, masks, reconstruction)
                found = reconstruction_shares(model, streams, batch, masks, step)
            total, parts = scaled_total(model, found, step)
            if contrastive:
                # `total` and the cached gradients both contain the factor W already (see `scaled_total`).
                features = pair_features(streams.image, streams.text, model.config.text_length)
                total = total + _product_with_gradient(features.image, cached[number].image)
                total = total + _product_with_gradient(features.text, cached[number].text)
            return total, parts

        # DDP reduces gradients in the last backward pass; until then they accumulate on each rank.
        total, parts = parallel(forward, last=number == len(microbatches) - 1)
        total.backward()
        shares = shares + parts
    return shares


@torch.no_grad()
def _features_without_graph(model: MaskVLM, batch: Batch, step: GlobalStep) -> PairFeatures:
    """Features of the unmasked images and captions of one microbatch."""
    with step.autocast():
        image, text = step.implementation.encode_unmasked(model, batch)
    return pair_features(image, text, model.config.text_length)


def _backward_to_features(parallel: Parallel, cached: list[PairFeatures], step: GlobalStep) -> Tensor:
    """Run the backward pass of ITC and ITM as far as the features. Returns the rank's shares (7,).

    The gradients of the features are in `.grad` of `cached`. Those of ITC's and ITM's own parameters accumulate as
    usual.
    """
    for own in cached:
        own.image.requires_grad_()
        own.text.requires_grad_()
    drawn: list[Negatives] = []

    def itc(model: MaskVLM) -> tuple[Tensor, Tensor]:
        with step.autocast():
            image = torch.cat([model.embed_image(own.image) for own in cached])  # (n, E)
            text = torch.cat([model.embed_text(own.text) for own in cached])
            share, accuracy, negatives = sharded_contrastive_loss(
                image, text, model.log_scale, step.sampling, step.layout
            )
        drawn.append(negatives)
        return scaled_total(model, {"itc": share, "itc_accuracy": accuracy}, step)

    total, shares = parallel(itc, last=False)
    total.backward()
    if not step.weights.itm > 0:
        return shares
    negatives, weight = drawn[0], total_matching_weight(drawn[0], step)
    fetched = None if step.local_negatives else fetch_negatives(cached, negatives, step)
    # Detached copies of the fetched rows: each microbatch's backward stops at them and frees its graph. One backward
    # through `fetch_negatives` then serves all microbatches.
    leaves = [] if fetched is None else [x.detach().requires_grad_(x.is_floating_point()) for x in fetched]
    for number, own in enumerate(cached):
        rows = slice(number * step.layout.pairs, (number + 1) * step.layout.pairs)

        def itm(model: MaskVLM, own: PairFeatures = own, rows: slice = rows):
            with step.autocast():
                if step.local_negatives:
                    inputs = MatchingInputs(own.image, pack(own.text, own.lengths))
                else:
                    inputs = append_negatives(own, PairFeatures(*(x[rows] for x in leaves)))
                shares = matching_shares(model, inputs, Negatives(*(x[rows] for x in negatives)), weight, step)
            return scaled_total(model, shares, step)

        total, part = parallel(itm, last=False)
        total.backward()
        shares = shares + part
    if fetched is not None:  # return the gradients of fetched features to the ranks that own them
        torch.autograd.backward([fetched.image, fetched.text], [leaf.grad for leaf in leaves[:2]])
    return shares


def _product_with_gradient(features: Tensor, cached: Tensor) -> Tensor:
    """Inner product, a scalar, of features with the gradient of their cached copy, which has the same shape."""
    assert cached.grad is not None
    return (features * cached.grad).sum()
