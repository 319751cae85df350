"""Losses and gradients of one step over the global batch: W ranks with A microbatches of b pairs each.

They are those of one rank that has all W A b pairs (docs/distributed.md says how). Each rank computes its share of
every loss; the shares of all ranks and microbatches add up to the loss. Backward goes from W times the share, because
DDP and FSDP2 take the mean of the ranks' gradients.

With A = 1 a step is one graph. With more, features are computed twice: once without a graph, for ITC and ITM, which
need those of all pairs and give their gradients; then a microbatch at a time, with a graph, for the reconstruction
losses and to carry those gradients on into the encoders (GradCache, Gao et al., 2021).

Shape legend: W ranks, A microbatches, b pairs of a microbatch, n = A b pairs of a rank, G = W n pairs, N patches,
L tokens a caption may have, C width, E contrastive width.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from mvlm.distributed.collectives import Place, fetch, gather, pack
from mvlm.distributed.contrastive import Draw, Negatives, contrast
from mvlm.distributed.loss_shares import Features, Shown, beside, features
from mvlm.distributed.parallel import Parallel
from mvlm.distributed.world import World
from mvlm.model.maskvlm import PLANS, MaskVLM
from mvlm.objectives import losses as objectives
from mvlm.objectives.losses import Losses
from mvlm_dataloading import Batch, Masks

Microbatch = tuple[Batch, Masks]
Shares = dict[str, Tensor]
"""A rank's shares of losses and accuracies, by name: scalars that add up to those of the global batch."""
OBJECTIVES = ("mlm", "mim", "itc", "itm")
NAMES = (*OBJECTIVES, "mlm_accuracy", "itc_accuracy", "itm_accuracy")


class Step(NamedTuple):
    """What the parts of one step share."""

    place: Place
    world: World
    plan: Any
    """The module mvlm.model.plain, or another with its functions."""
    autocast: Callable[[], AbstractContextManager[object]]
    draw: Draw
    lengths: Tensor
    """int64 (G,), tokens of every caption of the global batch."""
    masked_tokens: Tensor
    """Masked tokens of the global batch, a scalar on the device."""


