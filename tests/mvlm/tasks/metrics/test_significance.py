"""Intervals and McNemar's test against scipy."""

import math
import time

import numpy as np
import pytest
from scipy import stats

from mvlm.tasks.metrics.significance import grouped_bootstrap, mcnemar, mean_interval, t_quantile


@pytest.mark.slow
def test_bootstrap_over_groups_equals_scipys_over_their_sums():
    rng = np.random.default_rng(0)
    groups = rng.integers(60, size=300)
    values = (rng.random(300) + groups / 60) / 2  # values of a group are alike
    sums, counts = np.bincount(groups, values, 60), np.bincount(groups, minlength=60)
    oracle = stats.bootstrap(
        (sums, counts), lambda s, c, axis: s.sum(axis) / c.sum(axis), paired=True, method="percentile",
        n_resamples=20_000, vectorized=True, rng=1,
    ).confidence_interval  # fmt: skip
    low, high = grouped_bootstrap(values.tolist(), groups.tolist(), resamples=20_000)
    width = oracle.high - oracle.low
    assert abs(low - oracle.low) < 0.03 * width
    assert abs(high - oracle.high) < 0.03 * width
    alone = grouped_bootstrap(values.tolist(), list(range(300)))
    assert alone[1] - alone[0] < 0.8 * width  # as if questions about one image were independent


@pytest.mark.parametrize("first, second", [(0, 0), (3, 3), (1, 0), (8, 2), (30, 12), (0, 6)])
def test_mcnemar_is_a_two_sided_binomial_test(first, second):
    a = [True] * first + [False] * second + [True, False] * 5
    b = [False] * first + [True] * second + [True, False] * 5
    wanted = stats.binomtest(first, first + second).pvalue if first + second else 1.0
    assert mcnemar(a, b) == pytest.approx(wanted)


def test_mcnemar_of_tens_of_thousands_is_exact_and_takes_no_minutes():
    started = time.process_time()
    found = mcnemar([True] * 10_150 + [False] * 9_850, [False] * 10_150 + [True] * 9_850)
    assert time.process_time() - started < 5
    # From the middle outwards, in floats: the term at the tail's end, and each next one as a share of it.
    term = math.exp(math.lgamma(20_001) - math.lgamma(9_851) - math.lgamma(10_151) - 20_000 * math.log(2))
    tail = 0.0
    for k in range(9_850, -1, -1):
        tail += term
        term *= k / (20_000 - k + 1)
    assert found == pytest.approx(2 * tail, rel=1e-9)
    assert found == pytest.approx(stats.binomtest(9_850, 20_000).pvalue, rel=1e-9)


def test_quantiles_of_t_are_those_of_the_published_table():
    """Three decimals, as printed in textbooks, for 1 to 10 and 30 degrees of freedom."""
    printed = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228]
    assert [round(t_quantile(freedom), 3) for freedom in range(1, 11)] == printed
    assert round(t_quantile(30), 3) == 2.042


@pytest.mark.parametrize("freedom", [1, 2, 7, 8, 101, 1000])
def test_quantiles_of_t_are_scipys(freedom):
    assert t_quantile(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=1e-10)


@pytest.mark.parametrize("number", [2, 3, 5, 20, 45])
def test_interval_of_a_mean_is_students(number):
    values = np.random.default_rng(number).normal(50, 3, size=number)
    wanted = stats.t.interval(0.95, number - 1, values.mean(), stats.sem(values))
    assert mean_interval(values.tolist()) == pytest.approx(wanted, rel=1e-4)


def test_interval_of_one_value_is_refused():
    with pytest.raises(ValueError, match="wanted at least 2, got 1"):
        mean_interval([1.0])
