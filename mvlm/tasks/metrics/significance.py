"""Intervals and tests that say how sure a figure, or the difference of two, is."""

import math
from collections.abc import Hashable, Sequence

import numpy as np

RESAMPLES = 2000


def grouped_bootstrap(
    values: Sequence[float], groups: Sequence[Hashable], seed: int = 0, resamples: int = RESAMPLES
) -> tuple[float, float]:
    """95 % interval of the mean of `values`: the percentile bootstrap over groups.

    Questions about one image are not independent, so images are drawn, each with all of its questions.

    Args:
        values: (questions,), such as scores in 0..1.
        groups: (questions,), the image of each.
    """
    number = {group: row for row, group in enumerate(dict.fromkeys(groups))}
    rows = np.array([number[group] for group in groups])
    sums = np.bincount(rows, weights=np.asarray(values, dtype=np.float64))
    counts = np.bincount(rows)
    rng = np.random.default_rng(seed)
    means = np.empty(resamples)
    for i in range(resamples):
        chosen = rng.integers(len(counts), size=len(counts))
        means[i] = sums[chosen].sum() / counts[chosen].sum()
    low, high = np.percentile(means, (2.5, 97.5))
    return float(low), float(high)


def mcnemar(first_right: Sequence[bool], second_right: Sequence[bool]) -> float:
    """Exact two-sided p-value of McNemar's test that two models are right equally often on the same examples.

    Only examples on which one model alone is right count: under the null hypothesis each is a fair coin.
    """
    first = sum(a and not b for a, b in zip(first_right, second_right, strict=True))
    second = sum(b and not a for a, b in zip(first_right, second_right, strict=True))
    number = first + second
    if first == second:
        return 1.0
    tail = sum(math.comb(number, k) for k in range(min(first, second) + 1))
    return float(2 * tail / 2**number)
