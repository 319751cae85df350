"""Ratios of times with their intervals, and the verdict that they allow.

Times of one round belong together: the machine's speed changes between rounds more than within them. A ratio is
therefore taken within each round.
"""

from collections.abc import Sequence
from typing import NamedTuple

from mvlm.statistics import ratio_of_medians

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
        """The same of the denominator. The ratio is then its speed over the numerator's."""
        return {SLOWER: FASTER, FASTER: SLOWER}.get(self.verdict, self.verdict)


def ratio(times: Sequence[Sequence[float]], others: Sequence[Sequence[float]], seed: int = 0) -> Ratio:
    """The median over rounds of median(times) / median(others), with its interval.

    Args:
        times, others: calls of each round, the same rounds in both. Each round has at least one call of each.
        seed: of the resampling. Equal arguments give equal intervals.
    """
    value, (low, high) = ratio_of_medians(times, others, seed)
    return Ratio(value, low, high, known=len(times) > 1 or max(len(times[0]), len(others[0])) > 1)
