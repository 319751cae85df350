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
    hits = 0
    for _ in range(200):
        drift = random.uniform(1, 2, 5)
        found = ratio(rounds(random, 1.2, drift), rounds(random, 1.0, drift))
        hits += found.low <= 1.2 <= found.high
    assert 180 <= hits <= 200  # 95 % of 200 are 190


@pytest.mark.slow
def test_equal_speeds_are_no_difference_though_rounds_drift() -> None:
    random = np.random.default_rng(1)
    verdicts = []
    for _ in range(100):
        drift = random.uniform(1, 2, 5)
        verdicts.append(ratio(rounds(random, 1, drift), rounds(random, 1, drift)).verdict)
    assert verdicts.count(NO_DIFFERENCE) >= 88


def test_clear_differences_are_named() -> None:
    random = np.random.default_rng(2)
    drift = np.ones(5)
    assert ratio(rounds(random, 1.3, drift), rounds(random, 1, drift)).verdict == SLOWER
    assert ratio(rounds(random, 0.7, drift), rounds(random, 1, drift)).verdict == FASTER


def test_one_call_of_each_says_nothing() -> None:
    found = ratio([[1.0]], [[1.001]])
    assert found.verdict == found.speed_verdict == ONE_CALL
    assert ratio([[1.0], [1.0]], [[1.001], [1.001]]).verdict == FASTER


def test_the_verdict_of_a_speed_is_that_of_the_denominator() -> None:
    found = Ratio(2.0, 1.9, 2.1)  # the numerator takes twice the time
    assert (found.verdict, found.speed_verdict) == (SLOWER, FASTER)
    found = Ratio(0.5, 0.4, 0.6)
    assert (found.verdict, found.speed_verdict) == (FASTER, SLOWER)
    assert Ratio(1.0, 0.9, 1.1).speed_verdict == NO_DIFFERENCE


def test_value_is_the_median_of_the_ratios_within_rounds() -> None:
    found = ratio([[2, 2], [9], [8]], [[1, 1], [3], [4]])
    assert found.value == 2
    assert ratio([[1]], [[2]]) == Ratio(0.5, 0.5, 0.5, known=False)


@pytest.mark.parametrize("number, covered", [(7, 0.88), (11, 0.94)])
def test_an_interval_of_few_rounds_of_one_call_is_a_little_narrow(number: int, covered: float) -> None:
    """docs/evidence/loader.md states how narrow."""
    random = np.random.default_rng(0)
    ratios = np.exp(random.normal(0, 0.1, (1000, number, 1)))
    found = [ratio(list(case), [[1.0]] * number, seed) for seed, case in enumerate(ratios)]
    assert np.mean([each.low <= 1 <= each.high for each in found]) == pytest.approx(covered, abs=0.02)


def test_equal_arguments_give_equal_intervals() -> None:
    times, others = [[1.0, 2.0, 1.5]] * 3, [[1.1, 1.2, 1.4]] * 3
    assert ratio(times, others) == ratio(times, others)
