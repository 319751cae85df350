"""Rates that a machine reaches."""

import time

import pytest
import torch

from mvlm_benchmarks import ceilings
from mvlm_benchmarks.ceilings import ceiling_rows, gemm_seconds, memory_rates


def test_rates_count_bytes_read_and_written(monkeypatch) -> None:
    """In two milliseconds each: of 4 MB a copy moves 8, a read 4, and a triad 12."""
    monkeypatch.setattr(ceilings, "median_seconds", lambda call, device: 2e-3)
    rates = memory_rates("cpu", megabytes=4)
    assert (rates.copy, rates.read, rates.triad) == tuple(n * 2**20 / 2e-3 for n in (8, 4, 12))


def test_product_is_that_of_the_shape(monkeypatch) -> None:
    seen = []

    def once(call, device):
        seen.append(tuple(call().shape))
        return 1e-3

    monkeypatch.setattr(ceilings, "median_seconds", once)
    assert gemm_seconds((3, 5, 7), torch.float32, "cpu") == 1e-3
    assert seen == [(3, 5)]


def test_rows_of_a_rehearsal_have_rates() -> None:
    rows = ceiling_rows("cpu", torch.float32, shrink=512)
    assert [row["name"] for row in rows[:3]] == ["copy", "read", "triad"]
    assert all(row["gb_per_s"] > 0 for row in rows[:3])
    products = rows[3:]
    assert [row["name"] for row in products] == list(ceilings.GEMM_SHAPES)
    for row in products:
        m, n, k = (int(size) for size in row["shape"].split("x"))
        assert row["tflops"] == pytest.approx(2 * m * n * k / row["us"] / 1e6)


def test_median_seconds_waits_for_the_call() -> None:
    assert ceilings.median_seconds(lambda: time.sleep(0.002), "cpu") >= 0.002


def test_a_gpu_is_warmed_up_before_its_rates_are_measured(monkeypatch) -> None:
    """Else they are those of the clocks of an idle GPU, and kernels look better beside them."""
    events = []
    ones, empty = torch.ones, torch.empty
    monkeypatch.setattr(torch, "ones", lambda count, device: ones(count))
    monkeypatch.setattr(torch, "empty", lambda shape, device: empty(shape))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: events.append("waited"))
    monkeypatch.setattr(ceilings, "median_seconds", lambda *_: events.append("measured") or 1.0)
    started = time.perf_counter()
    ceilings.memory_rates("cuda", 1)
    assert time.perf_counter() - started > 0.5
    first = events.index("measured")
    assert first > 10
    assert events[first:] == ["measured"] * 3
