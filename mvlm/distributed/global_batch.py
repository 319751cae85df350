"""Losses and gradients of one step over the global batch: W ranks with A microbatches of b pairs each.

They equal those of one rank with all W A b pairs (docs/guides/many_gpus.md). Each rank computes its share of every
loss from each of its microbatches; the shares of all ranks and microbatches add up to the loss. The contrastive logits,
from which ITM's negatives are drawn too, are computed in blocks of rows. With A = 1, forward and backward are one
autograd graph. With more microbatches the step uses gradient caching (`backward_cached`).

Shape legend: W ranks, A microbatches a rank, b pairs of a microbatch, n = A b pairs of a rank, G = W n pairs, N
patches, L tokens a caption may have, C width, E contrastive width, Q rows of a block.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from mvlm.device import compute_dtype
from mvlm.distributed.collectives import Gather, GlobalBatchLayout, InFlight, Pending, start_gather
from mvlm.distributed.exchange import Arrived, FeatureExchange
from mvlm.distributed.parallel import Parallel
from mvlm.distributed.world import World
from mvlm.model.implementation import ALL, Implementation, Streams, needs_masked
from mvlm.model.maskvlm import IMPLEMENTATIONS, MaskVLM
from mvlm.model.network import MaskVLMNetwork
from mvlm.model.packing import PackedText, Packing
from mvlm.objectives.losses import (
    Losses,
    LossWeights,
    contrastive_logits,
    contrastive_sums,
    matching_loss,
    number_of_masked_tokens,
    shared_contrastive_sums,
)
from mvlm.objectives.negatives import Negatives, NegativeSampling, matching_pairs, matching_rows, matching_weights
from mvlm_dataloading import Batch, Masks

MAX_LOGITS = 1 << 24
"""Largest number of logits in memory at a time: 64 MiB in fp32, for any number of ranks. Every further block of rows
reads the embeddings of all pairs again."""


class Embeddings:
    """This rank's embeddings of unit length, image and text (n, E) each, and those of all ranks on their way here.

    They are gathered in one collective, in the dtype in which the step computes.
    """

    def __init__(self, image: Tensor, text: Tensor, layout: GlobalBatchLayout) -> None:
        self.image, self.text = image, text
        both = torch.cat([image, text], dim=1)  # (n, 2 E)
        self._all = InFlight(both, Gather(both, layout, compute_dtype(both)))
        self._arrived: tuple[Tensor, Tensor] | None = None

    def arrive(self) -> tuple[Tensor, Tensor]:
        """Images and captions of all ranks, (G, E) each, with gradients."""
        if self._arrived is None:
            image, text = self._all.arrive().chunk(2, dim=1)
            self._arrived = image, text
        return self._arrived


def sharded_contrastive_loss(
    embeddings: Embeddings,
    log_scale: Tensor,
    sampling: NegativeSampling,
    layout: GlobalBatchLayout,
    elements: int = MAX_LOGITS,
    bias: Tensor | None = None,
    shared_positives: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute this rank's shares of ITC and of its accuracy, and draw negatives for its pairs.

    The rank computes the logits of its own images with all captions, and of its own captions with all images. The
    shares of all ranks add up to `objectives.losses.contrastive_loss` of the global batch. The draws int64 (n, 2) are
    the global indices of a caption for each image and of an image for each caption.

    Args:
        elements: most logits in memory at a time.
        bias: (1,), for the sigmoid loss; None for InfoNCE.
        shared_positives: take all pairs with the same image or caption text as right answers, which share the target.
    """
    indices, sums = layout.own_indices(embeddings.image.device), []
    all_images, all_texts = embeddings.arrive()
    for direction, (own, others) in enumerate(((embeddings.image, all_texts), (embeddings.text, all_images))):

        def block(rows: Tensor, of: Tensor, others: Tensor = others, direction: int = direction):
            """Loss, number of correct rows, and drawn columns int64 (Q,), of rows (Q, E) with global indices (Q,)."""
            logits = contrastive_logits(rows, others, log_scale)  # (Q, G)
            if shared_positives:
                found = shared_contrastive_sums(logits, sampling.matches(of))
            else:
                found = contrastive_sums(logits, of, bias)
            # The draw last: backward computes the block again only as far as the loss.
            return *found, sampling.draw(logits, of, direction)

        parts = _in_blocks(block, own, indices, max(1, elements // len(others)))
        losses, correct, columns = zip(*parts, strict=True)
        sums.append((_sum(losses), _sum(correct), torch.cat(columns)))
    (image_loss, image_correct, texts), (text_loss, text_correct, images) = sums
    loss, accuracy = (x / (2 * layout.total) for x in (image_loss + text_loss, image_correct + text_correct))
    return loss, accuracy, torch.stack([texts, images], dim=1)


def _in_blocks(block: Callable[[Tensor, Tensor], Any], rows: Tensor, indices: Tensor, size: int) -> list[Any]:
    """Values of `block` for rows and their global indices, `size` rows at a time.

    If these are several blocks, backward computes each again. Kept logits would make n x G elements, which grows with
    the ranks.
    """
    blocks = list(zip(rows.split(size), indices.split(size), strict=True))
    if len(blocks) == 1:
        return [block(*blocks[0])]
    return [checkpoint(block, own, of, use_reentrant=False) for own, of in blocks]


def _sum(values: Sequence[Tensor]) -> Tensor:
    return values[0] if len(values) == 1 else torch.stack(list(values)).sum()


class Kept(NamedTuple):
    """The model at the start of a run with --keep-start, which encodes each batch too."""

    weight: float
    """Weight of the distance to it."""
    model: MaskVLM

    @torch.no_grad()
    def embed(self, batches: Sequence[Batch], implementation: Implementation) -> tuple[Tensor, Tensor]:
        """Its embeddings of the images and captions of batches, (n, E) each."""
        found = [implementation.encode_unmasked(self.model, batch) for batch in batches]
        images = [self.model.embed_image(image) for image, _ in found]
        return torch.cat(images), torch.cat([self.model.embed_text(text.first()) for _, text in found])


def sharded_distance_to_start(
    own: Embeddings,
    start: Embeddings,
    log_scale: Tensor,
    start_log_scale: Tensor,
    layout: GlobalBatchLayout,
    elements: int = MAX_LOGITS,
) -> Tensor:
    """Compute this rank's share of `objectives.losses.distance_to_start` of the global batch.

    The arguments are those of that function and of `sharded_contrastive_loss`.
    """

    def divergence(rows: Tensor, start_rows: Tensor, others: Tensor, start_others: Tensor) -> Tensor:
        found = contrastive_logits(rows, others, log_scale).log_softmax(1)  # (Q, G)
        wanted = contrastive_logits(start_rows, start_others, start_log_scale).log_softmax(1)
        return F.kl_div(found, wanted, reduction="sum", log_target=True)

    images, texts = zip(own.arrive(), start.arrive(), strict=True)
    size = max(1, elements // len(texts[0]))
    parts = [(own.image - start.image).square().sum(), (own.text - start.text).square().sum()]
    for rows, start_rows, (others, start_others) in (
        (own.image, start.image, texts),
        (own.text, start.text, images),
    ):
        block = partial(divergence, others=others, start_others=start_others)
        parts += _in_blocks(block, rows, start_rows, size)
    return _sum(parts) / (2 * layout.total)


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
    ids: Pending
    """int64 (G, 3): image_id, text_id and number of tokens of each pair of the global batch."""
    masked_tokens: Pending
    """Number of masked tokens of the global batch: a float64 scalar on the device."""
    weights: LossWeights
    """Weights of the losses. An objective of weight 0 is not computed."""
    shared_positives: bool = False
    """ITC takes all pairs with the same image or caption text as right answers."""
    whole: bool = False
    """Nothing is masked or dropped: for ITC and ITM alone."""
    kept: Kept | None = None
    start: Embeddings | None = None
    """Embeddings of this rank's pairs by the model `kept`."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the shares of the step, in their order."""
        return SHARE_NAMES if self.kept is None else (*SHARE_NAMES, "kept")

    def encode(self, model: MaskVLM, microbatch: Microbatch, weights: LossWeights) -> Streams:
        """Encode a microbatch as far as losses of some weight need it."""
        batch, masks = microbatch
        return self.implementation.encode(model, batch, None if self.whole else masks, weights)

    @property
    def sampling(self) -> NegativeSampling:
        """Sampling of ITM's negatives."""
        image_id, text_id, _ = self.ids.wait().unbind(1)
        return NegativeSampling(image_id, text_id, self.seed, self.step)

    @property
    def lengths(self) -> Tensor:
        """int64 (G,), number of tokens of each caption of the global batch."""
        return self.ids.wait()[:, 2]


def idle_parameters(model: MaskVLMNetwork, weights: LossWeights) -> list[nn.Parameter]:
    """Parameters that no loss of some weight uses."""
    matching = weights.itm > 0
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
    scale = [model.log_scale] if model.logit_bias is None else [model.log_scale, model.logit_bias]
    idle += [] if weights.contrasts else scale
    masked_images, _ = needs_masked(model.config, weights)
    return idle if masked_images else [*idle, model.image_encoder.mask_token]


def language_shares(model: MaskVLMNetwork, streams: Streams, batch: Batch, masks: Masks, step: GlobalStep) -> Shares:
    """Shares of MLM and its accuracy, from one microbatch."""
    if not step.weights.mlm:
        return {}
    mlm, accuracy = step.implementation.language_loss(model, streams, batch, masks)
    # MLM is a mean over masked tokens. Microbatches have different numbers of them, so the mean of their means would
    # not be the loss of the global batch: each is weighted by its number.
    own, total = (x.to(mlm.dtype) for x in (number_of_masked_tokens(batch, masks), step.masked_tokens.wait()))
    return {"mlm": mlm * own / total, "mlm_accuracy": accuracy * own / total}


def image_share(model: MaskVLMNetwork, streams: Streams, batch: Batch, masks: Masks, step: GlobalStep) -> Shares:
    """Share of MIM, from one microbatch. All have equally many masked patches."""
    if not step.weights.mim:
        return {}
    mim = step.implementation.image_loss(model, streams, batch, masks)
    return {"mim": mim / (step.layout.ranks * step.layout.microbatches)}


def contrastive_shares(
    model: MaskVLMNetwork, embeddings: Embeddings, masked: Embeddings | None, step: GlobalStep
) -> tuple[Shares, Tensor]:
    """Shares of ITC and its accuracy, and draws int64 (n, 2) of negatives.

    Args:
        masked: embeddings of the images and of the masked captions, with `MaskVLMConfig.contrast_masked`.
    """

    def contrast(embeddings: Embeddings) -> tuple[Tensor, Tensor, Tensor]:
        return sharded_contrastive_loss(
            embeddings,
            model.log_scale,
            step.sampling,
            step.layout,
            bias=model.logit_bias,
            shared_positives=step.shared_positives,
        )

    share, accuracy, draws = contrast(embeddings)
    if masked is not None:
        share = (share + contrast(masked)[0]) / 2
    shares = {"itc": share, "itc_accuracy": accuracy}
    if step.kept is not None and step.start is not None:
        kept, scales = step.kept, (model.log_scale, step.kept.model.log_scale)
        shares["kept"] = kept.weight * sharded_distance_to_start(embeddings, step.start, *scales, step.layout)
    return shares, draws


def matching_shares(
    model: MaskVLMNetwork, image: Tensor, text: PackedText, arrived: Arrived, microbatch: int, step: GlobalStep
) -> Shares:
    """Shares of ITM and its accuracy, from one microbatch and the features of its negatives, which have arrived.

    image (b, 1+N, C) and text are its own features. The loss is a weighted mean; the weights of the pairs of the whole
    batch add up to its denominator.
    """
    theirs, ours = arrived.text.packing, text.packing
    # What has arrived comes first, because the own captions may end in padding rows.
    bounds = torch.cat([theirs.cu_seqlens, ours.cu_seqlens[1:] + theirs.total])
    packing = Packing(bounds, max(theirs.max_length, ours.max_length), theirs.total + ours.total)
    rows = step.layout.indices(microbatch, image.device)
    own = Negatives(*(x.index_select(0, rows) for x in arrived.negatives))
    drawn = own._replace(texts=arrived.text_place, images=arrived.image_place)
    pairs = matching_pairs(drawn, len(arrived.image), len(theirs))
    fused = step.implementation.fuse_pairs(
        model,
        torch.cat([arrived.image.to(image.dtype), image]),
        PackedText(torch.cat([arrived.text.rows.to(text.rows.dtype), text.rows]), packing),
        pairs.images,
        pairs.texts,
        None,
        matching_rows(ours.total, arrived.drawn_rows),
    )
    loss, accuracy = matching_loss(model.matching_logits(*fused), pairs.labels, pairs.weights)
    # `matching_loss` divides by this microbatch's weights; the share divides by those of the global batch.
    # Its float64 is for tests in float64: weights are counted exactly in any dtype.
    share = (pairs.weights.double().sum() / matching_weights(arrived.negatives).double().sum()).to(loss.dtype)
    return {"itm": loss * share, "itm_accuracy": accuracy * share}


def feature_exchange(draws: Tensor, image: Tensor, texts: list[PackedText], step: GlobalStep) -> FeatureExchange:
    """Exchange of features in the dtype in which the step computes: called under its autocast."""
    return FeatureExchange(draws, step.sampling, step.lengths, image, texts, step.layout, compute_dtype(image))


def scaled_total(model: MaskVLMNetwork, shares: Shares, step: GlobalStep) -> tuple[Tensor, Tensor]:
    """Weighted sum of the losses' shares times W, to call backward on, and all shares, without weights.

    The factor W is there because DDP and FSDP2 average gradients over ranks. Shares are in the order of `step.names`; a
    missing one is 0.
    """
    weights = step.weights._asdict() | {"kept": 1.0}
    losses = [weights[name] * shares[name] for name in (*OBJECTIVES, "kept") if name in shares]
    # DDP waits for a gradient of every parameter. A sum of no elements gives a zero gradient to those that this pass
    # does not use: with several microbatches, the last pass computes no ITC and no ITM.
    alone = step.layout.microbatches == 1
    idle = idle_parameters(model, step.weights if alone else step.weights.reconstructing())
    # Nor does it use the biases of keys if ITM alone reads a last block: the fast implementation needs no keys there.
    idle += [encoder.layers[-1].self_attention.key.bias for encoder in (model.image_cross, model.text_cross)]
    # FSDP2 waits for none. In a block that is not called, it has left its parameters sharded.
    idle = [parameter for parameter in idle if not isinstance(parameter, DTensor)]
    dtype = losses[0].dtype if losses else torch.float32
    zero = torch.zeros((), dtype=dtype, device=step.world.device)
    unused = sum((p.flatten()[:0].sum() for p in idle), zero)
    found = torch.stack([shares.get(name, zero).detach() for name in step.names])
    return step.world.size * torch.stack([zero, *losses]).sum() + unused, found


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
    whole: bool = False,
    kept: Kept | None = None,
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
        whole: mask and drop nothing, for weights of ITC and ITM alone.
        kept: the model at the start, whose distance is in the total, for weights with ITC.

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
    masked = torch.stack([number_of_masked_tokens(batch, masks) for batch, masks in microbatches]).sum(0)
    counted = Pending(world.start_all_reduce(masked), lambda: masked)
    implementation, start = IMPLEMENTATIONS[plan], None
    if kept is not None:
        with autocast():
            start = Embeddings(*kept.embed([batch for batch, _ in microbatches], implementation), layout)
    shared = GlobalStep(
        layout, world, implementation, autocast, seed, step, ids, counted, weights, shared_positives, whole, kept, start
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
    found = dict(zip(shared.names, shares, strict=True))
    if kept is not None:
        total = total + found.pop("kept")
    return Losses(**found, total=total)


def _ids(batch: Batch) -> Tensor:
    """image_id, text_id and number of tokens of each pair: int64 (b, 3), gathered in one collective."""
    return torch.stack([batch.image_id, batch.text_id, batch.cu_seqlens.diff().long()], dim=1)


def _backward_one_graph(parallel: Parallel, microbatches: Sequence[Microbatch], step: GlobalStep) -> Tensor:
    """Forward and backward of a single microbatch. Returns the rank's shares, in the order of `step.names`."""

    def forward(model: MaskVLM) -> tuple[Tensor, Tensor]:
        batch, masks = microbatches[0]
        with step.autocast():
            streams = step.encode(model, (batch, masks), step.weights)
            if not step.weights.contrasts:
                shares = language_shares(model, streams, batch, masks, step)
                return scaled_total(model, shares | image_share(model, streams, batch, masks, step), step)
            # In forward and in backward, embeddings travel while MLM runs, and features of negatives while MIM runs.
            image, text = streams.image, streams.text
            embeddings = Embeddings(model.embed_image(image), model.embed_text(text.first()), step.layout)
            masked = None
            if model.config.contrast_masked and streams.masked_text is not None:
                masked = Embeddings(embeddings.image, model.embed_text(streams.masked_text.first()), step.layout)
            shares = language_shares(model, streams, batch, masks, step)
            contrastive, draws = contrastive_shares(model, embeddings, masked, step)
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
    masked: Tensor | None
    """[CLS] of wm (b, 1, C), with `MaskVLMConfig.contrast_masked`."""


def backward_cached(parallel: Parallel, microbatches: Sequence[Microbatch], step: GlobalStep) -> Tensor:
    """Forward and backward of several microbatches. Returns the rank's shares, in the order of `step.names`.

    Without ITC and ITM there is only the second pass.
    """
    cached: list[Cached] = []
    gradients = None
    shares = torch.zeros(len(step.names), device=microbatches[0][0].images.device)
    if step.weights.contrasts:
        for own in microbatches:
            cached.append(parallel(partial(_features_without_graph, microbatch=own, step=step), last=False))
        gradients = _FeatureGradients(parallel, cached, step)
        shares = gradients.compute()
    for number, (batch, masks) in enumerate(microbatches):
        # Defaults bind this microbatch. A plain closure would see the loop's variables as they are when it runs.
        def forward(model: MaskVLM, batch: Batch = batch, masks: Masks = masks, number: int = number):
            with step.autocast():
                streams = step.encode(model, (batch, masks), step.weights)
                reconstruction = language_shares(model, streams, batch, masks, step)
                reconstruction |= image_share(model, streams, batch, masks, step)
            total, parts = scaled_total(model, reconstruction, step)
            if gradients is not None:
                if number == 0:
                    gradients.finish()
                # `total` and the cached gradients both contain the factor W already (see `scaled_total`).
                total = total + _product_with_gradient(streams.image, cached[number].image)
                total = total + _product_with_gradient(streams.text.rows, cached[number].text.rows)
                if (masked := cached[number].masked) is not None:
                    assert streams.masked_text is not None
                    total = total + _product_with_gradient(streams.masked_text.first(), masked)
            return total, parts

        # DDP reduces gradients in the last backward pass; until then they accumulate on each rank.
        total, parts = parallel(forward, last=number == len(microbatches) - 1)
        total.backward()
        shares = shares + parts
    return shares


@torch.no_grad()
def _features_without_graph(model: MaskVLM, microbatch: Microbatch, step: GlobalStep) -> Cached:
    """Features of the images and captions of one microbatch that ITC and ITM read."""
    with step.autocast():
        streams = step.encode(model, microbatch, step.weights._replace(mlm=0.0, mim=0.0))
        masked = streams.masked_text if model.config.contrast_masked else None
        return Cached(streams.image, streams.text, None if masked is None else masked.first())


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
        """Run the pass. Returns the rank's shares. The gradients are complete after `finish`."""
        for own in self._cached:
            own.image.requires_grad_()
            own.text.rows.requires_grad_()
            if own.masked is not None:
                own.masked.requires_grad_()
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
            captions = [model.embed_text(own.masked) for own in cached if own.masked is not None]
            masked = Embeddings(image, torch.cat(captions), step.layout) if captions else None
            shares, draws = contrastive_shares(model, embeddings, masked, step)
            if step.weights.itm:
                image = torch.cat([own.image.detach() for own in cached])  # (n, 1+N, C)
                texts = [own.text._replace(rows=own.text.rows.detach()) for own in cached]
                self._exchange = feature_exchange(draws, image, texts, step)
        return scaled_total(model, shares, step)

    def _backward_matching(self, exchange: FeatureExchange, number: int) -> Tensor:
        """ITM of one microbatch, forward and backward. Returns its shares."""
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
