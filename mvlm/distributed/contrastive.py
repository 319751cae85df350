"""ITC and the draw of ITM's negatives over the global batch, the logits a block of rows at a time.

Shape legend: n pairs of this rank, G pairs of the global batch, E contrastive width, Q rows of a block.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mvlm.distributed.collectives import Place, gather_with_gradients
from mvlm.model.patches import gumbel
from mvlm.objectives import losses as objectives

LOGITS = 1 << 22
"""Elements of the logit matrix that exist at a time: 16 MiB in fp32, however many ranks there are."""


class Negatives(NamedTuple):
    """What was drawn for this rank's pairs, by global number. A weight is 0 where nothing admissible was to be had."""

    texts: Tensor
    """int64 (n,), a caption for each image."""
    text_weights: Tensor
    """(n,)."""
    images: Tensor
    """int64 (n,), an image for each caption."""
    image_weights: Tensor
    """(n,)."""


class Draw(NamedTuple):
    """Between which pairs negatives may be drawn, and the noise."""

    image_id: Tensor
    """int64 (G,)."""
    text_id: Tensor
    """int64 (G,)."""
    seed: int
    step: int | Tensor
    local: bool
    """Within a microbatch only."""


def contrast(
    image: Tensor, text: Tensor, log_scale: Tensor, draw: Draw, place: Place, elements: int = LOGITS
) -> tuple[Tensor, Tensor, Negatives]:
    """This rank's shares of ITC and of its accuracy, and its negatives.

    image and text (n, E) are its embeddings of unit length, microbatch after microbatch. It computes the rows of its
    own images against all captions and those of its own captions against all images; the shares of all ranks add up to
    `objectives.contrastive_loss` and `contrastive_hits` of the global batch.
    """
    all_images, all_texts = gather_with_gradients(image, place), gather_with_gradients(text, place)  # (G, E)
    of_images, images_right, texts, text_weights = _rows(image, all_texts, log_scale, draw, place, 0, elements)
    of_texts, texts_right, images, image_weights = _rows(text, all_images, log_scale, draw, place, 1, elements)
    loss, right = ((a + b) / (2 * place.total) for a, b in ((of_images, of_texts), (images_right, texts_right)))
    return loss, right, Negatives(texts, text_weights, images, image_weights)


def _rows(
    own: Tensor, others: Tensor, log_scale: Tensor, draw: Draw, place: Place, stream: int, elements: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of own (n, E) against others (G, E): the summed cross-entropy, how many are nearest to their own partner, and for
    each a drawn column int64 (n,) and weight (n,)."""
    numbers = place.own_numbers(own.device)
    size = max(1, elements // len(others))
    blocks = list(zip(own.split(size), numbers.split(size), strict=True))
    if len(blocks) == 1:
        return _block(own, numbers, others, log_scale, draw, place, stream)
    # Backward computes a block's logits again instead of keeping those of all blocks.
    parts = [
        checkpoint(_block, rows, of, others, log_scale, draw, place, stream, use_reentrant=False) for rows, of in blocks
    ]
    losses, right, columns, weights = zip(*parts, strict=True)  # pyright: ignore[reportArgumentType]
    return torch.stack(losses).sum(), torch.stack(right).sum(), torch.cat(columns), torch.cat(weights)


def _block(
    own: Tensor, numbers: Tensor, others: Tensor, log_scale: Tensor, draw: Draw, place: Place, stream: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same for rows own (Q, E) of the pairs with the global numbers int64 (Q,)."""
    logits = objectives.contrastive_logits(own, others, log_scale)  # (Q, G)
    loss = F.cross_entropy(logits, numbers, reduction="sum")
    columns = torch.arange(len(others), device=own.device)
    same = (draw.image_id[numbers, None] == draw.image_id) | (draw.text_id[numbers, None] == draw.text_id)
    if draw.local:
        same |= numbers[:, None] // place.pairs != columns // place.pairs
    scores = logits.detach() + gumbel(draw.seed, draw.step, stream, numbers, columns)
    drawn = scores.masked_fill(same, float("-inf")).argmax(dim=1)
    return loss, objectives.hits(logits, numbers).sum(), drawn, (~same).any(dim=1).to(logits.dtype)
