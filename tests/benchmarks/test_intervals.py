"""Bootstrap intervals of ratios, against draws from known distributions."""

import numpy as np
import pytest

from mvlm_benchmarks.intervals import FASTER, NO_DIFFERENCE, ONE_CALL, SLOWER, Ratio, ratio


def rounds(random, mean: float, drift: np.ndarray, noise: float = 0.05, calls: int = 20) -> list[list[float]]:
    return [(mean * speed * (1 + noise * random.standard_normal(calls))).tolist() for speed in drift]


@pytest.mark.slow
def test_interval_contains_the_true_ratio_about_as_often_as_it_says() -> None:
    """Rounds differ by up to a factor of two, calls within a round by 5 %."""
    random = np.random.default_rng(0)
    hits, equal = 0, []
    for _ in range(200):
        drift = random.uniform(1, 2, 5)
        other = rounds(random, 1.0, drift)
        found = ratio(rounds(random, 1.2, drift), other)
        hits += found.low <= 1.2 <= found.high
        equal.append(ratio(rounds(random, 1.0, drift), other).verdict)
    assert 180 <= hits <= 200  # 95 % of 200 are 190
    assert equal.count(NO_DIFFERENCE) >= 176


@pytest.mark.slow
@pytest.mark.parametrize("number, covered", [(7, 0.88), pytest.param(11, 0.94, marks=pytest.mark.extended)])
def test_an_interval_of_few_rounds_of_one_call_is_a_little_narrow(number: int, covered: float) -> None:
    """docs/evidence/loader.md states how narrow."""
    random = np.random.default_rng(0)
    ratios = np.exp(random.normal(0, 0.1, (1000, number, 1)))
    found = [ratio(list(case), [[1.0]] * number, seed) for seed, case in enumerate(ratios)]
    assert np.mean([each.low <= 1 <= each.high for each in found]) == pytest.approx(covered, abs=0.02)


def test_value_is_the_median_of_the_ratios_within_rounds() -> None:
    times, others = [[2, 2], [9], [8]], [[1, 1], [3], [4]]
    assert ratio(times, others).value == 2
    assert ratio(times, others) == ratio(times, others)
    assert ratio([[1]], [[2]]) == Ratio(0.5, 0.5, 0.5, known=False)


def test_verdicts_are_those_of_the_interval_and_one_call_says_nothing() -> None:
    for found, verdict, speed in (
        (Ratio(2.0, 1.9, 2.1), SLOWER, FASTER),
        (Ratio(0.5, 0.4, 0.6), FASTER, SLOWER),
        (Ratio(1.1, 1.0, 1.2), NO_DIFFERENCE, NO_DIFFERENCE),
        (ratio([[1.0]], [[1.001]]), ONE_CALL, ONE_CALL),
        (ratio([[1.0], [1.0]], [[1.001], [1.001]]), FASTER, SLOWER),
    ):
        assert (found.verdict, found.speed_verdict) == (verdict, speed)
