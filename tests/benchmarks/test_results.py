"""What all benchmarks share: result files, budgets, rates of the machine, the state of a GPU."""

import math
import time

import pytest
import torch

from mvlm_benchmarks import budget, ceilings
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


def test_rates_count_bytes_read_and_written(monkeypatch) -> None:
    """In two milliseconds each: of 4 MB a copy moves 8, a read 4, and a triad 12."""
    assert ceilings.median_seconds(lambda: time.sleep(0.002), "cpu") >= 0.002
    rows = ceilings.ceiling_rows("cpu", torch.float32, shrink=512)
    assert [row["name"] for row in rows] == ["copy", "read", "triad", *ceilings.GEMM_SHAPES]
    assert all(row["gb_per_s"] > 0 for row in rows[:3])
    for row in rows[3:]:
        m, n, k = (int(size) for size in row["shape"].split("x"))
        assert row["tflops"] == pytest.approx(2 * m * n * k / row["us"] / 1e6)
    monkeypatch.setattr(ceilings, "median_seconds", lambda call, device: 2e-3)
    rates = ceilings.memory_rates("cpu", megabytes=4)
    assert (rates.copy, rates.read, rates.triad) == tuple(n * 2**20 / 2e-3 for n in (8, 4, 12))
