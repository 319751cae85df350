"""The clocks, and what they are read under."""

import time

import pytest
import torch
import torch._functorch.config as compiler

from mvlm_benchmarks.clock import CpuClock, CudaClock, make_clock, settings
from mvlm_benchmarks.kernels.measure import Local, expect


def test_the_cpu_clock_reads_microseconds() -> None:
    calls = []

    def step() -> None:
        calls.append(1)
        time.sleep(0.002)

    timing = CpuClock(0.01).time(step)
    assert len(calls) >= 1 + 5
    assert 2000 <= timing.p20 <= timing.us <= timing.p80
    assert CpuClock(0.01).graph(lambda: step) is None
    assert CpuClock(0.01).peak_mb(step) is None


def test_the_gpu_clock_asks_do_bench_for_quantiles(monkeypatch) -> None:
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


def test_quick_is_shorter() -> None:
    for device in ("cpu", "cuda"):
        long, short = make_clock(device, False), make_clock(device, True)
        assert type(long) is type(short)
        assert short != long


def test_settings_are_put_back() -> None:
    precision, donated = torch.get_float32_matmul_precision(), compiler.donated_buffer
    with settings("cuda"):
        assert torch.get_float32_matmul_precision() == "high"
        assert compiler.donated_buffer is False
    assert torch.get_float32_matmul_precision() == precision
    assert compiler.donated_buffer == donated
    with settings("cpu"):
        assert torch.get_float32_matmul_precision() == precision


def test_passes_run_what_they_say(toy, clock) -> None:
    """Backward has run forward before it is timed, and can run again and again; both runs forward every time."""
    inputs, calls = toy.make("cpu"), []

    def counted(x):
        calls.append(1)
        return x * 2

    local = Local(toy, inputs, counted, expect(toy, inputs).incoming, clock)
    for name, forwards in (("forward", 3), ("backward", 1), ("both", 3)):
        calls.clear()
        step = local.step(name)
        results = [step() for _ in range(3)]
        assert len(calls) == forwards
        if name != "forward":
            assert torch.equal(results[0][0], results[2][0])
    assert inputs.leaves["x"].grad is None
