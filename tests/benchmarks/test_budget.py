"""A budget of seconds."""

import math

import pytest

from mvlm_benchmarks import budget
from mvlm_benchmarks.budget import Budget


@pytest.fixture
def now(monkeypatch) -> list[float]:
    """The time, which stands still unless a test moves it."""
    time = [100.0]
    monkeypatch.setattr(budget.time, "monotonic", lambda: time[0])
    return time


def test_no_case_starts_that_would_end_after_the_limit(now) -> None:
    limit = Budget(10)
    now[0] += 3  # setting up is no case
    assert limit.allows()
    now[0] += 2
    assert limit.allows()  # 5 s left, the longest case took 2
    now[0] += 2.5
    assert limit.left == pytest.approx(2.5)
    assert limit.allows()
    now[0] += 0.1
    assert not limit.allows()  # 2.4 s left, the longest took 2.5
    now[0] += 5
    assert (limit.left, limit.used) == (0, pytest.approx(12.6))


def test_one_case_may_start_at_the_beginning_of_any_budget(now) -> None:
    assert Budget(0.1).allows()


def test_without_a_limit_everything_is_allowed(now) -> None:
    limit = Budget()
    for _ in range(3):
        now[0] += 1e6
        assert limit.allows()
    assert math.isinf(limit.left)
