"""Losses and gradients of one step over the global batch: W ranks with A microbatches of b pairs each.

They equal those of one rank with all W A b pairs (docs/explain/global_batch.md). Each rank computes its share of every
loss; the shares of all ranks and microbatches add up to the loss. With A = 1, forward and backward are one
autograd graph. With more microbatches the step uses gradient caching (`mvlm.distributed.global_batch`).

Shape legend: W ranks, A microbatches, b pairs of a microbatch, n = A b pairs of a rank, G = W n pairs, E contrastive
width.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from mvlm.distributed.collectives import GlobalBatchLayout, Pending, start_gather
from mvlm.distributed.exchange import FeatureExchange
from mvlm.distributed.loss_shares import (
    OBJECTIVES,
    SHARE_NAMES,
    Embeddings,
    GlobalStep,
    Microbatch,
    contrastive_shares,
    feature_exchange,
    idle_parameters,
    image_share,
    language_shares,
    matching_shares,
    scaled_total,
)
from mvlm.distributed.parallel import Parallel
from mvlm.distributed.world import World
from mvlm.model.implementation import ALL
from mvlm.model.maskvlm import IMPLEMENTATIONS, MaskVLM
from mvlm.model.packing import PackedText
from mvlm.objectives.losses import Losses, LossWeights, weight_of_masked_tokens
from mvlm_dataloading import Batch, Masks


def backward_global(
    parallel: Parallel,
    microbatches: Sequence[Microbatch],
    world: World,
    *,
    seed: int,
    step: int | Tensor,
    plan: Literal["plain", "fast"] = "plain",
    weights: LossWeights = ALL,
    shared_positives: bool = False,
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> Losses:
    """Compute the losses of the global batch, and the gradients of their total in the parameters' `.grad`.

    Every rank passes the same number of microbatches, all with the same number of pairs. Pair i of microbatch a of rank
    r is pair (a W + r) b + i of the global batch: the loader's order.

    Args:
        weights: weights of the losses in the total. A loss of weight 0 is zero and is not computed, but for ITC if ITM
            has a weight.
        shared_positives: ITC takes all pairs with the same image or caption text as right answers. Without it, each
            pair has one.

    Returns:
        The losses, scalars without gradient, equal on every rank.
    """
    sizes = sorted({len(batch.images) for batch, _ in microbatches})
    if len(sizes) != 1:
        raise ValueError(f"microbatches: wanted at least one, all with as many pairs, got {sizes} pairs")
    layout = GlobalBatchLayout(world.rank, world.size, len(microbatches), sizes[0])
    # Every rank needs the ids of all pairs, to exclude true matches from the negatives, and the lengths of all
    # captions, to know the packing of those that it sends and receives.
    ids = start_gather(torch.cat([_ids(batch) for batch, _ in microbatches]), layout)
    masked = torch.stack([weight_of_masked_tokens(batch, masks) for batch, masks in microbatches]).sum(0)
    counted = Pending(world.start_all_reduce(masked), lambda: masked)
    shared = GlobalStep(
        layout,
        world,
        IMPLEMENTATIONS[plan],
        autocast,
        seed,
        step,
        ids,
        counted,
        weights,
        shared_positives,
    )
    run = _backward_one_graph if len(microbatches) == 1 else backward_cached
    shares = world.all_reduce(run(parallel, microbatches, shared))
    # A parameter that changes no loss (a bias of keys) has a gradient of 0 under DDP, and would have none under FSDP2.
    for parameter in parallel.model.parameters():
        if parameter.requires_grad and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    # `scaled_total` gave these zero gradients, with which AdamW would still decay the weights. None skips them.
    for parameter in idle_parameters(parallel.model, weights):
        parameter.grad = None
    total = weights.total(shares[: len(OBJECTIVES)].unbind())
    return Losses(**dict(zip(SHARE_NAMES, shares, strict=True)), total=total)


def _ids(batch: Batch) -> Tensor:
    """image_id, text_id and number of tokens of each pair: int64 (b, 3), gathered in one collective."""
    return torch.stack([batch.image_id, batch.text_id, batch.cu_seqlens.diff().long()], dim=1)


def _backward_one_graph(parallel: Parallel, microbatches: Sequence[Microbatch], step: GlobalStep) -> Tensor:
    """Forward and backward of a single microbatch. Returns the rank's shares (7,), in the order of SHARE_NAMES."""

    def forward(model: MaskVLM) -> tuple[Tensor, Tensor]:
        batch, masks = microbatches[0]
        with step.autocast():
            streams = step.implementation.encode(model, batch, masks, step.weights)
            if not step.weights.contrasts:
                shares = language_shares(model, streams, batch, masks, step)
                return scaled_total(model, shares | image_share(model, streams, batch, masks, step), step)
            # In forward and in backward, embeddings travel while MLM runs, and features of negatives while MIM runs.
            image, text = streams.image, streams.text
            embeddings = Embeddings(model.embed_image(image), model.embed_text(text.first()), step.layout)
            shares = language_shares(model, streams, batch, masks, step)
            contrastive, draws = contrastive_shares(model, image, embeddings, step)
            shares |= contrastive
            if not step.weights.itm:
                shares |= image_share(model, streams, batch, masks, step)
            else:
                exchange = feature_exchange(draws, image, [text], step)
                exchange.join_graph()
                shares |= image_share(model, streams, batch, masks, step)
                exchange.start(0)
                shares |= matching_shares(model, image, text, exchange.arrive(0), 0, step)
        return scaled_total(model, shares, step)

    total, shares = parallel(forward)
    total.backward()
    return shares


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
    gradients = None
    shares = torch.zeros(len(SHARE_NAMES), device=microbatches[0][0].images.device)
    if contrastive:
        for batch, _ in microbatches:
            cached.append(parallel(partial(_features_without_graph, batch=batch, step=step), last=False))
        gradients = _FeatureGradients(parallel, cached, step)
        shares = gradients.compute()
    for number, (batch, masks) in enumerate(microbatches):
        # Defaults bind this microbatch. A plain closure would see the loop's variables as they are when it runs.
        def forward(model: MaskVLM, batch: Batch = batch, masks: Masks = masks, number: int = number):
            with step.autocast():
                streams = step.implementation.encode(model, batch, masks, reconstructing)
                reconstruction = language_shares(model, streams, batch, masks, step)
                reconstruction |= image_share(model, streams, batch, masks, step)
            total, parts = scaled_total(model, reconstruction, step)
            if gradients is not None:
                if number == 0:
                    gradients.finish()
                # `total` and the cached gradients both contain the factor W already (see `scaled_total`).
                total = total + _product_with_gradient(streams.image, cached[number].image)
                total = total + _product_with_gradient(streams.text.rows, cached[number].text.rows)
            return total, parts

        # DDP reduces gradients in the last backward pass; until then they accumulate on each rank.
        total, parts = parallel(forward, last=number == len(microbatches) - 1)
        total.backward()
        shares = shares + parts
    return shares


