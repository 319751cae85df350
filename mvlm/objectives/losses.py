"""Losses as functions of tensors, and the masked tokens of MLM.

Formulas: MaskVLM (ICLR 2023), equations 1 to 3, and docs/explain/method.md.

Shape legend: B pairs, G pairs of the global batch, Q rows of a block, R pairs of ITM, M masked tokens,
K masked patches, V vocabulary, E contrastive width, P patch side.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mvlm_dataloading import Batch, Masks
from mvlm_kernels.dispatch import without_autocast


class Losses(dict[str, Tensor]):
    """Losses and accuracies of one batch by name: scalars, fp32 or float64. `losses.mlm` is `losses["mlm"]`.

    `total` is the sum of the losses, each times its weight. Accuracies have no gradient.
    """

    def __getattr__(self, name: str) -> Tensor:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"{name}: wanted one of {', '.join(self)}") from None

    def detach(self) -> "Losses":
        """Copy of the losses without gradient."""
        return Losses({name: x.detach() for name, x in self.items()})


def at_least_float32(x: Tensor) -> Tensor:
    """Convert to the dtype of losses: fp32, or float64 for float64."""
    return x if x.dtype == torch.float64 else x.float()


@torch.no_grad()
def correct_top1(logits: Tensor, targets: Tensor) -> Tensor:
    """1 for each row whose target has the largest logit, else 0. logits (R, V), targets int64 (R,) -> (R,).

    A target that ties with the largest counts as correct.
    """
    own = logits.gather(1, targets[:, None]).squeeze(1)
    return (own >= logits.amax(1)).to(at_least_float32(logits).dtype)


def masked_language_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """MLM: mean cross-entropy over masked tokens. logits (M, V), targets int64 (M,)."""
    return F.cross_entropy(at_least_float32(logits), targets)


def masked_image_loss(pred: Tensor, target: Tensor, kind: Literal["l1", "mse"] = "l1") -> Tensor:
    """MIM: mean absolute or squared error over masked pixels. pred and target (B, K, 3*P*P), in normalised pixels."""
    return pixel_errors(pred, target, kind).mean()


def pixel_errors(pred: Tensor, target: Tensor, kind: Literal["l1", "mse"]) -> Tensor:
    """Absolute or squared errors in float32 (float64), of the shape of pred and target."""
    difference = at_least_float32(pred) - target
    return difference.abs() if kind == "l1" else difference.square()


def patch_statistics(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each patch, (..., 1) each, from its values (..., 3*P*P).

    The deviation is MAE's (He et al., 2022): sqrt(variance + 1e-6), of the unbiased variance.
    """
    variance, mean = torch.var_mean(pixels, dim=-1, keepdim=True)
    return mean, (variance + 1e-6).sqrt()


def weighted_mean(x: Tensor, weights: Tensor) -> Tensor:
    """Mean of x weighted by weights, of one shape: a scalar."""
    weights = weights.to(x.dtype)
    return (x * weights).sum() / weights.sum()


def contrastive_logits(image: Tensor, text: Tensor, log_scale: Tensor | None) -> Tensor:
    """Cosine similarity divided by temperature: image (B, E) and text (G, E) of unit length -> (B, G).

    log_scale (1,) is the logarithm of 1 / temperature; None for a temperature of 1. The logits are float32 (float64)
    under autocast too.
    """
    # Autocast would round cosines to 8 bits, which at a temperature of 0.02 moves logits by 0.1 and makes equal ones.
    with without_autocast(image.device):
        cosines = at_least_float32(image) @ at_least_float32(text).T
        return cosines if log_scale is None else cosines * log_scale.exp()


def contrastive_sums(logits: Tensor, targets: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Sums of one direction of ITC over a block of rows: loss, and number of correct rows. Two scalars.

    The sums of both directions, divided by twice the number of pairs, are `contrastive_loss`.

    Args:
        logits: (Q, G).
        targets: int64 (Q,), column of each row's true partner.
        bias: (1,), for the sigmoid loss; None for InfoNCE.
    """
    # The loss first: where backward computes a block again, it ends with the last tensor that backward reads.
    if bias is None:
        loss = F.cross_entropy(logits, targets, reduction="sum")
    else:
        logits = logits + bias
        # -log sigmoid(-z) for all pairs. For a true pair it is -log sigmoid(z), which is less by z.
        loss = -F.logsigmoid(-logits).sum() - logits.gather(1, targets[:, None]).sum()
    return loss, correct_top1(logits, targets).sum()


def shared_contrastive_sums(logits: Tensor, positives: Tensor) -> tuple[Tensor, Tensor]:
    """`contrastive_sums` for rows with several right answers, which share the target's mass equally (ALBEF).

    logits (Q, G); positives bool (Q, G), True = column j is a right answer of row i, at least one in each row. A row is
    correct if the largest logit is that of a right answer. Returns two scalars.
    """
    logits = at_least_float32(logits)
    mean = (logits * positives).sum(1) / positives.sum(1)
    best = logits.detach().masked_fill(~positives, float("-inf")).amax(1)
    return (logits.logsumexp(1) - mean).sum(), (best >= logits.detach().amax(1)).to(logits.dtype).sum()


def contrastive_loss(logits: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """ITC and its accuracy. logits (B, B), rows images, columns captions. Returns two scalars.

    Without a bias: InfoNCE, the mean of both directions. With a bias (1,): the sigmoid loss of SigLIP (Zhai et al.,
    2023), sum over all pairs of -log sigmoid(z (logit + bias)), divided by B; z = 1 on the diagonal, else
    -1.

    The accuracy is the share of rows and columns whose largest logit is on the diagonal.
    """
    target = torch.arange(len(logits), device=logits.device)
    sums = zip(contrastive_sums(logits, target, bias), contrastive_sums(logits.T, target, bias), strict=True)
    loss, accuracy = ((rows + columns) / (2 * len(logits)) for rows, columns in sums)
    return loss, accuracy


def matching_loss(logits: Tensor, labels: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """ITM: weighted mean cross-entropy, and the weighted share of correctly classified pairs.

    logits (R, 2), labels int64 (R,), 1 = match; weights (R,), not all zero. Returns two scalars.
    """
    losses = F.cross_entropy(at_least_float32(logits), labels, reduction="none")
    correct = correct_top1(logits, labels)
    return weighted_mean(losses, weights), weighted_mean(correct, weights)


def masked_targets(batch: Batch, masks: Masks) -> Tensor:
    """True tokens int64 (M,) of the captions' masked tokens; -100 for a padding position."""
    ids = masks.token_ids
    # Padding positions (see `mvlm.model.packing.pad_to_bucket`) point past the last caption and are ignored.
    return batch.tokens.index_select(0, ids).masked_fill(ids >= batch.cu_seqlens[-1], -100)


def number_of_masked_tokens(batch: Batch, masks: Masks) -> Tensor:
    """Number of the captions' masked tokens, a float64 scalar. Padding positions are not counted."""
    return (masks.token_ids < batch.cu_seqlens[-1]).double().sum()
