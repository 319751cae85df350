"""Figures of the ranks of a run in its rows of metrics, and the ranks that are slower than the others."""

import logging
from collections import Counter
from collections.abc import Sequence
from statistics import fmean, median_low

log = logging.getLogger(__name__)

FIGURES = ("data_wait_s", "alone_s", "skipped")
"""Names of the figures of a rank: seconds of a step that it waited for data, seconds that it computed before it waited
for other ranks, and the number of images so far that it could not decode."""
PARTS = ("min", "median", "max")
FIELDS = tuple(f"{name}_{part}" for name in FIGURES for part in PARTS)
"""Fields of a row of metrics that a run of several ranks has in addition: least, median and largest of each figure."""
SLOW_STEPS = 50
"""Number of steps in a row above twice the median after which a rank is named in a warning."""
LEAST_SHARE, LEAST_IMAGES = 0.05, 10
"""Smallest excess over the median that counts: as a share of the step's time, and as a number of images."""
_ADVICE = {
    "data_wait_s": "look at its disk, its network and its processors",
    "alone_s": "look at its clock rates, its temperature and what else runs there",
    "skipped": "look at its disk and its network",
}


class RankFigures:
    """Least, median and largest figure of the ranks for each row of metrics.

    A rank above twice the median is named once.

    Args:
        hosts: name of each rank's machine.
    """

    def __init__(self, hosts: Sequence[str]) -> None:
        self._hosts = hosts
        self._slow: Counter[tuple[str, int]] = Counter()
        """By (figure, rank): number of steps in a row for which the figure has been above twice the median."""
        self._named: set[tuple[str, int]] = set()

    def fields(self, steps: Sequence[Sequence[Sequence[float]]], step_s: float) -> dict[str, float]:
        """Fields of one row of metrics. A warning names each rank that has been slow for `SLOW_STEPS`.

        Args:
            steps: figures (`FIGURES`) of each rank, for each step since the last row.
            step_s: mean seconds of these steps.
        """
        found: dict[str, float] = {}
        for number, name in enumerate(FIGURES):
            by_step = [[figures[number] for figures in ranks] for ranks in steps]
            least = LEAST_IMAGES if name == "skipped" else LEAST_SHARE * step_s
            for values in by_step:
                self._look_for_slow(name, values, least)
            of_ranks = zip(*by_step, strict=True)
            values = [int(own[-1]) if name == "skipped" else fmean(own) for own in of_ranks]
            parts = min(values), median_low(values), max(values)
            found |= {f"{name}_{part}": value for part, value in zip(PARTS, parts, strict=True)}
        return found

    def _look_for_slow(self, name: str, values: Sequence[float], least: float) -> None:
        middle = median_low(values)  # of two ranks, the smaller: above twice their mean there is none
        for rank, value in enumerate(values):
            key = name, rank
            self._slow[key] = self._slow[key] + 1 if value > 2 * middle and value - middle > least else 0
            if self._slow[key] >= SLOW_STEPS and key not in self._named:
                self._named.add(key)
                log.warning(
                    "rank %d on %s: %s has been above twice the median of all ranks for %d steps, now %.3g of %.3g; "
                    "all ranks wait for it: %s",
                    rank, self._hosts[rank], name, SLOW_STEPS, value, middle, _ADVICE[name],
                )  # fmt: skip
