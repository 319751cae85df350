"""Official metrics of the downstream tasks, from predictions and references alone.

These modules need numpy and the standard library: no torch, no model.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from mvlm.statistics import grouped_bootstrap


def percent_interval(values: Sequence[float] | np.ndarray, groups: Sequence[str]) -> list[float]:
    """95 % interval, in per cent, of the mean of values in 0..1, bootstrapped over their groups."""
    return [100 * x for x in grouped_bootstrap(values, groups)]


class Scored(NamedTuple):
    """Metrics of a set of predictions, and the score of each example, whose mean is the main metric."""

    figures: dict[str, Any]
    """Figures by name, in per cent unless their name says otherwise."""
    scores: np.ndarray
    """float64 (examples,): score of each in 0..1 (CIDEr-D: 0..10)."""
    groups: list[str]
    """The image, or the set of images, of each example. Intervals are bootstrapped over these."""
    main: str = "accuracy"
    """Name of the figure by which models are compared and selected."""

    @property
    def all_figures(self) -> dict[str, Any]:
        """The figures, and the main one's 95 % interval under the key `NAME_95`."""
        return {**self.figures, f"{self.main}_95": percent_interval(self.scores, self.groups)}
