"""ITC and the draw of ITM's negatives over the global batch, with the logits one block of rows at a time.

Shape legend: n pairs of this rank, G pairs of the global batch, E contrastive width, Q rows of a block.
"""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mvlm.distributed.collectives import GlobalBatchLayout, gather_rows_with_gradient
from mvlm.objectives.losses import contrastive_logits, contrastive_sums
from mvlm.objectives.negatives import Negatives, NegativeSampling

LOGITS = 1 << 22
"""Elements of the logit matrix that exist at a time: 16 MiB in fp32, for any number of ranks."""


def sharded_contrastive_loss(
    image: Tensor,
    text: Tensor,
    log_scale: Tensor,
    sampling: NegativeSampling,
    layout: GlobalBatchLayout,
    elements: int = LOGITS,
) -> tuple[Tensor, Tensor, Negatives]:
    """This rank's shares of ITC and of its accuracy, and the negatives of its pairs.

    image and text (n, E) are this rank's embeddings of unit length, microbatch after microbatch. The rank computes the
    rows of its own images against all captions, and those of its own captions against all images. The shares of all
    ranks add up to `objectives.losses.contrastive_loss` of the global batch.
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
    stream: int,
    elements: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One direction, for own (n, E) against others (G, E).

    Returns the summed cross-entropy, the number of rows nearest to their partner, and for each row a drawn column int64
    (n,) and its weight (n,).
    """
    numbers = layout.own_numbers(own.device)
    size = max(1, elements // len(others))
    blocks = list(zip(own.split(size), numbers.split(size), strict=True))
    if len(blocks) == 1:
        return _block(own, numbers, others, log_scale, sampling, stream)
    # Backward recomputes a block's logits, so that those of one block exist at a time.
    parts = [
        checkpoint(_block, rows, of, others, log_scale, sampling, stream, use_reentrant=False) for rows, of in blocks
    ]
    losses, correct, columns, weights = zip(*parts, strict=True)  # pyright: ignore[reportArgumentType]
    return torch.stack(losses).sum(), torch.stack(correct).sum(), torch.cat(columns), torch.cat(weights)


def _block(
    own: Tensor, numbers: Tensor, others: Tensor, log_scale: Tensor, sampling: NegativeSampling, stream: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`_rows` for the rows own (Q, E) of the pairs with the global numbers int64 (Q,)."""
    logits = contrastive_logits(own, others, log_scale)  # (Q, G)
    return *contrastive_sums(logits, numbers), *sampling.draw(logits, numbers, stream)