@torch.no_grad()
def _features_without_graph(model: MaskVLM, batch: Batch, step: GlobalStep) -> Cached:
    """Features of the unmasked images and captions of one microbatch."""
    with step.autocast():
        return Cached(*step.implementation.encode_unmasked(model, batch))


class _FeatureGradients:
    """Backward pass of ITC and ITM as far as the features of all microbatches.

    The gradients of the features gather in `.grad` of `cached`. Those of ITC's and ITM's own parameters accumulate as
    usual.
    """

    def __init__(self, parallel: Parallel, cached: list[Cached], step: GlobalStep) -> None:
        self._parallel, self._cached, self._step = parallel, cached, step
        self._exchange: FeatureExchange | None = None
        """Exchange of the features of drawn negatives; None without ITM."""
        self._returned = 0
        """Microbatches for whose negatives the other ranks' gradients have been added."""

    def compute(self) -> Tensor:
        """Run the pass. Returns the rank's shares (7,). The gradients are complete after `finish`."""
        for own in self._cached:
            own.image.requires_grad_()
            own.text.rows.requires_grad_()
        total, shares = self._parallel(self._itc, last=False)
        total.backward()
        if self._exchange is None:
            return shares
        # The rows of each microbatch travel while ITM of the one before runs, those of the first during ITC's backward
        # pass. Gradients return while ITM of the next one runs, those of the last during MLM and MIM.
        self._exchange.start(0)
        for number in range(len(self._cached)):
            shares = shares + self._backward_matching(self._exchange, number)
        return shares

    def finish(self) -> None:
        """Wait for the last part of the gradients. Called before they are read."""
        if self._exchange is not None:
            self._add_returned(self._exchange)

    def _itc(self, model: MaskVLM) -> tuple[Tensor, Tensor]:
        """ITC of the whole batch, and the draws of ITM's negatives."""
        cached, step = self._cached, self._step
        with step.autocast():
            image = torch.cat([model.embed_image(own.image) for own in cached])  # (n, E)
            text = torch.cat([model.embed_text(own.text.first()) for own in cached])
            embeddings = Embeddings(image, text, step.layout)
            # A copy of all features, so only for the loss that reads them.
            features = torch.cat([own.image for own in cached]) if model.text_pooling is not None else None
            shares, draws = contrastive_shares(model, features, embeddings, step)
            if step.weights.itm:
                image = torch.cat([own.image.detach() for own in cached])  # (n, 1+N, C)
                texts = [own.text._replace(rows=own.text.rows.detach()) for own in cached]
                self._exchange = feature_exchange(draws, image, texts, step)
        return scaled_total(model, shares, step)

    def _backward_matching(self, exchange: FeatureExchange, number: int) -> Tensor:
        """ITM of one microbatch, forward and backward. Returns its shares (7,)."""
        own, step, arrived = self._cached[number], self._step, exchange.arrive(number)
        # Leaves: backward stops here, and frees the graph of this microbatch.
        arrived.image.requires_grad_()
        arrived.text.rows.requires_grad_()
        if number + 1 < len(self._cached):
            exchange.start(number + 1)

        def itm(model: MaskVLM) -> tuple[Tensor, Tensor]:
            with step.autocast():
                shares = matching_shares(model, own.image, own.text, arrived, number, step)
            return scaled_total(model, shares, step)

        total, shares = self._parallel(itm, last=False)
        total.backward()
        if number > 0:
            self._add_returned(exchange)
        exchange.start_return(number, _gradient(arrived.image), _gradient(arrived.text.rows))
        return shares

    def _add_returned(self, exchange: FeatureExchange) -> None:
        """Add the gradients that the other ranks return for the negatives of the next microbatch."""
        image, text = exchange.finish_return(self._returned)
        texts = text.split([own.text.packing.total for own in self._cached])
        for own, image_part, text_part in zip(self._cached, image.split(self._step.layout.pairs), texts, strict=True):
            _gradient(own.image).add_(image_part)
            _gradient(own.text.rows).add_(text_part)
        self._returned += 1


def _product_with_gradient(features: Tensor, cached: Tensor) -> Tensor:
    """Inner product, a scalar, of features with the gradient of their cached copy, which has the same shape."""
    return (features * _gradient(cached)).sum()


def _gradient(leaf: Tensor) -> Tensor:
    assert leaf.grad is not None
    return leaf.grad
