"""Hard negatives for ITM, drawn from the contrastive logits.

ITC draws them (`mvlm.objectives.pretraining`), from the pairs of all ranks and microbatches.

Shape legend: G pairs of the batch that negatives are drawn from, Q of them in a block of rows, n pairs of this rank,
R rows, C columns.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from mvlm_kernels.contrastive_loss.noise import gumbel_noise, noise_key


def gumbel(seed: int, step: int | Tensor, direction: int, rows: Tensor, columns: Tensor) -> Tensor:
    """Standard Gumbel noise float32 (R, C) for the pairs of rows int64 (R,) and columns int64 (C,).

    The noise is a hash of the arguments, without generator state. The noise of a pair therefore does not depend on the
    ranks that the batch is split over. `direction` is 0 or 1, as in `NegativeSampling.draw`. A `step` on the device, an
    int64 scalar, gives the same noise as the number; a CUDA graph needs that form.
    """
    return gumbel_noise(noise_key(seed, step, direction, rows.device), rows[:, None], columns)


MAX_PAIRS_PER_NEGATIVE = 32
"""Largest number of pairs that have one image, or one caption, as their negative in a step.

Without a limit all pairs of the global batch could have the same image, and the rank that has it would send it to every
rank. With equal logits at most 9 of 131,072 pairs draw one image. The limit is the same for any number of ranks.
"""


def limit_pairs_per_negative(columns: Tensor, most: int = MAX_PAIRS_PER_NEGATIVE) -> Tensor:
    """Limit how many pairs have the same negative. columns int64 (G,): the column that each of rows 0 to G - 1 drew.

    Of the rows that drew a column, the first `most` keep it. Each of the others gets its own index, which stands for no
    negative (`drawn_weights`). The order of rows is the loader's random order, so none is preferred. Returns the
    columns, int64 (G,).
    """
    if len(columns) <= most:
        return columns
    rows = torch.arange(len(columns), device=columns.device)
    drawn, order = columns.masked_fill(columns == rows, len(columns)).sort(stable=True)
    number = rows - torch.searchsorted(drawn, drawn)  # number of each row among those that drew its column
    kept = torch.empty_like(columns, dtype=torch.bool).scatter(0, order, number < most)
    return torch.where(kept, columns, rows)


def drawn_weights(columns: Tensor, rows: Tensor) -> Tensor:
    """Weights of drawn negatives, float32 (Q,): 0 for a row whose column is its own index, which stands for none, or 1.

    columns, rows: int64 (Q,), the column that each row drew, and the index of the row.
    """
    return (columns != rows).float()


class Negatives(NamedTuple):
    """A drawn caption for each image, and a drawn image for each caption.

    Weight 0 means that a pair has no negative: none was admissible, or too many pairs had drawn the same
    (`limit_pairs_per_negative`). The pair's own index then stands in its place.
    """

    texts: Tensor
    """int64 (n,), drawn captions, as columns of the logits."""
    text_weights: Tensor
    """float32 (n,), 1, or 0 for an image without a drawn caption."""
    images: Tensor
    """int64 (n,), drawn images, as columns of the transposed logits."""
    image_weights: Tensor
    """float32 (n,), 1, or 0 for a caption without a drawn image."""


class NegativeSampling(NamedTuple):
    """Sampling of negatives among G pairs: ids of their images and captions, and the seed and the step of the noise."""

    image_id: Tensor
    """int64 (G,), equal for pairs with the same image."""
    text_id: Tensor
    """int64 (G,), equal for pairs with the same caption text."""
    seed: int
    step: int | Tensor

    def matches(self, rows: Tensor) -> Tensor:
        """True matches of the pairs rows int64 (Q,): bool (Q, G), True = pair j shares the image or the caption text
        of row i. Each pair matches itself."""
        return (self.image_id[rows, None] == self.image_id) | (self.text_id[rows, None] == self.text_id)

    def draw(self, logits: Tensor, rows: Tensor, direction: int) -> Tensor:
        """Draw one column per row, with probability softmax(logits) over the admissible ones (Gumbel-argmax).

        logits (Q, G) of the pairs rows int64 (Q,). `direction` is 0 if rows are images and 1 if rows are captions, so
        that the two draws are independent. Returns the columns int64 (Q,); a row without an admissible column gets its
        own index.
        """
        columns = torch.arange(logits.shape[1], device=logits.device)
        admissible = ~self.matches(rows)  # (Q, G), True = column j is a mismatch for row i
        scores = logits.detach() + gumbel(self.seed, self.step, direction, rows, columns)
        drawn = scores.masked_fill(~admissible, float("-inf")).argmax(dim=1)
        return torch.where(admissible.any(dim=1), drawn, rows)

    def noise_keys(self) -> Tensor:
        """Keys of the Gumbel noise of both directions, int64 (2,), for `mvlm_kernels.contrastive_terms`."""
        return torch.stack([noise_key(self.seed, self.step, direction, self.image_id.device) for direction in (0, 1)])

    def limited(self, texts: Tensor, images: Tensor) -> Negatives:
        """Negatives of all G pairs, at most `MAX_PAIRS_PER_NEGATIVE` pairs with the same one.

        texts, images: int64 (G,), the caption that each image drew, and the image that each caption drew.
        """
        texts, images = limit_pairs_per_negative(texts), limit_pairs_per_negative(images)
        rows = torch.arange(len(texts), device=texts.device)
        return Negatives(texts, drawn_weights(texts, rows), images, drawn_weights(images, rows))

    def draw_both(self, logits: Tensor) -> Negatives:
        """Draw negatives in both directions from the logits (G, G), rows images, columns captions."""
        rows = torch.arange(len(logits), device=logits.device)
        return self.limited(self.draw(logits, rows, direction=0), self.draw(logits.T, rows, direction=1))


class MatchingPairs(NamedTuple):
    """Pairs for ITM: n true pairs, then n images with drawn captions, then n captions with drawn images."""

    images: Tensor
    """int64 (3n,), images of the pairs, as rows of the image features."""
    texts: Tensor
    """int64 (3n,), captions of the pairs, as rows of the text features."""
    labels: Tensor
    """int64 (3n,), 1 = match."""
    weights: Tensor
    """float32 (3n,), 0 for a negative pair that does not count (`Negatives`), else 1."""


def matching_pairs(negatives: Negatives, first_image: int = 0, first_text: int = 0) -> MatchingPairs:
    """Make the 3n ITM pairs of n true pairs and their negatives.

    Features of images are rows of one tensor: those of the n true pairs begin at row first_image, and
    `negatives.images` are rows too. In the same way for captions.
    """
    own = torch.arange(len(negatives.texts), device=negatives.texts.device)
    images, texts = own + first_image, own + first_text
    return MatchingPairs(
        torch.cat([images, images, negatives.images]),
        torch.cat([texts, negatives.texts, texts]),
        torch.cat([torch.ones_like(own), torch.zeros_like(own), torch.zeros_like(own)]),
        matching_weights(negatives),
    )


def matching_weights(negatives: Negatives) -> Tensor:
    """Weights of the matching loss's terms, float32 (3n,): n right pairs, their n negative captions, their n images.

    Right pairs weigh 1. A negative weighs 0 where no pair could be drawn.
    """
    ones = torch.ones_like(negatives.text_weights)
    return torch.cat([ones, negatives.text_weights, negatives.image_weights])
