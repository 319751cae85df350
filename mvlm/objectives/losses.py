"""The four objectives, each a function of tensors. Formulas: MaskVLM (ICLR 2023) equations 1 to 3, docs/method.md.

Shape legend: B pairs, G pairs of the global batch, M masked tokens, K masked patches, V vocabulary, E embedding width.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Losses(NamedTuple):
    """Scalars, fp32 or float64. `total` is the unweighted sum of the four losses; accuracies have no gradient."""

    mlm: Tensor
    mim: Tensor
    itc: Tensor
    itm: Tensor
    total: Tensor
    mlm_accuracy: Tensor
    """Share of masked tokens for which the true token has the largest logit."""
    itc_accuracy: Tensor
    """Share of images and captions of the batch whose true partner is nearest; the mean of both directions."""
    itm_accuracy: Tensor
    """Share of ITM's pairs that are classified rightly."""


def at_least_float32(x: Tensor) -> Tensor:
    """Losses are computed in fp32 under autocast, and in float64 where the model is float64."""
    return x if x.dtype == torch.float64 else x.float()


@torch.no_grad()
def correct_top1(logits: Tensor, targets: Tensor) -> Tensor:
    """1 where the target's logit is the largest of its row, else 0. logits (R, V), targets int64 (R,) -> (R,)."""
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


def contrastive_sums(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """One direction of InfoNCE over a block of rows: summed cross-entropy, and number of rows with the target on top.

    logits (Q, G), targets int64 (Q,). Two scalars.
    """
    return F.cross_entropy(logits, targets, reduction="sum"), correct_top1(logits, targets).sum()


def contrastive_loss(logits: Tensor) -> tuple[Tensor, Tensor]:
    """InfoNCE and its accuracy, means of both directions. logits (B, B), rows images, columns captions.

    The accuracy is the share of rows and columns whose largest logit is on the diagonal. Two scalars.
    """
    target = torch.arange(len(logits), device=logits.device)
    sums = zip(contrastive_sums(logits, target), contrastive_sums(logits.T, target), strict=True)
    loss, accuracy = ((rows + columns) / (2 * len(logits)) for rows, columns in sums)
    return loss, accuracy


def matching_loss(logits: Tensor, labels: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted mean cross-entropy, and the weighted share of pairs judged rightly.

    logits (R, 2), labels int64 (R,), 1 = match; weights (R,), not all zero. Two scalars.
    """
    losses = F.cross_entropy(at_least_float32(logits), labels, reduction="none")
    correct = correct_top1(logits, labels)
    return (losses * weights).sum() / weights.sum(), (correct * weights).sum() / weights.sum()
