"""The clocks, and the torch settings of a measurement."""

import time

import pytest
import torch

from mvlm_benchmarks.clock import CpuClock, CudaClock, Refused, recording, require_own_timers


def test_cpu_clock_reports_microseconds_and_the_last_results_of_each_step() -> None:
    calls, prepared = [], []

    def step(number: int):
        calls.append(number)
        time.sleep(0.002)
        return (torch.tensor([float(number), float(len(calls))]),)

    steps = [lambda: step(0), lambda: step(1)]
    timing, results = CpuClock(0.01).time(steps, prepared.append)
    assert len(calls) >= 2 + 5
    assert calls == prepared == [n % 2 for n in range(len(calls))]  # steps take turns, each prepared
    assert 2000 <= timing.p20 <= timing.us <= timing.p80
    assert timing.cpu_us is not None
    assert 0 < timing.cpu_us < 1000  # asleep, a process takes none
    assert len(timing.calls) == len(calls) - 2  # the first of each is for warm-up
    assert [float(one[0][0]) for one in results] == [0.0, 1.0]
    assert max(float(one[0][1]) for one in results) == len(calls)


def test_replaced_timer_is_refused(monkeypatch) -> None:
    require_own_timers()
    monkeypatch.setattr(time, "process_time", lambda: 0.0)
    with pytest.raises(Refused, match=r"time\.process_time was replaced"):
        require_own_timers()
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda.Event, "elapsed_time", lambda *_: 0.0)
    with pytest.raises(Refused, match=r"Event\.elapsed_time was replaced"):
        CpuClock(0.0).time([lambda: ()], lambda number: None)


@pytest.mark.gpu
def test_cuda_clock_times_a_copy_with_a_cold_cache_and_in_a_graph() -> None:
    """A copy of 16 MB fits the cache. Read from memory it takes at least its bytes over 4 times a data sheet's rate."""
    source = [torch.randn(4 * 2**20, device="cuda") for _ in range(3)]
    steps = [lambda x=x: (x * 2,) for x in source]
    timing, results = CudaClock(10).time(steps, lambda number: None)
    assert all(torch.equal(one[0], 2 * x) for one, x in zip(results, source, strict=True))
    assert timing.us > 1e6 * 32 * 2**20 / 13e12
    found = CudaClock(10).graph(lambda: steps)
    assert found is not None
    assert 0 < found[0] < 10 * timing.us
    assert all(torch.equal(one[0], 2 * x) for one, x in zip(found[1], source, strict=True))


@pytest.mark.gpu
def test_a_capture_that_failed_leaves_its_stream() -> None:
    before = torch.cuda.current_stream()
    with pytest.raises(RuntimeError), recording(torch.cuda.CUDAGraph()):
        torch.ones(3, device="cuda").tolist()  # a capture may not wait for the device
    assert torch.cuda.current_stream() == before
    assert torch.ones(3, device="cuda").tolist() == [1.0] * 3
