"""Losses and gradients of one step over the global batch: W ranks with A microbatches of b pairs each.

They equal those of one rank with all W A b pairs (docs/explain/global_batch.md). Each rank computes its share of every
loss; the shares of all ranks and microbatches add up to the loss. With A = 1, forward and backward are one
autograd graph. With more microbatches the step uses gradient caching (`mvlm.distributed.gradient_cache`).

Shape legend: W ranks, A microbatches, b pairs of a microbatch, n = A b pairs of a rank, G = W n pairs, E contrastive
width.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch
from torch import Tensor

from mvlm.distributed.collectives import GlobalBatchLayout, Pending, start_gather
from mvlm.distributed.contrastive import Embeddings
from mvlm.distributed.gradient_cache import backward_cached
from mvlm.distributed.loss_shares import (
    OBJECTIVES,
    SHARE_NAMES,
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
from mvlm.objectives.losses import Losses, LossWeights
from mvlm.objectives.masked_tokens import weight_of_masked_tokens
from mvlm_dataloading import Batch


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
