"""Gradient caching: a step of several microbatches in the memory of one (GradCache, Gao et al., 2021).

ITC and ITM need the features of all pairs at once. So features are computed twice:

1. without a graph, for all microbatches. ITC and ITM give the gradients of these features, which are kept.
2. with a graph, one microbatch at a time, for the reconstruction losses. The kept gradients enter as the inner product
   with the features, whose derivative they are, and so reach the encoders.

Shape legend: A microbatches, b pairs of a microbatch, n = A b pairs of a rank, E contrastive width.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from mvlm.distributed.contrastive import sharded_contrastive_loss
from mvlm.distributed.loss_shares import (
    NAMES,
    GlobalStep,
    MatchingInputs,
    Microbatch,
    PairFeatures,
    append_negatives,
    backward_root,
    fetch_negatives,
    matching_shares,
    pair_features,
    reconstruction_shares,
    total_matching_weight,
)
from mvlm.distributed.parallel import Parallel
from mvlm.model.maskvlm import MaskVLM
from mvlm.model.packing import pack
from mvlm.objectives.negatives import Negatives
from mvlm_dataloading import Batch, Masks


def backward_cached(
    parallel: Parallel, microbatches: Sequence[Microbatch], step: GlobalStep, contrastive: bool
) -> Tensor:
    """Forward and backward of several microbatches. Returns the rank's shares (7,), in the order of NAMES.

    Without `contrastive`, the step trains MLM and MIM alone, in one pass.
    """
    own: list[PairFeatures] = []
    shares = torch.zeros(len(NAMES), device=step.masked_tokens.device)
    if contrastive:
        for batch, _ in microbatches:
            own.append(parallel(partial(_features_without_graph, batch=batch, step=step), last=False))
        shares = _backward_to_features(parallel, own, step)
    for number, (batch, masks) in enumerate(microbatches):

        def forward(model: MaskVLM, batch: Batch = batch, masks: Masks = masks, number: int = number):
            with step.autocast():
                streams = step.implementation.encode(model, batch, masks)
                rebuilt = reconstruction_shares(model, streams, batch, masks, step)
            total, parts = backward_root(model, rebuilt, step)
            if contrastive:
                # The gradient of this sum with respect to the features is the one that ITC and ITM gave them.
                again = pair_features(streams.image, streams.text, model.config.text_length)
                total = total + _inner(again.image, own[number].image) + _inner(again.text, own[number].text)
            return total, parts

        total, parts = parallel(forward, last=number == len(microbatches) - 1)
        total.backward()
        shares = shares + parts
    return shares


@torch.no_grad()
def _features_without_graph(model: MaskVLM, batch: Batch, step: GlobalStep) -> PairFeatures:
    """Features of one microbatch, from unmasked images and captions."""
    with step.autocast():
        image, text = step.implementation.encode_unmasked(model, batch)
    return pair_features(image, text, model.config.text_length)


def _backward_to_features(parallel: Parallel, own: list[PairFeatures], step: GlobalStep) -> Tensor:
    """ITC and ITM on features without a graph: leaves their gradients in the features' `.grad`; returns shares (7,)."""
    for mine in own:
        mine.image.requires_grad_()
        mine.text.requires_grad_()
    drawn: list[Negatives] = []

    def itc(model: MaskVLM) -> tuple[Tensor, Tensor]:
        with step.autocast():
            image = torch.cat([model.embed_image(mine.image) for mine in own])  # (n, E)
            text = torch.cat([model.embed_text(mine.text) for mine in own])
            share, accuracy, negatives = sharded_contrastive_loss(
                image, text, model.log_scale, step.sampling, step.layout
            )
        drawn.append(negatives)
        return backward_root(model, {"itc": share, "itc_accuracy": accuracy}, step)

    total, shares = parallel(itc, last=False)
    total.backward()
    negatives, weight = drawn[0], total_matching_weight(drawn[0], step)
    fetched = None if step.local_negatives else fetch_negatives(own, negatives, step)
    # The fetched rows are leaves too, so that each microbatch's backward stops at them and frees its graph.
    leaves = [] if fetched is None else [x.detach().requires_grad_(x.is_floating_point()) for x in fetched]
    for number, mine in enumerate(own):
        rows = slice(number * step.layout.pairs, (number + 1) * step.layout.pairs)

        def itm(model: MaskVLM, mine: PairFeatures = mine, rows: slice = rows):
            with step.autocast():
                if step.local_negatives:
                    inputs = MatchingInputs(mine.image, pack(mine.text, mine.lengths))
                else:
                    inputs = append_negatives(mine, PairFeatures(*(x[rows] for x in leaves)))
                shares = matching_shares(model, inputs, Negatives(*(x[rows] for x in negatives)), weight, step)
            return backward_root(model, shares, step)

        total, part = parallel(itm, last=False)
        total.backward()
        shares = shares + part
    if fetched is not None:  # return the gradients of fetched features to the ranks that own them
        torch.autograd.backward([fetched.image, fetched.text], [leaf.grad for leaf in leaves[:2]])
    return shares


def _inner(x: Tensor, leaf: Tensor) -> Tensor:
    """Inner product of x with the gradient of leaf, both of one shape. A scalar."""
    assert leaf.grad is not None
    return (x * leaf.grad).sum()
