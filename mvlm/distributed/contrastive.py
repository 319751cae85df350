"""ITC, and sampling of ITM's hard negatives, over the global batch. Logits are computed in blocks of rows.

Shape legend: n pairs of this rank, G pairs of the global batch, E contrastive width, Q rows of a block.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mvlm.device import compute_dtype
from mvlm.distributed.collectives import Gather, GlobalBatchLayout, InFlight, start_gather
from mvlm.objectives.losses import (
    conditioned_loss,
    contrastive_logits,
    contrastive_sums,
    shared_contrastive_sums,
)
from mvlm.objectives.negatives import Negatives, NegativeSampling

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
    image, text = embeddings.image, embeddings.text
    all_images, all_texts = embeddings.arrive()
    shared = shared_positives
    image_loss, image_correct, texts = _rows(image, all_texts, log_scale, bias, sampling, layout, 0, elements, shared)
    text_loss, text_correct, images = _rows(text, all_images, log_scale, bias, sampling, layout, 1, elements, shared)
    loss, accuracy = (sums / (2 * layout.total) for sums in (image_loss + text_loss, image_correct + text_correct))
    return loss, accuracy, torch.stack([texts, images], dim=1)


def sharded_conditioned_loss(
    similarity: Callable[[Tensor, Tensor], Tensor],
    image: Tensor,
    embeddings: Embeddings,
    log_scale: Tensor,
    layout: GlobalBatchLayout,
    elements: int = MAX_LOGITS,
    bias: Tensor | None = None,
) -> Tensor:
    """Compute this rank's share of `objectives.losses.conditioned_loss`: its own images with all captions.

    Captions travel as embeddings, so features of images never do.

    Args:
        similarity: gives the cosines (Q, G) of features (Q, 1+N, C) and embeddings of captions (G, E).
        image: features (n, 1+N, C) of the own images.
        elements: largest number of values of queries in memory at a time. If that makes several blocks, backward
            computes each again.
    """
    _, texts = embeddings.arrive()
    indices = layout.own_indices(image.device)

    def block(rows: Tensor, of: Tensor) -> Tensor:
        return conditioned_loss(similarity(rows, texts), log_scale, bias, of)

    size = max(1, elements // (len(texts) * image.shape[2]))
    blocks = list(zip(image.split(size), indices.split(size), strict=True))
    if len(blocks) == 1:
        return block(image, indices) / layout.total
    parts = [checkpoint(block, rows, of, use_reentrant=False) for rows, of in blocks]
    return torch.stack(parts).sum() / layout.total  # pyright: ignore[reportArgumentType]


def negatives_of_all(draws: Tensor, sampling: NegativeSampling, layout: GlobalBatchLayout) -> Negatives:
    """Gather the draws int64 (n, 2) of every rank: negatives of all G pairs."""
    texts, images = start_gather(draws.int(), layout).wait().long().unbind(1)
    return sampling.limited(texts, images)


def _rows(
    own: Tensor,
    others: Tensor,
    log_scale: Tensor,
    bias: Tensor | None,
    sampling: NegativeSampling | None,
    layout: GlobalBatchLayout,
    direction: int,
    elements: int,
    shared: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """One direction of ITC: logits of own (n, E) with others (G, E).

    Returns the summed loss, the number of rows nearest to their partner, and a drawn column for each row,
    int64 (n,); without sampling, its own.
    """
    indices = layout.own_indices(own.device)
    size = max(1, elements // len(others))
    blocks = list(zip(own.split(size), indices.split(size), strict=True))
    if len(blocks) == 1:
        return _block(own, indices, others, log_scale, bias, sampling, direction, shared)
    # Backward computes a block's logits again. Kept ones would make n x G elements, which grows with the ranks.
    parts = [
        checkpoint(_block, rows, of, others, log_scale, bias, sampling, direction, shared, use_reentrant=False)
        for rows, of in blocks
    ]
    losses, correct, columns = zip(*parts, strict=True)  # pyright: ignore[reportArgumentType]
    return torch.stack(losses).sum(), torch.stack(correct).sum(), torch.cat(columns)


def _block(
    own: Tensor,
    indices: Tensor,
    others: Tensor,
    log_scale: Tensor,
    bias: Tensor | None,
    sampling: NegativeSampling | None,
    direction: int,
    shared: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`_rows` for one block of rows own (Q, E), whose global indices are int64 (Q,)."""
    logits = contrastive_logits(own, others, log_scale)  # (Q, G)
    if shared and sampling is not None:
        sums = shared_contrastive_sums(logits, sampling.matches(indices))
    else:
        sums = contrastive_sums(logits, indices, bias)
    # The draw last: backward computes the block again only as far as the loss.
    return *sums, indices if sampling is None else sampling.draw(logits, indices, direction)