def backward_global(
    parallel: Parallel,
    microbatches: Sequence[Microbatch],
    world: World,
    *,
    seed: int,
    step: int | Tensor,
    plan: Literal["plain", "fast"] = "plain",
    reconstruction_only: bool = False,
    local_negatives: bool = False,
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> Losses:
    """Leaves the gradients of the global batch's total loss in `.grad` and returns its losses, equal on every rank.

    Every rank brings as many microbatches, all of as many pairs: pair i of microbatch a of rank r is pair
    (a W + r) b + i of the global batch, which is the order in which a loader deals them out. `local_negatives` draws
    ITM's negatives within a microbatch instead; the losses then depend on how the batch lies across ranks.
    """
    sizes = sorted({len(batch.images) for batch, _ in microbatches})
    if len(sizes) != 1:
        raise ValueError(f"microbatches: wanted at least one, all with as many pairs, got {sizes} pairs")
    if world.size == len(microbatches) == 1:
        batch, masks = microbatches[0]
        with autocast():
            losses = parallel.model(
                batch, masks, seed=seed, step=step, reconstruction_only=reconstruction_only, plan=plan
            )
        losses.total.backward()
        return Losses(*(loss.detach() for loss in losses))
    place = Place(world.rank, world.size, len(microbatches), sizes[0])
    ids = torch.cat([_ids(batch) for batch, _ in microbatches])  # (n, 3)
    image_id, text_id, lengths = gather(ids, place).unbind(1)
    draw = Draw(image_id, text_id, seed, step, local_negatives)
    masked = torch.stack([_masked_tokens(batch, masks) for batch, masks in microbatches]).sum()
    now = Step(place, world, PLANS[plan], autocast, draw, lengths, world.all_reduce(masked))
    run = _one_graph if len(microbatches) == 1 else _two_passes
    shares = world.all_reduce(run(parallel, microbatches, now, not reconstruction_only))
    if reconstruction_only:
        for parameter in contrastive_parameters(parallel.model):
            parameter.grad = None  # as if nothing had asked for it: the optimizer leaves it alone
    return Losses(**dict(zip(NAMES, shares, strict=True)), total=shares[: len(OBJECTIVES)].sum())


def contrastive_parameters(model: MaskVLM) -> list[nn.Parameter]:
    """The parameters that ITC and ITM alone use."""
    modules = (model.image_projection, model.text_projection, model.matching_head)
    return [model.log_scale, *(p for module in modules for p in module.parameters())]


def _ids(batch: Batch) -> Tensor:
    """int64 (b, 3): image_id, text_id and tokens of each pair."""
    return torch.stack([batch.image_id, batch.text_id, batch.cu_seqlens.diff().long()], dim=1)


def _masked_tokens(batch: Batch, masks: Masks) -> Tensor:
    """How many there are, counted on the device: positions after the last caption only fill up a shape."""
    return (masks.token_ids < batch.cu_seqlens[-1]).sum()


def _one_graph(parallel: Parallel, microbatches: Sequence[Microbatch], now: Step, contrasted: bool) -> Tensor:
    """The step of one microbatch. Returns the shares (7,), in the order of NAMES."""

    def forward(model: MaskVLM) -> tuple[Tensor, Tensor]:
        batch, masks = microbatches[0]
        with now.autocast():
            streams = now.plan.encode(model, batch, masks)
            shares = _reconstruction_shares(model, streams, batch, masks, now)
            if contrasted:
                embeddings = model.embed_image(streams.image), model.embed_text(streams.text.first())  # (b, E)
                itc, right, negatives = contrast(*embeddings, model.log_scale, now.draw, now.place)
                shown = Shown(streams.image, streams.text, streams.memories)
                if not now.draw.local:
                    own = features(streams.image, streams.text, model.config.text_length)
                    shown = beside(own, _fetch([own], negatives, now))
                shares |= {"itc": itc, "itc_accuracy": right}
                shares |= _matching_shares(model, shown, negatives, _total(negatives, now), now)
        return _finish(model, shares, now)

    total, shares = parallel(forward)
    total.backward()
    return shares


def _two_passes(parallel: Parallel, microbatches: Sequence[Microbatch], now: Step, contrasted: bool) -> Tensor:
    """The step of several microbatches. Returns the shares (7,), in the order of NAMES."""
    own: list[Features] = []
    shares = torch.zeros(len(NAMES), device=now.masked_tokens.device)
    if contrasted:
        for batch, _ in microbatches:
            own.append(parallel(partial(_features_alone, batch=batch, now=now), last=False))
        shares = _contrast_leaves(parallel, own, now)
    for number, (batch, masks) in enumerate(microbatches):

        def forward(model: MaskVLM, batch: Batch = batch, masks: Masks = masks, number: int = number):
            with now.autocast():
                streams = now.plan.encode(model, batch, masks)
                rebuilt = _reconstruction_shares(model, streams, batch, masks, now)
            total, parts = _finish(model, rebuilt, now)
            if contrasted:
                # The gradient of this sum with respect to the features is the one they have from ITC and ITM.
                again = features(streams.image, streams.text, model.config.text_length)
                total = total + _inner(again.image, own[number].image) + _inner(again.text, own[number].text)
            return total, parts

        total, parts = parallel(forward, last=number == len(microbatches) - 1)
        total.backward()
        shares = shares + parts
    return shares


def _contrast_leaves(parallel: Parallel, own: list[Features], now: Step) -> Tensor:
    """ITC and ITM of features without a graph: their gradients are left in the features' `.grad`."""
    for mine in own:
        mine.image.requires_grad_()
        mine.text.requires_grad_()
    drawn: list[Negatives] = []

    def itc(model: MaskVLM) -> tuple[Tensor, Tensor]:
        with now.autocast():
            image = torch.cat([model.embed_image(mine.image) for mine in own])  # (n, E)
            text = torch.cat([model.embed_text(mine.text) for mine in own])
            share, right, negatives = contrast(image, text, model.log_scale, now.draw, now.place)
        drawn.append(negatives)
        return _finish(model, {"itc": share, "itc_accuracy": right}, now)

    total, shares = parallel(itc, last=False)
    total.backward()
    negatives, weight = drawn[0], _total(drawn[0], now)
    fetched = None if now.draw.local else _fetch(own, negatives, now)
    leaves = [] if fetched is None else [x.detach().requires_grad_(x.is_floating_point()) for x in fetched]
    for number, mine in enumerate(own):
        rows = slice(number * now.place.pairs, (number + 1) * now.place.pairs)

        def itm(model: MaskVLM, mine: Features = mine, rows: slice = rows):
            with now.autocast():
                if now.draw.local:
                    shown = Shown(mine.image, pack(mine.text, mine.lengths))
                else:
                    shown = beside(mine, Features(*(x[rows] for x in leaves)))
                shares = _matching_shares(model, shown, Negatives(*(x[rows] for x in negatives)), weight, now)
            return _finish(model, shares, now)

        total, part = parallel(itm, last=False)
        total.backward()
        shares = shares + part
    if fetched is not None:  # what others' pairs have for these features, and the reverse
        torch.autograd.backward([fetched.image, fetched.text], [leaf.grad for leaf in leaves[:2]])
    return shares


def _finish(model: MaskVLM, shares: Shares, now: Step) -> tuple[Tensor, Tensor]:
    """What backward goes from, and the shares (7,) themselves in the order of NAMES, zero where there is none.

    DDP waits for a gradient of every parameter, so all have one: of an empty sum, where nothing used them.
    """
    losses = [shares[name] for name in OBJECTIVES if name in shares]
    unused = sum(p.flatten()[:0].sum() for p in contrastive_parameters(model))
    none = torch.zeros_like(losses[0])
    found = torch.stack([shares.get(name, none).detach() for name in NAMES])
    return now.world.size * torch.stack(losses).sum() + unused, found


def _inner(x: Tensor, leaf: Tensor) -> Tensor:
    """<x, the gradient of leaf>, both of one shape."""
    assert leaf.grad is not None
    return (x * leaf.grad).sum()


@torch.no_grad()
def _features_alone(model: MaskVLM, batch: Batch, now: Step) -> Features:
    """The features of one microbatch, from whole images and captions alone."""
    with now.autocast():
        image, text = now.plan.encode_whole(model, batch)
    return features(image, text, model.config.text_length)


def _reconstruction_shares(model: MaskVLM, streams: Any, batch: Batch, masks: Masks, now: Step) -> Shares:
    """Shares of MLM, a mean over masked tokens, which differ in number, and of MIM, over patches, which do not."""
    mlm, mim, right = now.plan.reconstruction_losses(model, streams, batch, masks)
    mlm, right = (x * _masked_tokens(batch, masks) / now.masked_tokens for x in (mlm, right))
    return {"mlm": mlm, "mim": mim / (now.place.ranks * now.place.microbatches), "mlm_accuracy": right}


def _fetch(own: list[Features], negatives: Negatives, now: Step) -> Features:
    """The features of the drawn images and captions (n, ...), wherever they are."""
    image = fetch([features.image for features in own], negatives.images, now.place)
    text = fetch([features.text for features in own], negatives.texts, now.place)
    return Features(image, text, now.lengths.index_select(0, negatives.texts))


def _weights(negatives: Negatives) -> Tensor:
    """Of the three pairs of each row (3b,): its own, its image with a drawn caption, a drawn image with its caption."""
    return torch.cat([torch.ones_like(negatives.text_weights), negatives.text_weights, negatives.image_weights])


def _total(negatives: Negatives, now: Step) -> Tensor:
    """The weight of all pairs that ITM is shown in the global batch, a scalar on the device."""
    return now.world.all_reduce(_weights(negatives).sum())


def _matching_shares(model: MaskVLM, shown: Shown, negatives: Negatives, total: Tensor, now: Step) -> Shares:
    """The shares of ITM of one microbatch and the negatives (b,) drawn for it."""
    own = torch.arange(now.place.pairs, device=total.device)
    images, texts = own + now.place.pairs, own + now.place.pairs
    if now.draw.local:
        images, texts = negatives.images % now.place.pairs, negatives.texts % now.place.pairs
    weights = _weights(negatives)
    labels = torch.cat([torch.ones_like(own), torch.zeros_like(own), torch.zeros_like(own)])  # 1 = match
    logits = now.plan.match_pairs(
        model, shown.image, shown.text, torch.cat([own, own, images]), torch.cat([own, texts, own]), shown.memories
    )
    part = weights.sum() / total
    loss, right = (f(logits, labels, weights) for f in (objectives.matching_loss, objectives.matching_hits))
    return {"itm": loss * part, "itm_accuracy": right * part}
