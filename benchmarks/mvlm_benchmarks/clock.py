"""How long a step takes on a CPU or a GPU, and the memory it takes there."""

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
    """Microseconds: the median, and the 20th and 80th percentile."""

    us: float
    p20: float
    p80: float


class Clock(Protocol):
    """How steps are measured on one kind of device. ``time`` in microseconds; the other two are None on a CPU.

    graph takes a function that makes the step, because what a CUDA graph captures has to be made on its stream.
    """

    def time(self, step: Step) -> Timing: ...

    def graph(self, make_step: Callable[[], Step]) -> float | None: ...

    def peak_mb(self, step: Step) -> float | None: ...


@dataclass(frozen=True)
class CpuClock:
    seconds: float

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
    milliseconds: int

    def time(self, step: Step) -> Timing:
        """triton's do_bench: CUDA events around each call, the L2 cache overwritten before it."""
        from triton.testing import do_bench

        times: Any = do_bench(step, warmup=25, rep=self.milliseconds, quantiles=[0.5, 0.2, 0.8])
        return Timing(*(1e3 * t for t in times))

    def graph(self, make_step: Callable[[], Step]) -> float | None:
        """The same of a CUDA graph of one call: without what the host needs to launch it."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            # Backward runs on the stream its forward ran on, so the step is made here.
            step = make_step()
            for _ in range(3):
                step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            # Held until the graph is gone: the result lives in the graph's memory.
            kept = step()
        us = self.time(graph.replay).us
        del kept
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
def settings(device: str) -> Iterator[None]:
    """What every contender is measured under."""
    import torch._functorch.config as compiler

    precision = torch.get_float32_matmul_precision()
    if device == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 for all, as in training; without it ours takes no float32
    # A compiled backward may reuse what forward saved as scratch, and then cannot run twice, as timing it alone needs.
    with compiler.patch(donated_buffer=False):
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(precision)


def make_clock(device: str, quick: bool) -> Clock:
    """The clock of a device, "cpu" or "cuda"; quick: a fifth of the time."""
    if device == "cuda":
        return CudaClock(10 if quick else 50)
    return CpuClock(0.01 if quick else 0.05)
