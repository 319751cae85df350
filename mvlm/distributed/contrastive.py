"""ITC, and sampling of ITM's hard negatives, over the global batch. Logits are computed in blocks of rows.

Shape legend: n pairs of this rank, G pairs of the global batch, E contrastive width, Q rows of a block.
"""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mvlm.distributed.collectives import GlobalBatchLayout, gather_rows_with_gradient
from mvlm.objectives.losses import contrastive_logits, contrastive_sums
from mvlm.objectives.negatives import Negatives, NegativeSampling

MAX_LOGITS = 1 << 22
"""Most elements of the logit matrix in memory at a time: 16 MiB in fp32, for any number of ranks."""


def sharded_contrastive_loss(
    image: Tensor,
    text: Tensor,
    log_scale: Tensor,
    sampling: NegativeSampling,
    layout: GlobalBatchLayout,
    elements: int = MAX_LOGITS,
) -> tuple[Tensor, Tensor, Negatives]:
    """Compute this rank's shares of ITC and of its accuracy, and draw negatives for its pairs.

    image and text (n, E) are this rank's embeddings of unit length, in the order of its microbatches. The rank computes
    the logits of its own images with all captions, and of its own captions with all images. The shares of all ranks add
    up to `objectives.losses.contrastive_loss` of the global batch.

    Args:
        elements: most logits in memory at a time.
    """
    all_images = gather_rows_with_gradient(image, layout)  # (G, E)
    all_texts = gather_rows_with_gradient(text, layout)
    image_loss, image_correct, *texts = _rows(image, all_texts, log_scale, sampling, layout, 0, elements)
    text_loss, text_correct, *images = _rows(text, all_images, log_scale, sampling, layout, 1, elements)
    loss, accuracy = (sums / (2 * layout.total) for sums in (image_loss + text_loss, image_correct + text_correct))
    return loss, accuracy, Negatives(*texts, *images)


def _rows(
    own: Tensor,
    others: Tensor,
    log_scale: Tensor,
    sampling: NegativeSampling,
    layout: GlobalBatchLayout,
    direction: int,
    elements: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One direction of ITC: logits of own (n, E) with others (G, E).

    Returns the summed cross-entropy, the number of rows nearest to their partner, and for each row a drawn column int64
    (n,) and its weight (n,).
    """
    indices = layout.own_indices(own.device)
    size = max(1, elements // len(others))
    blocks = list(zip(own.split(size), indices.split(size), strict=True))
    if len(blocks) == 1:
        return _block(own, indices, others, log_scale, sampling, direction)
    # Backward computes a block's logits again. Kept ones would make n x G elements, which grows with the ranks.
    parts = [
        checkpoint(_block, rows, of, others, log_scale, sampling, direction, use_reentrant=False) for rows, of in blocks
    ]
    losses, correct, columns, weights = zip(*parts, strict=True)  # pyright: ignore[reportArgumentType]
    return torch.stack(losses).sum(), torch.stack(correct).sum(), torch.cat(columns), torch.cat(weights)


def _block(
    own: Tensor, indices: Tensor, others: Tensor, log_scale: Tensor, sampling: NegativeSampling, direction: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`_rows` for one block of rows own (Q, E), whose global indices are int64 (Q,)."""
    logits = contrastive_logits(own, others, log_scale)  # (Q, G)
    return *contrastive_sums(logits, indices), *sampling.draw(logits, indices, direction)
