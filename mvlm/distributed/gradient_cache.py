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

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from mvlm.distributed.contrastive import Embeddings
from mvlm.distributed.exchange import Arrived, FeatureExchange
from mvlm.distributed.loss_shares import (
    SHARE_NAMES,
    GlobalStep,
    Microbatch,
    contrastive_shares,
    feature_exchange,
    image_share,
    language_shares,
    matching_shares,
    scaled_total,
)
from mvlm.distributed.parallel import Parallel
from mvlm.model.maskvlm import MaskVLM
from mvlm.model.packing import PackedText
from mvlm_dataloading import Batch, Masks


class Cached(NamedTuple):
    """Features of one microbatch; their gradients gather in `.grad`."""

    image: Tensor
    """v (b, 1+N, C)."""
    text: PackedText
    """w."""


def backward_cached(parallel: Parallel, microbatches: Sequence[Microbatch], step: GlobalStep) -> Tensor:
    """Forward and backward of several microbatches. Returns the rank's shares (7,), in the order of SHARE_NAMES.

    Without ITC and ITM there is only the second pass.
    """
    contrastive, reconstructing = step.weights.contrasts, step.weights.reconstructing()
    cached: list[Cached] = []
    finish = _nothing
    shares = torch.zeros(len(SHARE_NAMES), device=microbatches[0][0].images.device)
    if contrastive:
        for batch, _ in microbatches:
            cached.append(parallel(partial(_features_without_graph, batch=batch, step=step), last=False))
        shares, finish = _backward_to_features(parallel, cached, step)
    for number, (batch, masks) in enumerate(microbatches):
        # Defaults bind this microbatch. A plain closure would see the loop's variables as they are when it runs.
        def forward(model: MaskVLM, batch: Batch = batch, masks: Masks = masks, number: int = number):
            with step.autocast():
                streams = step.implementation.encode(model, batch, masks, reconstructing)
                reconstruction = language_shares(model, streams, batch, masks, step)
                reconstruction |= image_share(model, streams, batch, masks, step)
            total, parts = scaled_total(model, reconstruction, step)
            if contrastive:
                if number == 0:
                    finish()
                # `total` and the cached gradients both contain the factor W already (see `scaled_total`).
                total = total + _product_with_gradient(streams.image, cached[number].image)
                total = total + _product_with_gradient(streams.text.rows, cached[number].text.rows)
            return total, parts

        # DDP reduces gradients in the last backward pass; until then they accumulate on each rank.
        total, parts = parallel(forward, last=number == len(microbatches) - 1)
        total.backward()
        shares = shares + parts
    return shares


def _nothing() -> None:
    pass


@torch.no_grad()
def _features_without_graph(model: MaskVLM, batch: Batch, step: GlobalStep) -> Cached:
    """Features of the unmasked images and captions of one microbatch."""
    with step.autocast():
        return Cached(*step.implementation.encode_unmasked(model, batch))


def _backward_to_features(
    parallel: Parallel, cached: list[Cached], step: GlobalStep
) -> tuple[Tensor, Callable[[], None]]:
    """Run the backward pass of ITC and ITM as far as the features.

    Returns the rank's shares (7,), and a function to call before the gradients of the features are read, from `.grad`
    of `cached`: it waits for the last part of them. Gradients of ITC's and ITM's own parameters accumulate as usual.
    """
    for own in cached:
        own.image.requires_grad_()
        own.text.rows.requires_grad_()
    drawn: list[FeatureExchange] = []

    def itc(model: MaskVLM) -> tuple[Tensor, Tensor]:
        with step.autocast():
            image = torch.cat([model.embed_image(own.image) for own in cached])  # (n, E)
            text = torch.cat([model.embed_text(own.text.first()) for own in cached])
            embeddings = Embeddings(image, text, step.layout)
            # A copy of all features, so only for the loss that reads them.
            features = torch.cat([own.image for own in cached]) if model.text_pooling is not None else None
            shares, draws = contrastive_shares(model, features, embeddings, step)
            if not step.weights.itm:
                return scaled_total(model, shares, step)
            image = torch.cat([own.image.detach() for own in cached])  # (n, 1+N, C)
            texts = [own.text._replace(rows=own.text.rows.detach()) for own in cached]
            drawn.append(feature_exchange(draws, image, texts, step))
        return scaled_total(model, shares, step)

    total, shares = parallel(itc, last=False)
    total.backward()
    if not step.weights.itm:
        return shares, _nothing
    (exchange,), returned = drawn, 0

    def add_returned() -> None:
        """Add the gradients that the other ranks return for the negatives of the next microbatch."""
        nonlocal returned
        image, text = exchange.finish_return(returned)
        texts = text.split([own.text.packing.total for own in cached])
        for own, image_part, text_part in zip(cached, image.split(step.layout.pairs), texts, strict=True):
            _gradient(own.image).add_(image_part)
            _gradient(own.text.rows).add_(text_part)
        returned += 1

    # The rows of each microbatch travel while ITM of the one before runs, those of the first during ITC's backward
    # pass. Gradients return while ITM of the next one runs, those of the last during MLM and MIM.
    exchange.start(0)
    for number, own in enumerate(cached):
        arrived = exchange.arrive(number)
        # Leaves: backward stops here, and frees the graph of this microbatch.
        arrived.image.requires_grad_()
        arrived.text.rows.requires_grad_()
        if number + 1 < len(cached):
            exchange.start(number + 1)

        def itm(model: MaskVLM, own: Cached = own, arrived: Arrived = arrived, number: int = number):
            with step.autocast():
                shares = matching_shares(model, own.image, own.text, arrived, number, step)
            return scaled_total(model, shares, step)

        total, part = parallel(itm, last=False)
        total.backward()
        shares = shares + part
        if number > 0:
            add_returned()
        exchange.start_return(number, _gradient(arrived.image), _gradient(arrived.text.rows))
    return shares, add_returned


def _product_with_gradient(features: Tensor, cached: Tensor) -> Tensor:
    """Inner product, a scalar, of features with the gradient of their cached copy, which has the same shape."""
    return (features * _gradient(cached)).sum()


def _gradient(leaf: Tensor) -> Tensor:
    assert leaf.grad is not None
    return leaf.grad
