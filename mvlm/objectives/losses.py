"""The four objectives, each a function of tensors. Formulas: MaskVLM (ICLR 2023) equations 1 to 3, docs/method.md.

Shape legend: B pairs, G pairs of the global batch, M masked tokens, K masked patches, V vocabulary, E embedding width.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mvlm.model.patches import gumbel


class Losses(NamedTuple):
    """Scalars, fp32 or float64. `total` is the unweighted sum of the four losses; accuracies have no gradient."""

    mlm: Tensor
    mim: Tensor
    itc: Tensor
    itm: Tensor
    total: Tensor
    mlm_accuracy: Tensor
    """Share of masked tokens whose own word has the largest logit."""
    itc_accuracy: Tensor
    """Share of images and captions of the batch whose own partner is nearest; the mean of both directions."""
    itm_accuracy: Tensor
    """Share of ITM's pairs that are rightly told to match or not."""


def at_least_float32(x: Tensor) -> Tensor:
    """Losses are computed in fp32 under autocast, and in float64 where the model is float64."""
    return x if x.dtype == torch.float64 else x.float()


@torch.no_grad()
def hits(logits: Tensor, targets: Tensor) -> Tensor:
    """Whether the target's logit is the largest of its row, 1 or 0. logits (R, V), targets int64 (R,) -> (R,)."""
    own = logits.gather(1, targets[:, None]).squeeze(1)
    return (own >= logits.amax(1)).to(at_least_float32(logits).dtype)


def masked_language_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy over masked tokens. logits (M, V), targets int64 (M,)."""
    return F.cross_entropy(at_least_float32(logits), targets)


def masked_image_loss(pred: Tensor, target: Tensor) -> Tensor:
    """Mean absolute error over masked pixels. pred and target (B, K, 3*P*P), in normalised pixels."""
    return (at_least_float32(pred) - target).abs().mean()


def contrastive_logits(image: Tensor, text: Tensor, log_scale: Tensor) -> Tensor:
    """Cosine similarity over temperature: image (B, E) and text (G, E) of unit length -> (B, G)."""
    return at_least_float32(image) @ at_least_float32(text).T * log_scale.exp()


def contrastive_loss(logits: Tensor) -> Tensor:
    """InfoNCE, the mean of both directions. logits (B, B), rows images, columns texts, pairs on the diagonal."""
    target = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def contrastive_hits(logits: Tensor) -> Tensor:
    """Share of rows and columns whose largest logit is on the diagonal, a scalar. logits (B, B) as above."""
    target = torch.arange(len(logits), device=logits.device)
    return (hits(logits, target) + hits(logits.T, target)).mean() / 2


def admissible_negatives(image_id: Tensor, text_id: Tensor) -> Tensor:
    """bool (B, B), True where image i and text j may be shown as a mismatch.

    Never where they share the picture or the caption's words: such a pair is a true match. Ids int64 (B,).
    """
    same_image = image_id[:, None] == image_id[None, :]
    same_text = text_id[:, None] == text_id[None, :]
    return ~(same_image | same_text)


def draw_negatives(
    logits: Tensor, admissible: Tensor, seed: int, step: int | Tensor, stream: int
) -> tuple[Tensor, Tensor]:
    """One column a row, drawn with probability softmax(logits) among the admissible ones (Gumbel-argmax).

    logits (B, B), admissible bool (B, B). Returns the columns int64 (B,) and weights (B,): 1, or 0 where a row has no
    admissible column and the drawn one means nothing. `stream` keeps the draws of the two directions apart.
    """
    index = torch.arange(len(logits), device=logits.device)
    scores = logits.detach() + gumbel(seed, step, stream, index, index)
    columns = scores.masked_fill(~admissible, float("-inf")).argmax(dim=1)
    return columns, admissible.any(dim=1).to(logits.dtype)


class MatchingPairs(NamedTuple):
    """What ITM is shown, three pairs a row: its own; its image with a drawn text; a drawn image with its text."""

    images: Tensor
    """int64 (3B,), rows of the image features."""
    texts: Tensor
    """int64 (3B,), captions."""
    labels: Tensor
    """int64 (3B,), 1 = match."""
    weights: Tensor
    """(3B,), 0 where there was no admissible negative to draw."""


def matching_pairs(logits: Tensor, image_id: Tensor, text_id: Tensor, seed: int, step: int | Tensor) -> MatchingPairs:
    """Draw ITM's negatives from the contrastive logits (B, B). Ids int64 (B,)."""
    admissible = admissible_negatives(image_id, text_id)
    text_index, text_weight = draw_negatives(logits, admissible, seed, step, stream=0)
    image_index, image_weight = draw_negatives(logits.T, admissible.T, seed, step, stream=1)
    own = torch.arange(len(logits), device=logits.device)
    return MatchingPairs(
        torch.cat([own, own, image_index]),
        torch.cat([own, text_index, own]),
        torch.cat([torch.ones_like(own), torch.zeros_like(own), torch.zeros_like(own)]),
        torch.cat([torch.ones_like(text_weight), text_weight, image_weight]),
    )


def matching_loss(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean cross-entropy. logits (R, 2), labels int64 (R,), 1 = match; weights (R,), not all zero."""
    losses = F.cross_entropy(at_least_float32(logits), labels, reduction="none")
    return (losses * weights).sum() / weights.sum()


def matching_hits(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Weighted share of pairs judged rightly, a scalar; arguments as above."""
    return (hits(logits, labels) * weights).sum() / weights.sum()
