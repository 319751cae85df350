"""The budget of seconds that a benchmark has."""

import math

import pytest

from mvlm_benchmarks import budget
from mvlm_benchmarks.budget import Budget


def test_no_case_starts_that_would_end_after_the_budget(monkeypatch) -> None:
    now = [100.0]
    monkeypatch.setattr(budget.time, "monotonic", lambda: now[0])
    limit, endless = Budget(10), Budget()
    # Seconds before a question, and its answer. Setting up is no case; the longest case takes 2, then 2.5.
    for passed, allowed in ((3, True), (2, True), (2.5, True), (0.1, False), (5, False)):
        now[0] += passed
        assert limit.allows() == allowed
    assert (limit.left, limit.used) == (0, pytest.approx(12.6))
    assert Budget(0.1).allows()  # one case may start at the beginning of any budget
    now[0] += 1e6
    assert endless.allows()
    assert math.isinf(endless.left)
