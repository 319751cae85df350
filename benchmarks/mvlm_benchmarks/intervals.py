"""Ratios of times with their intervals, and the verdict that they allow.

Times of one round belong together: the machine's speed changes between rounds more than within them. A ratio is
therefore taken within each round.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

RESAMPLES = 1000
NO_DIFFERENCE, FASTER, SLOWER, ONE_CALL = "no difference", "faster", "slower", "one call says nothing"


class Ratio(NamedTuple):
    """A ratio of times with its 95 % interval."""

    value: float
    low: float
    high: float
    known: bool = True
    """False for one call of each, from which nothing follows: the interval has no width."""

    @property
    def verdict(self) -> str:
        """The numerator is slower, faster, or not different: the interval contains 1. Or it is not known."""
        if not self.known:
            return ONE_CALL
        if self.low <= 1 <= self.high:
            return NO_DIFFERENCE
        return SLOWER if self.low > 1 else FASTER

    @property
    def speed_verdict(self) -> str:
        """Verdict on the denominator, for a ratio that is read as its speed over the numerator's speed."""
        return {SLOWER: FASTER, FASTER: SLOWER}.get(self.verdict, self.verdict)


def ratio(times: Sequence[Sequence[float]], others: Sequence[Sequence[float]], seed: int = 0) -> Ratio:
    """The median over rounds of median(times) / median(others), and its 95 % interval.

    The bootstrap draws rounds, and calls within each drawn round: what is measured in one round belongs together.

    Args:
        times, others: calls of each round, the same rounds in both. Each round has at least one call of each.
        seed: of the resampling. Equal arguments give equal intervals.
    """
    pairs = [(np.asarray(a, float), np.asarray(b, float)) for a, b in zip(times, others, strict=True)]
    value = float(np.median([np.median(a) / np.median(b) for a, b in pairs]))
    rng = np.random.default_rng(seed)

    def medians(of_round: np.ndarray) -> np.ndarray:  # (n,) -> (RESAMPLES,)
        return np.median(of_round[rng.integers(len(of_round), size=(RESAMPLES, len(of_round)))], axis=1)

    resampled = np.stack([medians(a) / medians(b) for a, b in pairs])  # (rounds, RESAMPLES)
    rounds = rng.integers(len(pairs), size=(len(pairs), RESAMPLES))
    low, high = np.percentile(np.median(np.take_along_axis(resampled, rounds, axis=0), axis=0), (2.5, 97.5)).tolist()
    known = len(times) > 1 or max(len(times[0]), len(others[0])) > 1
    return Ratio(value, min(low, value), max(high, value), known)
