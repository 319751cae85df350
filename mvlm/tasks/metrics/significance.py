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


T_QUANTILES = (
    12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281,
    2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930,
)  # fmt: skip
"""97.5 % quantiles of Student's t for 1 to 19 degrees of freedom."""


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the mean of 2 to 20 independent values by Student's t, such as figures of several seeds."""
    if not 2 <= len(values) <= len(T_QUANTILES) + 1:
        raise ValueError(f"values: wanted 2 to {len(T_QUANTILES) + 1}, got {len(values)}")
    mean, deviation = float(np.mean(values)), float(np.std(values, ddof=1))
    half = T_QUANTILES[len(values) - 2] * deviation / math.sqrt(len(values))
    return mean - half, mean + half


def mcnemar(first_right: Sequence[bool], second_right: Sequence[bool]) -> float:
    """Exact two-sided p-value of McNemar's test that two models are right equally often on the same examples.

    Only examples on which one model alone is right count: under the null hypothesis each is a fair coin.
    """
    first = sum(a and not b for a, b in zip(first_right, second_right, strict=True))
    second = sum(b and not a for a, b in zip(first_right, second_right, strict=True))
    number = first + second
    if first == second:
        return 1.0
    tail, term = 0, 1  # term: `number` over k
    for k in range(min(first, second) + 1):
        tail += term
        term = term * (number - k) // (k + 1)  # without a remainder
    return float(2 * tail / 2**number)
