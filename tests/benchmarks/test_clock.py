"""The clocks, and the torch settings of a measurement."""

import time

import pytest
import torch
import torch._functorch.config as compiler

from mvlm_benchmarks.clock import CpuClock, CudaClock, make_clock, torch_settings


def test_cpu_clock_reports_microseconds() -> None:
    calls = []

    def step() -> None:
        calls.append(1)
        time.sleep(0.002)

    timing = CpuClock(0.01).time(step)
    assert len(calls) >= 1 + 5
    assert 2000 <= timing.p20 <= timing.us <= timing.p80
    assert CpuClock(0.01).graph(lambda: step) is None
    assert CpuClock(0.01).peak_mb(step) is None


def test_cuda_clock_asks_do_bench_for_quantiles(monkeypatch) -> None:
    testing = pytest.importorskip("triton.testing")
    asked = {}

    def do_bench(step, **options):
        asked.update(options)
        return [0.002, 0.001, 0.004]

    monkeypatch.setattr(testing, "do_bench", do_bench)
    timing = CudaClock(50).time(lambda: None)
    assert (timing.us, timing.p20, timing.p80) == (2.0, 1.0, 4.0)
    assert asked["quantiles"] == [0.5, 0.2, 0.8]
    assert asked["rep"] == 50


def test_quick_clock_takes_less_time() -> None:
    for device in ("cpu", "cuda"):
        long, short = make_clock(device, False), make_clock(device, True)
        assert type(long) is type(short)
        assert short != long


def test_torch_settings_are_restored() -> None:
    precision, donated = torch.get_float32_matmul_precision(), compiler.donated_buffer
    with torch_settings("cuda"):
        assert torch.get_float32_matmul_precision() == "high"
        assert compiler.donated_buffer is False
    assert torch.get_float32_matmul_precision() == precision
    assert compiler.donated_buffer == donated
    with torch_settings("cpu"):
        assert torch.get_float32_matmul_precision() == precision
