"""Clocks that measure the time and peak memory of a call on a CPU or a GPU."""

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch

Step = Callable[[], Any]


@dataclass(frozen=True)
class Timing:
    """Time of a call in microseconds: median, 20th and 80th percentile."""

    us: float
    p20: float
    p80: float


class Clock(Protocol):
    """Measures a step, which may be any call, on one type of device."""

    def time(self, step: Step) -> Timing: ...

    def graph(self, make_step: Callable[[], Step]) -> float | None:
        """Microseconds of one call as a CUDA graph; None on a CPU.

        `make_step` is called on the stream that is captured.
        """
        ...

    def peak_mb(self, step: Step) -> float | None:
        """Megabytes (10^6) allocated at the peak, above those before the call; None on a CPU."""
        ...


@dataclass(frozen=True)
class CpuClock:
    """Wall-clock times of at least five calls, after one call for warm-up."""

    seconds: float
    """Duration of a measurement."""

    def time(self, step: Step) -> Timing:
        step()
        times, end = [], time.perf_counter() + self.seconds
        while len(times) < 5 or time.perf_counter() < end:
            start = time.perf_counter()
            step()
            times.append(1e6 * (time.perf_counter() - start))
        fifths = statistics.quantiles(times, n=5)
        return Timing(statistics.median(times), fifths[0], fifths[3])

    def graph(self, make_step: Callable[[], Step]) -> float | None:
        return None

    def peak_mb(self, step: Step) -> float | None:
        return None


@dataclass(frozen=True)
class CudaClock:
    """Times of triton's do_bench: CUDA events around each call, with the L2 cache overwritten before it."""

    milliseconds: int
    """Duration of a measurement."""

    def time(self, step: Step) -> Timing:
        from triton.testing import do_bench

        times: Any = do_bench(step, warmup=25, rep=self.milliseconds, quantiles=[0.5, 0.2, 0.8])
        return Timing(*(1e3 * t for t in times))

    def graph(self, make_step: Callable[[], Step]) -> float | None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            # autograd runs a backward on the stream of its forward, so the step is made on the graph's stream.
            step = make_step()
            for _ in range(3):
                step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            # The result is in the graph's memory, so keep it as long as the graph.
            result = step()
        us = self.time(graph.replay).us
        del result
        return us

    def peak_mb(self, step: Step) -> float | None:
        step()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 1e6


@contextlib.contextmanager
def torch_settings(device: str) -> Iterator[None]:
    """Set torch as every contender is measured, and restore the settings on exit. device: "cpu" or "cuda"."""
    import torch._functorch.config as compiler

    precision = torch.get_float32_matmul_precision()
    if device == "cuda":
        # TF32, as in training. Our kernels accept float32 only if TF32 is allowed.
        torch.set_float32_matmul_precision("high")
    # A compiled backward may overwrite buffers that forward saved. Here backward runs many times on one forward.
    with compiler.patch(donated_buffer=False):
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(precision)


def make_clock(device: str, quick: bool) -> Clock:
    """The clock of a device, "cpu" or "cuda"; `quick` takes a fifth of the time."""
    if device == "cuda":
        return CudaClock(10 if quick else 50)
    return CpuClock(0.01 if quick else 0.05)
