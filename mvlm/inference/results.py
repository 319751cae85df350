"""Results of a trained model: small named types.

Shape legend: n images, m labels, k candidates, S image side.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor


class Matches(NamedTuple):
    """Matches of n pairs of an image and a text, by ITM. Tensors are float32, on the CPU."""

    probability: Tensor
    """(n,), probability that the pair belongs together."""
    log_odds: Tensor
    """(n,), log(probability / (1 - probability)), before rounding."""


class Ranking(NamedTuple):
    """Candidates in order, best first. Tensors are on the CPU."""

    order: Tensor
    """int64 (k,), positions of the candidates as they were given."""
    score: Tensor
    """float32 (k,), ITC logit plus ITM's log-odds of each, falling (docs/explain/method.md)."""


class Classification(NamedTuple):
    """Labels of n images, by contrastive similarity."""

    labels: list[str]
    """The m labels, as they were given."""
    probability: Tensor
    """float32 (n, m), on the CPU; rows add up to 1."""

    @property
    def best(self) -> list[str]:
        """The likeliest label of each image."""
        return [self.labels[i] for i in self.probability.argmax(1).tolist()]


class Guess(NamedTuple):
    """A token in the place of a [MASK]."""

    token: str
    probability: float


class FilledText(NamedTuple):
    """A text whose [MASK]s are filled in."""

    text: str
    """The text with the likeliest token in each place."""
    guesses: list[list[Guess]]
    """For each [MASK], the likeliest tokens, best first."""


class Reconstruction(NamedTuple):
    """An image, the same with hidden patches, and rebuilt. Pixels are uint8 (S, S, 3), for `PIL.Image.fromarray`."""

    image: NDArray[np.uint8]
    """The image as the model takes it."""
    masked: NDArray[np.uint8]
    """Hidden patches are grey."""
    rebuilt: NDArray[np.uint8]
    """Visible patches as they are, hidden ones as the model draws them."""
    hidden: NDArray[np.bool_]
    """(rows, columns) of patches, True = hidden."""
