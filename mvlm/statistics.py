"""Intervals and tests that say how sure a figure, or the difference of two, is.

SciPy is imported by the functions that need it: `mvlm --help` starts without it.

Shape legend: S seeds, Q values, I groups.
"""

import math
from collections.abc import Hashable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

RESAMPLES = 2000
ENDS = (2.5, 97.5)
NORMAL = 1.96
"""97.5 % quantile of the normal distribution."""


class Interval(NamedTuple):
    """A 95 % confidence interval."""

    low: float
    high: float


def grouped_bootstrap(
    values: ArrayLike,
    groups: Iterable[Hashable] | None = None,
    weights: ArrayLike | None = None,
    *,
    by_kind: bool = False,
    seed: int | np.random.Generator = 0,
    resamples: int = RESAMPLES,
) -> Interval:
    """95 % interval of sum(values) / sum(weights), without weights of the mean: the percentile bootstrap over groups.

    Values of one group, such as captions of one image, are not independent. Groups are drawn, each with all of its
    values.

    Args:
        values: (Q,), or (S, Q) for the mean over seeds as well. Seeds are then drawn too. Means of few drawn seeds
            spread too little, so the seeds are first moved apart, as far as Student's t wants.
        groups: (Q,), the group of each value. Default: each is a group of its own.
        weights: (Q,). Default: all are 1.
        by_kind: groups with equal sums and weights are interchangeable. Draw how often each of these kinds occurs, in
            place of the groups. The cost then does not grow with I. For values of few levels, such as hits, (Q,).
        seed: of the resampling, or the generator that goes on. Equal seeds give equal intervals.
        resamples: number of means whose percentiles are taken.
    """
    table = np.atleast_2d(np.asarray(values, dtype=np.float64))  # (S, Q)
    if len(table) > 1:
        table = table + (_widening(len(table)) - 1) * (table.mean(axis=1, keepdims=True) - table.mean())
    if groups is None:
        rows = np.arange(table.shape[1])
    else:
        groups = list(groups)
        number = {group: row for row, group in enumerate(dict.fromkeys(groups))}
        rows = np.array([number[group] for group in groups])
    sums = np.stack([np.bincount(rows, weights=each) for each in table])  # (S, I)
    totals = np.bincount(rows, weights=None if weights is None else np.asarray(weights, dtype=np.float64))  # (I,)
    rng = np.random.default_rng(seed)
    if by_kind:
        kinds, sizes = np.unique(np.stack([totals, sums[0]], axis=1), axis=0, return_counts=True)
        draws = rng.multinomial(len(totals), sizes / len(totals), size=resamples)  # (resamples, kinds)
        return _percentiles((draws @ kinds[:, 1]) / (draws @ kinds[:, 0]))
    means = np.empty(resamples)
    for i in range(resamples):
        seeds = rng.integers(len(sums), size=len(sums))
        chosen = rng.integers(len(totals), size=len(totals))
        means[i] = sums[np.ix_(seeds, chosen)].mean(axis=0).sum() / totals[chosen].sum()
    return _percentiles(means)


def mean_interval(values: Sequence[float]) -> Interval:
    """95 % interval of the mean of independent values by Student's t, such as figures of several seeds.

    ValueError for fewer than two.
    """
    if len(values) < 2:
        raise ValueError(f"values: wanted at least 2, got {len(values)}")
    mean, deviation = float(np.mean(values)), float(np.std(values, ddof=1))
    half = t_quantile(len(values) - 1) * deviation / math.sqrt(len(values))
    return Interval(mean - half, mean + half)


def t_quantile(freedom: int) -> float:
    """97.5 % quantile of Student's t: 12.706 for 1 degree of freedom, 1.960 for very many."""
    from scipy.special import stdtrit

    return float(stdtrit(freedom, 0.975))


def mcnemar(first_right: Sequence[bool], second_right: Sequence[bool]) -> float:
    """Exact two-sided p-value of McNemar's test that two models are right equally often on the same examples.

    Only examples on which one model alone is right count: under the null hypothesis each is a fair coin.
    """
    from scipy.stats import binomtest

    first = sum(a and not b for a, b in zip(first_right, second_right, strict=True))
    second = sum(b and not a for a, b in zip(first_right, second_right, strict=True))
    return float(binomtest(first, first + second).pvalue) if first + second else 1.0


def _widening(seeds: int) -> float:
    """Ratio of the widths of Student's t interval and of a bootstrap interval, of the mean of so many seeds.

    A bootstrap's means of S drawn values have only (S - 1) / S of the estimated variance of the mean, and its interval
    is taken to be that of a normal distribution.
    """
    return float(np.sqrt(seeds / (seeds - 1)) * t_quantile(seeds - 1) / NORMAL)


def _percentiles(means: np.ndarray) -> Interval:
    low, high = np.percentile(means, ENDS)
    return Interval(float(low), float(high))
