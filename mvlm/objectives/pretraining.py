"""The objectives of pretraining: MLM, MIM, ITC and ITM, the distance of --keep-start, and a user's own loss.

A further objective of pretraining has a file of its own in this folder, and a place in `OBJECTIVES`.

Shape legend: B pairs, G pairs of the global batch, Q rows of a block.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mvlm.config.groups import ObjectiveSettings
from mvlm.config.model import MaskVLMConfig
from mvlm.distributed.collectives import GlobalBatchLayout, all_reduce
from mvlm.distributed.exchange import PairFeatures
from mvlm.model.implementation import MASKED, Implementation
from mvlm.model.network import MaskVLMNetwork
from mvlm.objectives.losses import contrastive_sums, matching_loss, number_of_masked_tokens, shared_contrastive_sums
from mvlm.objectives.step import (
    ANY_PART,
    BatchObjective,
    Embeddings,
    Features,
    MicrobatchObjective,
    NegativesObjective,
    Objective,
)
from mvlm_dataloading import Batch, Masks
from mvlm_kernels import ContrastiveTerms, contrastive_terms


@dataclass(frozen=True)
class MLM(MicrobatchObjective):
    """Masked language modelling: mean cross-entropy over masked tokens.

    Accuracy: the share of these tokens that have the largest logit.
    """

    name, accuracies, curve = "mlm", ("mlm_accuracy",), "MLM, nats per masked token"
    rebuilds, trains = "masked_text", ("text_cross", "language_head")

    def count(self, batch: Batch, masks: Masks | None) -> Tensor:
        assert masks is not None
        # Microbatches have different numbers of masked tokens: the mean of their means is not the loss of the batch.
        return number_of_masked_tokens(batch, masks)

    def means(self, features: Features) -> Sequence[Tensor]:
        return features.step.implementation.language_loss(features.model, features.streams, *features.microbatches[0])


@dataclass(frozen=True)
class MIM(MicrobatchObjective):
    """Masked image modelling: mean error over masked pixels, absolute or squared, as the model is configured."""

    name, curve, beside = "mim", "MIM, L1 of masked pixels", "features"
    rebuilds, trains = "masked_image", ("image_cross", "image_decoder", "pixel_head")

    def means(self, features: Features) -> Sequence[Tensor]:
        return (features.step.implementation.image_loss(features.model, features.streams, *features.microbatches[0]),)


@dataclass(frozen=True)
class ITC(BatchObjective):
    """Image-text contrast: mean contrastive loss of both directions, InfoNCE or the sigmoid loss, as configured.

    Accuracy: the share of images and captions whose true partner is the nearest in the batch. The loss with masked
    captions, if it is configured, counts as much as the other. ITM's negatives are drawn from the logits.
    """

    name, accuracies, curve, draws = "itc", ("itc_accuracy",), "ITC, nats", True
    trains = (*BatchObjective.trains, "log_scale", "logit_bias")
    shared_positives: bool = False
    """Take all pairs with the same image or caption text as right answers, which share the target (ALBEF)."""

    def views(self, config: MaskVLMConfig) -> Sequence[tuple[str, str]]:
        return [("image", "text"), ("image", "masked_text")][: 1 + config.contrast_masked]

    def shares(self, features: Features) -> Sequence[Tensor]:
        (loss, accuracy), *others = (self._shares(features, *view) for view in features.views(self))
        for masked, _ in others:
            loss = (loss + masked) / 2
        return loss, accuracy

    def _shares(self, features: Features, image: str, text: str) -> tuple[Tensor, Tensor]:
        draw, layout = bool(features.step.of_negatives) and text == "text", features.step.layout
        if features.in_blocks:
            return self._shares_of_blocks(features, image, text, draw)
        sampling, bias = features.step.sampling, features.model.logit_bias

        def sums(direction: int, rows: Tensor, logits: Tensor) -> list[Tensor]:
            if self.shared_positives:
                found = shared_contrastive_sums(logits, sampling.matches(rows))
            else:
                found = contrastive_sums(logits, rows, bias)
            # The draw last: backward computes a block again only as far as the loss.
            return [*found, sampling.draw(logits, rows, direction)] if draw else [*found]

        both = features.sum_over_logits(sums, (features.gather(image, text), features.model.log_scale))
        (image_loss, image_correct, *texts), (text_loss, text_correct, *images) = both
        if draw:
            features.draws = torch.stack([*texts, *images], dim=1)
        total = 2 * layout.total
        return (image_loss + text_loss) / total, (image_correct + text_correct) / total

    def _shares_of_blocks(self, features: Features, image: str, text: str, draw: bool) -> tuple[Tensor, Tensor]:
        """Share of the loss and of the accuracy, by `contrastive_terms`, for logits that come in several blocks.

        It computes each block once in forward and once in backward, for both directions. `_shares` would do so for each
        direction. It rounds differently, so smaller batches keep `_shares`.

        Args:
            image, text: names of the streams that are compared.
            draw: also draw ITM's negatives.
        """
        layout, sampling, model = features.step.layout, features.step.sampling, features.model
        own, bias = features.gather(image, text), None if self.shared_positives else model.logit_bias
        rows = layout.own_indices(own.image.device)
        terms = contrastive_terms(
            own.image, own.captions(), model.log_scale, bias=bias, rows=rows, image_id=sampling.image_id,
            text_id=sampling.text_id, shared_positives=self.shared_positives,
            noise_keys=sampling.noise_keys() if draw else None,
        )  # fmt: skip
        (top, best), drawn = _columns_of_all_ranks(terms, layout)
        if draw:
            features.draws = torch.stack([terms.drawn, drawn[rows]], dim=1)
        # Every rank has all columns, and counts 1 / W of them as its share.
        row_top, row_best = terms.row_best
        correct = (row_best >= row_top).to(top.dtype).sum() + (best >= top).to(top.dtype).sum() / layout.ranks
        if bias is not None:
            return terms.rows.sum() / layout.total, correct / (2 * layout.total)
        sums = features.global_sum((terms.columns - top).exp())
        columns = (sums.log() + top).sum() / layout.ranks
        return (terms.rows.sum() + columns) / (2 * layout.total), correct / (2 * layout.total)


def _columns_of_all_ranks(terms: ContrastiveTerms, layout: GlobalBatchLayout) -> tuple[Tensor, Tensor]:
    """Combine what each rank knows of the columns of ITC's logits, of which it has some rows.

    Returns float (2, G): the largest logit of each column, and the largest of its right pairs; and int64 (G,): the row
    that the column draws as a negative, of equal scores the first.
    """
    largest = all_reduce(torch.cat([terms.column_best, terms.column_score[None]]), layout, "max").wait()
    of_largest = torch.where(terms.column_score == largest[2], terms.column_drawn, layout.total)
    return largest[:2], all_reduce(of_largest, layout, "min").wait()


@dataclass(frozen=True)
class ITM(NegativesObjective):
    """Image-text matching: mean cross-entropy of match or not, over each true pair and two drawn ones. It needs ITC.

    Accuracy: the share of pairs that are classified correctly.
    """

    name, accuracies, curve = "itm", ("itm_accuracy",), "ITM, nats"
    trains = ("image_cross", "text_cross", "matching_head")

    def shares(self, model: MaskVLMNetwork, implementation: Implementation, pairs: PairFeatures) -> Sequence[Tensor]:
        images, texts, labels, weights = pairs.pairs
        fused = implementation.fuse_pairs(model, pairs.image, pairs.text, images, texts, pairs.caches, pairs.max_rows)
        loss, accuracy = matching_loss(model.matching_logits(*fused), labels, weights)
        if pairs.share is None:
            return loss, accuracy
        # `matching_loss` divides by the weights of these pairs; the share divides by those of the global batch.
        share = pairs.share.to(loss.dtype)
        return loss * share, accuracy * share


@dataclass(frozen=True, kw_only=True, eq=False)
class KeepStart(BatchObjective):
    """Distance of a model's contrastive embeddings from those of its initial model, which is frozen (--keep-start).

    It is the KL divergence of ITC's probabilities from the initial model's, each at its own temperature, and the
    squared distance of embeddings: means over the batch, and of both directions and both modalities.
    """

    name, reported = "kept", False
    trains = (*BatchObjective.trains, "log_scale")
    start: MaskVLMNetwork

    def shares(self, features: Features) -> Sequence[Tensor]:
        own, start = features.gather(), Embeddings(*self._embed(features), features.step.layout)

        def divergence(_: int, __: Tensor, logits: Tensor, wanted: Tensor) -> list[Tensor]:
            return [F.kl_div(logits.log_softmax(1), wanted.log_softmax(1), reduction="sum", log_target=True)]

        compared = (own, features.model.log_scale), (start, self.start.log_scale)
        (images,), (texts,) = features.sum_over_logits(divergence, *compared)
        modalities = (own.image, start.image), (own.text, start.text)
        sums = images, texts, *((x - of).square().sum(1).sum() for x, of in modalities)
        first, *others = (x / features.step.layout.total for x in sums)
        return (sum(others, first) / 2,)

    @torch.no_grad()
    def _embed(self, features: Features) -> tuple[Tensor, Tensor]:
        found = [features.step.implementation.encode_unmasked(self.start, batch) for batch, _ in features.microbatches]
        images = [self.start.embed_image(image) for image, _ in found]
        return torch.cat(images), torch.cat([self.start.embed_text(text.first()) for _, text in found])


@dataclass(frozen=True, kw_only=True)
class OwnLoss(MicrobatchObjective):
    """Objective of a user's function of `Features`, which returns a scalar; the mean over microbatches.

    It may read all four streams, and train any part of the network.
    """

    name, beside, curve, trains = "own", "nothing", "own loss", ANY_PART
    function: Callable[[Features], Tensor]

    def reads(self, config: MaskVLMConfig) -> Sequence[str]:
        return MASKED

    def means(self, features: Features) -> Sequence[Tensor]:
        return (self.function(features),)


OBJECTIVES: tuple[type[Objective], ...] = (MLM, MIM, ITC, ITM)
"""Objectives whose weight is a setting."""
ALL: tuple[Objective, ...] = (MLM(), MIM(), ITC(), ITM())
"""The paper's four objectives, each of weight 1."""


def objectives_of(config: ObjectiveSettings) -> tuple[Objective, ...]:
    """Objectives of a run with its weights. One that is off by default and has weight 0 is left out."""
    found = [kind(config.objective_weights[kind.name]) for kind in OBJECTIVES]
    return tuple(x for x in found if x.weight or getattr(ObjectiveSettings, f"{x.name}_weight"))
