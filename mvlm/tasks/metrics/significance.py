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


def t_quantile(freedom: int) -> float:
    """97.5 % quantile of Student's t, by halving: 12.706 for 1 degree of freedom, 1.960 for very many."""
    low, high = 0.0, math.pi / 2  # of atan(t / sqrt(freedom))
    for _ in range(60):
        angle = (low + high) / 2
        low, high = (angle, high) if _t_inside(angle, freedom) < 0.95 else (low, angle)
    return math.sqrt(freedom) * math.tan(low)


def _t_inside(angle: float, freedom: int) -> float:
    """Probability that |t| < sqrt(freedom) tan(angle): Abramowitz and Stegun, 26.7.3 (odd freedom), 26.7.4 (even)."""
    odd = freedom % 2
    term = math.cos(angle) if odd else 1.0
    total = term if freedom > 1 else 0.0
    for k in range(2 + odd, freedom - 1, 2):
        term *= math.cos(angle) ** 2 * (k - 1) / k
        total += term
    total *= math.sin(angle)
    return 2 / math.pi * (angle + total) if odd else total


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the mean of independent values by Student's t, such as figures of several seeds."""
    if len(values) < 2:
        raise ValueError(f"values: wanted at least 2, got {len(values)}")
    mean, deviation = float(np.mean(values)), float(np.std(values, ddof=1))
    half = t_quantile(len(values) - 1) * deviation / math.sqrt(len(values))
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
