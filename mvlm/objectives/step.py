"""Objectives, and the losses of one training step, on one rank or on many.

To add an objective, write a subclass of `MicrobatchObjective` or `BatchObjective` in a file of its own, add it to
`OBJECTIVES` in `mvlm.objectives.pretraining`, and give it a line `NAME_weight` in
`mvlm.config.groups.ObjectiveSettings`, marked `COMPARES` if the loss needs two pairs. `check_against_loops`
(tests/support/objectives.py) tests it.

Each rank computes its share of every loss from each of its microbatches. The shares of all ranks and microbatches add
up to the loss of the global batch. In a world of one, collectives return their argument. `MaskVLM.forward` takes the
losses of a batch that is alone, `mvlm.distributed.global_batch` those of several ranks and microbatches.

Shape legend: b pairs of a microbatch, n pairs of a rank, G pairs of the global batch, E contrastive width, Q rows of a
block.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mvlm.config.model import MaskVLMConfig
from mvlm.device import compute_dtype
from mvlm.distributed.collectives import AsyncOp, GlobalBatchLayout, Handle, all_gather, all_reduce, reduce_scatter
from mvlm.distributed.exchange import FeatureExchange, PairFeatures
from mvlm.model.implementation import MASKED, Implementation, Streams
from mvlm.model.network import MaskVLMNetwork
from mvlm.objectives.losses import Losses, contrastive_logits
from mvlm.objectives.negatives import NegativeSampling
from mvlm_dataloading import Batch, Masks

MAX_LOGITS = 1 << 24
"""Largest number of logits in memory at a time: 64 MiB in fp32, for any number of ranks. Every further block of rows
reads the embeddings of all pairs again."""
Microbatch = tuple[Batch, Masks | None]
"""Batch and masks of a microbatch. Masks of None: nothing is masked or dropped, for objectives that compare pairs
alone."""
Shares = dict[str, Tensor]
"""Shares of losses and accuracies by name: scalars."""
TRANSFERS = ("embeddings", "features", "nothing")
"""Stages of the traffic between ranks in a step, in order: embeddings for ITC, features for ITM, then nothing more."""
ANY_PART = ("any part",)
"""Value of `Objective.trains` for an objective that may train any part of the network, nobody knows which."""


@dataclass(frozen=True)
class Objective:
    """An objective with its weight in the total. One of weight 0 is not computed, and its loss is zero."""

    weight: float = 1.0
    name: ClassVar[str]
    """Name of its loss in `Losses` and in the rows of metrics; `NAME_weight` is its setting."""
    accuracies: ClassVar[tuple[str, ...]] = ()
    """Names of further values, such as an accuracy, that it computes beside the loss."""
    curve: ClassVar[str] = ""
    """Title of its curve in reports, with the unit."""
    reported: ClassVar[bool] = True
    """True if its loss is in `Losses`. If False it is only a term of the total."""
    trains: ClassVar[tuple[str, ...]] = ()
    """Modules and parameters of the network that it trains beside the encoders. `ANY_PART` if it may train any of them.

    NOTE: name all. A step of several ranks or microbatches drops the gradients of those that no objective names.
    """
    encoders: ClassVar[tuple[str, ...]] = ("image_encoder", "text_encoder")
    """Encoders that it trains.

    NOTE: name no other. On several ranks a step fails, or averages no gradients, if none of its objectives trains an
    encoder that one of them names.
    """

    def reads(self, config: MaskVLMConfig) -> Sequence[str]:
        """Fields of `Streams` that the objective reads. The unmasked streams are always there and need not be named."""
        return ()

    def named(self, values: Iterable[Tensor]) -> Shares:
        """Name the values of the objective: its loss, then its accuracies, in the order of `values`."""
        return dict(zip((self.name, *self.accuracies), values, strict=True))


class MicrobatchObjective(Objective):
    """An objective whose loss is a mean over terms that each microbatch computes alone, such as MLM and MIM."""

    rebuilds: ClassVar[str | None] = None
    """Masked stream that it rebuilds from the other modality, "masked_image" or "masked_text", if any."""
    beside: ClassVar[Literal["embeddings", "features", "nothing"]] = "embeddings"
    """Transfer between ranks (`TRANSFERS`) that the computation of this objective overlaps with."""

    def reads(self, config: MaskVLMConfig) -> Sequence[str]:
        return () if self.rebuilds is None else MASKED if config.mask_partner else (self.rebuilds,)

    def count(self, batch: Batch, masks: Masks | None) -> Tensor | None:
        """Number of terms in the mean over a microbatch, a float64 scalar; None if it is the same for all."""
        return None

    def means(self, features: "Features") -> Sequence[Tensor]:
        """Loss and accuracies on one microbatch: scalars, means over its terms."""
        raise NotImplementedError


class BatchObjective(Objective):
    """An objective that needs all pairs of the global batch, such as ITC.

    By default it compares each image with all captions, and reads gathered embeddings. One that needs only sums over
    the pairs, such as a correlation of embeddings, returns no `views`, and takes `Features.embed` and
    `Features.global_sum`. One that compares images, or captions, among themselves keeps the default `views`, calls
    `sum_over_logits` with `within=True`, ignores the other direction, and names in `trains` and `encoders` its side
    alone. One that reads no embeddings has its own `trains`.
    """

    trains = ("image_projection", "text_projection")
    draws: ClassVar[bool] = False
    """True if it draws negatives, and leaves them in `Features.draws`."""

    def views(self, config: MaskVLMConfig) -> Sequence[tuple[str, str]]:
        """Pairs of streams whose embeddings it compares: "image" or "masked_image", with "text" or "masked_text"."""
        return [("image", "text")]

    def reads(self, config: MaskVLMConfig) -> Sequence[str]:
        return [name for view in self.views(config) for name in view]

    def shares(self, features: "Features") -> Sequence[Tensor]:
        """Shares of one rank in the loss and the accuracies, scalars: sums over its n pairs, divided by G.

        A loss that is no such sum, as the logarithm of a mean over all pairs, is a function of `Features.global_sum`.
        Every rank computes the same loss, and its share is the loss divided by `features.step.layout.ranks`.

        NOTE: autocast may be on: products and sums of a loss are then bf16. `sum_over_logits` leaves it; a loss of its
        own does so by `mvlm_kernels.dispatch.without_autocast`.
        """
        raise NotImplementedError


class NegativesObjective(Objective):
    """An objective of true pairs and of drawn negatives, such as ITM. It needs another objective that draws them."""

    def shares(self, model: MaskVLMNetwork, implementation: Implementation, pairs: PairFeatures) -> Sequence[Tensor]:
        """Shares of the loss and its accuracies, scalars, from the pairs of one microbatch."""
        raise NotImplementedError


class Embeddings:
    """Contrastive embeddings of a rank's n pairs, image and text (n, E) each, of unit length, and those of all ranks.

    Those of all ranks are gathered in one collective, in the dtype in which the step computes. Gradients travel in
    their own dtype. With `captions_alone` only the captions are gathered at first, and the images when they are asked
    for.
    """

    def __init__(self, image: Tensor, text: Tensor, layout: GlobalBatchLayout, captions_alone: bool = False) -> None:
        self.image, self.text, self._layout = image, text, layout
        self._all: tuple[Tensor, ...] = (image, text) if layout.alone else ()
        self._captions: Tensor | None = None
        if not layout.alone:
            self._op = self._gather(text if captions_alone else torch.cat([image, text], dim=1))  # (n, E) or (n, 2 E)
            self._captions_alone = captions_alone

    def _gather(self, x: Tensor) -> AsyncOp:
        layout = self._layout
        rows = all_gather(x.detach().to(x.dtype if layout.ranks == 1 else compute_dtype(x)), layout)
        return AsyncOp(x, lambda: rows.wait().to(x.dtype), lambda grad: reduce_scatter(grad, layout))

    def gathered(self) -> tuple[Tensor, ...]:
        """Embeddings of the images and of the captions of all ranks, (G, E) each, with gradients."""
        if not self._all:
            alone = self._captions_alone
            self._all = (self._gather(self.image).wait(), self.captions()) if alone else self._op.wait().chunk(2, dim=1)
        return self._all

    def captions(self) -> Tensor:
        """Embeddings of the captions of all ranks, (G, E), with gradients."""
        if self._all or not self._captions_alone:
            return self.gathered()[1]
        if self._captions is None:
            self._captions = self._op.wait()
        return self._captions


@dataclass(eq=False)
class Features:
    """Outputs of the encoders from which objectives compute losses, of one microbatch or of all of a rank."""

    step: "Step"
    """The step: its `seed`, its `number`, the `layout` of the global batch, and the `implementation` that encodes."""
    model: MaskVLMNetwork
    """The network, for its heads."""
    microbatches: Sequence[tuple[Batch, Any]]
    """(batch, masks) of each microbatch: one for a `MicrobatchObjective`, all of this rank for a `BatchObjective`."""
    all_streams: Sequence[Streams]
    """Features of all patches and tokens of each microbatch, before the two streams are fused."""
    draws: Tensor = field(init=False)
    """int64 (n, 2), global indices of the caption drawn for each of n images, and of the image drawn for each caption.
    """
    _embeddings: dict[str, Tensor] = field(default_factory=dict, init=False)
    _gathered: dict[tuple[str, str], Embeddings] = field(default_factory=dict, init=False)

    @property
    def streams(self) -> Streams:
        """Features of all patches and tokens of the only microbatch, before the two streams are fused."""
        (streams,) = self.all_streams
        return streams

    @property
    def image(self) -> Tensor | None:
        """Contrastive embeddings of the images (n, E), of unit length; None if no objective compares pairs."""
        return self.embed("image") if self.step.of_batch else None

    @property
    def text(self) -> Tensor | None:
        """Contrastive embeddings of the captions (n, E), of unit length; None if no objective compares pairs."""
        return self.embed("text") if self.step.of_batch else None

    def embed(self, stream: str) -> Tensor:
        """Contrastive embeddings (n, E), of unit length, of a stream: image, masked_image, text or masked_text."""
        if stream not in self._embeddings:
            found = [getattr(streams, stream) for streams in self.all_streams]
            image = stream in ("image", "masked_image")
            parts = [self.model.embed_image(x) if image else self.model.embed_text(x.first()) for x in found]
            self._embeddings[stream] = parts[0] if len(parts) == 1 else torch.cat(parts)
        return self._embeddings[stream]

    def views(self, objective: BatchObjective) -> list[tuple[str, str]]:
        """Pairs of streams that an objective compares (`BatchObjective.views`); masked ones only if there are masks."""
        views = objective.views(self.model.config)
        return [view for view in views if None not in (getattr(self.all_streams[0], name) for name in view)]

    def gather(self, image: str = "image", text: str = "text") -> Embeddings:
        """Embeddings of two streams, of this rank and of all.

        The first call for these streams starts to gather them.
        """
        if (image, text) not in self._gathered:
            self._gathered[image, text] = Embeddings(
                self.embed(image), self.embed(text), self.step.layout, captions_alone=self.in_blocks
            )
        return self._gathered[image, text]

    def global_sum(self, x: Tensor) -> Tensor:
        """Sum of x over all ranks, where x, of any shape, is this rank's sum over its pairs in all microbatches.

        Gradients of the sum return to the x of every rank. ValueError in a `MicrobatchObjective` of a step with several
        microbatches, which sees one of them at a time.
        """
        layout = self.step.layout
        if len(self.microbatches) < layout.microbatches:
            raise ValueError(f"global_sum: wanted a BatchObjective, as the step has {layout.microbatches} microbatches")
        if layout.ranks == 1:
            return x
        # A rank's x is part of the sum on every rank: its gradient is the sum of theirs.
        total = all_reduce(x.detach().clone(), layout)
        return AsyncOp(x, total.wait, lambda grad: all_reduce(grad.clone(), layout)).wait()

    @property
    def rows_at_a_time(self) -> int:
        """Number of rows of the logits, this rank's pairs against all pairs, that are in memory at a time."""
        layout = self.step.layout
        return layout.pairs if layout.alone else max(1, MAX_LOGITS // layout.total)

    @property
    def in_blocks(self) -> bool:
        """True if the logits of this rank's pairs fill a block or more. ITC then gathers no images."""
        layout = self.step.layout
        return not layout.alone and layout.microbatches * layout.pairs >= self.rows_at_a_time

    def sum_over_logits(
        self,
        function: Callable[..., Sequence[Tensor]],
        *compared: tuple[Embeddings, Tensor | None],
        within: bool = False,
    ) -> list[list[Tensor]]:
        """Sum a function over the contrastive logits of this rank's pairs with all pairs, in blocks of rows.

        Args:
            function: called as `function(direction, rows, *logits)` with logits (Q, G) of each of `compared`, and the
                global indices int64 (Q,) of their rows. Rows are images and columns captions in direction 0, the
                reverse in 1. It returns scalars, which are sums over the rows, or tensors with a value for each row.
            compared: embeddings, and the logarithm of 1 / temperature, (1,); None for cosines.
            within: compare each modality with itself: rows and columns are images in direction 0, captions in 1. A row
                is compared with itself too.

        Returns:
            In each direction, what the function returns of all rows: scalars added up, others joined.

        If there are several blocks, backward computes each again: kept logits would grow with the ranks.
        """
        layout, scales, found = self.step.layout, [scale for _, scale in compared], []
        indices = layout.own_indices(compared[0][0].image.device)
        if layout.alone and not within:
            # All pairs are here: the columns of one matrix are the rows of the other direction.
            logits = [contrastive_logits(own.image, own.text, scale) for own, scale in compared]
            return [list(function(0, indices, *logits)), list(function(1, indices, *(x.T for x in logits)))]
        for direction in (0, 1):
            own = [x.text if direction else x.image for x, _ in compared]
            others = [x.gathered()[direction if within else 1 - direction] for x, _ in compared]

            def block(rows: Tensor, *own: Tensor, others: Any = others, direction: int = direction) -> Sequence[Tensor]:
                return function(direction, rows, *map(contrastive_logits, own, others, scales))

            blocks = list(zip(*(x.split(self.rows_at_a_time) for x in (indices, *own)), strict=True))
            run = block if len(blocks) == 1 else partial(checkpoint, block, use_reentrant=False)
            parts = zip(*(run(*rows) for rows in blocks), strict=True)
            found.append([_join(list(values)) for values in parts])
        return found


def _join(values: list[Tensor]) -> Tensor:
    if len(values) == 1:
        return values[0]
    return torch.cat(values) if values[0].ndim else torch.stack(values).sum()


class Step:
    """One training step on one rank: its objectives, and the place of the rank in the global batch.

    Args:
        seed: seed of the negatives.
        number: number of the update; with the seed it determines the negatives.
        microbatches: those of this rank.

    ValueError for two objectives of one name, or for ITM without ITC.
    """

    def __init__(
        self,
        objectives: Sequence[Objective],
        implementation: Implementation,
        layout: GlobalBatchLayout,
        seed: int,
        number: int | Tensor,
        microbatches: Sequence[Microbatch],
    ) -> None:
        self.objectives, self.computed = objectives, computed(objectives)
        self.implementation, self.layout = implementation, layout
        self.of_microbatch = [x for x in self.computed if isinstance(x, MicrobatchObjective)]
        self.of_batch = [x for x in self.computed if isinstance(x, BatchObjective)]
        self.of_negatives = [x for x in self.computed if isinstance(x, NegativesObjective)]
        names = [x.name for x in objectives]
        if len(set(names)) < len(names) or (self.of_negatives and not any(x.draws for x in self.of_batch)):
            raise ValueError(f"objectives: wanted each once, and ITC with ITM, got {', '.join(names)}")
        self.names = [x.name for x in self.computed] + [name for x in self.computed for name in x.accuracies]
        """Names of all losses and accuracies that are computed: losses first."""
        self.seed, self.number = seed, number
        if self.of_batch:
            # Every rank needs the ids of all pairs, to exclude true matches from the negatives, and the lengths of all
            # captions, to know the packing of those that it sends and receives.
            self._ids = all_gather(torch.cat([_ids(batch) for batch, _ in microbatches]), layout)
        self._counts: dict[str, Handle] = {}
        for objective in () if layout.alone else self.of_microbatch:
            counts = [x for microbatch in microbatches if (x := objective.count(*microbatch)) is not None]
            if counts:
                self._counts[objective.name] = all_reduce(torch.stack(counts).sum(0), layout)

    @property
    def sampling(self) -> NegativeSampling:
        """Sampling of negatives, with the ids of all pairs of the global batch."""
        image_id, text_id, _ = self._ids.wait().unbind(1)
        return NegativeSampling(image_id, text_id, self.seed, self.number)

    def reads(self, config: MaskVLMConfig, objectives: Iterable[Objective] | None = None) -> set[str]:
        """Fields of `Streams` that some objectives read, by default all that are computed."""
        return {name for x in (self.computed if objectives is None else objectives) for name in x.reads(config)}

    def start_gather(self, features: Features) -> None:
        """Start to gather the embeddings that objectives compare."""
        for objective in self.of_batch:
            for view in features.views(objective):
                features.gather(*view)

    def exchange(self, features: Features) -> FeatureExchange:
        """Start the exchange of the features of drawn negatives between ranks. Call it under the step's autocast."""
        return FeatureExchange(features.draws, self.sampling, self._ids.wait()[:, 2], features.all_streams, self.layout)

    def shares(self, features: Features) -> Shares:
        """Shares of all losses from this rank's only microbatch, in one autograd graph."""
        # In forward and in backward, embeddings travel while MLM runs, and features of negatives while MIM runs. If the
        # batch is alone, nothing travels.
        first, second, third = (TRANSFERS[:2], (), ()) if self.layout.alone else ((), TRANSFERS[:1], TRANSFERS[1:2])
        found = self.microbatch_shares(features, first)
        self.start_gather(features)
        found |= self.microbatch_shares(features, second) | self.batch_shares(features)
        exchange = self.exchange(features) if self.of_negatives else None
        found |= self.microbatch_shares(features, third)
        if exchange is not None:
            exchange.start(0)
            found |= self.negatives_shares(features.model, exchange.pairs(0, features.streams, *exchange.wait(0)))
        return found | self.microbatch_shares(features, TRANSFERS[2:])

    def microbatch_shares(self, features: Features, beside: Sequence[str] = TRANSFERS) -> Shares:
        """Shares of the losses and accuracies of `MicrobatchObjective`s, from one microbatch.

        beside: take only objectives that run beside one of these transfers (`MicrobatchObjective.beside`).
        """
        found: Shares = {}
        for objective in (x for x in self.of_microbatch if x.beside in beside):
            means, number = objective.means(features), self.layout.ranks * self.layout.microbatches
            if objective.name in self._counts:
                own, total = objective.count(*features.microbatches[0]), self._counts[objective.name].wait()
                assert own is not None
                means = [x * own.to(x.dtype) / total.to(x.dtype) for x in means]
            elif number > 1:
                means = [x / number for x in means]
            found |= objective.named(means)
        return found

    def batch_shares(self, features: Features) -> Shares:
        """Shares of the losses and accuracies of `BatchObjective`s, from all microbatches. ITC draws the negatives."""
        found = [x.named(x.shares(features)) for x in self.of_batch]
        return {name: share for shares in found for name, share in shares.items()}

    def negatives_shares(self, model: MaskVLMNetwork, pairs: PairFeatures) -> Shares:
        """Shares of the losses and accuracies of `NegativesObjective`s, from the pairs of one microbatch."""
        found = [x.named(x.shares(model, self.implementation, pairs)) for x in self.of_negatives]
        return {name: share for shares in found for name, share in shares.items()}

    def total(self, shares: Shares, zero: Tensor) -> Tensor:
        """Weighted sum of the losses that are in `shares`, a scalar. zero: scalar 0 to start from."""
        losses = [(x.weight, shares[x.name]) for x in self.computed if x.name in shares]
        # A factor of 1 would add a product to the graph and change nothing.
        return sum((loss if weight == 1 else weight * loss for weight, loss in losses), zero)

    def losses(self, shares: Shares, zero: Tensor) -> Losses:
        """Losses of the global batch, from shares added up over all ranks and microbatches.

        zero: value for an objective of weight 0.
        """
        reported = [x for x in self.objectives if x.reported]
        found = {x.name: shares.get(x.name, zero) for x in reported} | {"total": self.total(shares, zero)}
        return Losses(found | {name: shares.get(name, zero) for x in reported for name in x.accuracies})


def computed(objectives: Iterable[Objective]) -> list[Objective]:
    """Objectives with a weight above 0, and one that draws negatives, whatever its weight, if another needs them."""
    found = list(objectives)
    drawn = any(isinstance(x, NegativesObjective) and x.weight > 0 for x in found)
    return [x for x in found if x.weight > 0 or (drawn and isinstance(x, BatchObjective) and x.draws)]


def idle_parameters(model: MaskVLMNetwork, objectives: Iterable[Objective]) -> list[nn.Parameter]:
    """Parameters of the model that no objective with a weight above 0 trains."""
    users = computed(objectives)
    if any(user.trains == ANY_PART for user in users):
        return []
    used = {name for user in users for name in (*user.encoders, *user.trains)}
    idle = [p for name, p in model.named_parameters() if name.split(".")[0] not in used]
    masks = "image_encoder" not in used or any("masked_image" in user.reads(model.config) for user in users)
    return idle if masks else [*idle, model.image_encoder.mask_token]


def _ids(batch: Batch) -> Tensor:
    """image_id, text_id and number of tokens of each pair: int64 (b, 3), gathered in one collective."""
    return torch.stack([batch.image_id, batch.text_id, batch.cu_seqlens.diff().long()], dim=1)
