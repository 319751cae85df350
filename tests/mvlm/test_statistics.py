"""Intervals and tests against scipy's, loops, published tables, and known distributions."""

import itertools
import time

import numpy as np
import pytest
from scipy import stats

from mvlm.statistics import grouped_bootstrap, mcnemar, mean_interval


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
    width = oracle.high - oracle.low
    for by_kind in (False, True):
        low, high = grouped_bootstrap(values.tolist(), groups.tolist(), by_kind=by_kind, resamples=20_000)
        assert abs(low - oracle.low) < 0.03 * width
        assert abs(high - oracle.high) < 0.03 * width
    alone = grouped_bootstrap(values.tolist(), list(range(300)))
    assert alone[1] - alone[0] < 0.8 * width  # as if questions about one image were independent


@pytest.mark.parametrize("seed", [0, 1])
def test_bootstrap_of_a_ratio_of_sums_gives_scipys_percentile_interval(seed):
    """Scipy draws the same resamples from the same generator."""
    rng = np.random.default_rng(5 + seed)
    gains, tokens = rng.normal(3, 2, 200), rng.integers(1, 9, 200)
    wanted = stats.bootstrap(
        (np.arange(200),),
        lambda i: gains[i].sum() / tokens[i].sum(),
        n_resamples=1000,
        vectorized=False,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    found = grouped_bootstrap(gains, weights=tokens, seed=seed, resamples=1000)
    assert found == pytest.approx([wanted.low, wanted.high], rel=1e-9)


@pytest.mark.slow
def test_bootstrap_over_seeds_and_groups_is_that_of_all_draws():
    """Two seeds and two groups have 4 x 4 draws, all equally likely; the second group has two values."""
    values, groups = np.array([[0.0, 6.0, 3.0], [3.0, 9.0, 6.0]]), [7, 9, 9]
    of_seeds = values.mean(axis=1, keepdims=True)
    apart = np.sqrt(2) * stats.t.ppf(0.975, 1) / 1.96
    moved = values - of_seeds + of_seeds.mean() + apart * (of_seeds - of_seeds.mean())
    means = []
    for seeds in itertools.product((0, 1), repeat=2):
        for chosen in itertools.product(([0], [1, 2]), repeat=2):
            queries = [q for group in chosen for q in group]
            means.append(np.mean([moved[s][q] for s in seeds for q in queries]))
    low, high = grouped_bootstrap(values, groups, resamples=4000)
    assert low == pytest.approx(np.percentile(means, 2.5, method="inverted_cdf"), abs=1e-9)
    assert high == pytest.approx(np.percentile(means, 97.5, method="inverted_cdf"), abs=1e-9)


@pytest.mark.slow
def test_intervals_over_seeds_and_groups_cover_the_truth():
    """Seeds, groups and values each have an effect of their own, of which the seeds' is the largest."""
    rng, groups, covered = np.random.default_rng(3), np.repeat(np.arange(20), 2), []
    for _ in range(600):
        values = 1 + rng.normal(0, 2, (5, 1)) + rng.normal(0, 1, 20)[groups] + rng.normal(0, 1, (5, 40))
        low, high = grouped_bootstrap(values, groups.tolist(), resamples=400)
        covered.append(low <= 1 <= high)
    assert 0.92 < np.mean(covered) < 0.98  # seeds that are not moved apart give 0.86


def test_mcnemar_of_tens_of_thousands_is_exact_and_takes_no_minutes():
    started = time.process_time()
    found = mcnemar([True] * 10_150 + [False] * 9_850, [False] * 10_150 + [True] * 9_850)
    assert time.process_time() - started < 5
    assert found == pytest.approx(stats.binomtest(9_850, 20_000).pvalue, rel=1e-9)
    assert mcnemar([True] * 4, [True, True, False, False]) == pytest.approx(0.5)  # the second model is never better
    assert mcnemar([True, False], [True, False]) == 1


@pytest.mark.parametrize("number", [2, 3, 5, 20, 45])
def test_interval_of_a_mean_is_students(number):
    values = np.random.default_rng(number).normal(50, 3, size=number)
    wanted = stats.t.interval(0.95, number - 1, values.mean(), stats.sem(values))
    assert mean_interval(values.tolist()) == pytest.approx(wanted, rel=1e-4)


def test_interval_of_one_value_is_refused():
    with pytest.raises(ValueError, match="wanted at least 2, got 1"):
        mean_interval([1.0])
