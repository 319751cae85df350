"""Clocks that measure the time and peak memory of calls on a CPU or a GPU.

A clock gets several steps: the same call on several sets of inputs, which it times in turn. It also returns the last
timed result of each step, copied as soon as its timer stopped. So what is checked is what was timed, and a result that
another thread or stream finishes later is wrong.
"""

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
Results = tuple[Tensor, ...]
Step = Callable[[], Results]
"""A call that returns all tensors it computed."""
Prepare = Callable[[int], None]
"""Work before each timed call of the step with this number, outside the timed region."""

GRAPH_CALLS = 10
"""Calls in one CUDA graph. Launching a graph takes a few microseconds, which ten calls share."""


class Refused(Exception):
    """The contender tampers with the measurement."""


class WrongValue(Exception):
    """A result differs from the reference. Figures of a wrong kernel are worth nothing; those of the others stay."""


@dataclass(frozen=True)
class Timing:
    """Time of a call in microseconds: median, 20th and 80th percentile, the time of every call, and processor time."""

    us: float
    p20: float
    p80: float
    calls: tuple[float, ...] = ()
    cpu_us: float | None = None
    """Median of the processor time of all threads of this process; None on a GPU."""

    @classmethod
    def of(cls, calls: Sequence[float], cpu: Sequence[float] = ()) -> "Timing":
        """Timing of at least two calls, in microseconds. cpu: the processor time of each."""
        fifths = statistics.quantiles(calls, n=5)
        cpu_us = statistics.median(cpu) if cpu else None
        return cls(statistics.median(calls), fifths[0], fifths[3], tuple(calls), cpu_us)


class Busy(Exception):
    """The device still works when the timer has stopped, or the host was held up while it asked.

    A figure is not known then. It is no sign of a cheat.
    """


def twice_if_busy(measure: Callable[[], T]) -> T:
    """Result of `measure`. A host that was held up is measured again; work on another stream comes again too."""
    try:
        return measure()
    except Busy:
        return measure()


class Clock(Protocol):
    """Measures steps on one type of device."""

    def time(self, steps: Sequence[Step], prepare: Prepare) -> tuple[Timing, list[Results]]:
        """The time of a call, and for each step its last timed results."""
        ...

    def graph(self, make_steps: Callable[[], Sequence[Step]]) -> tuple[float, list[Results]] | None:
        """Microseconds of one call inside a CUDA graph, and the results that the timed graph left; None on a CPU.

        `make_steps` is called on the stream that is captured.
        """
        ...

    def peak_mb(self, step: Step) -> float | None:
        """Megabytes (10^6) allocated at the peak, above those before the call; None on a CPU."""
        ...


_TIMERS = (
    (time, "perf_counter"), (time, "process_time"), (time, "sleep"), (torch, "equal"), (torch.autograd, "grad"),
    (torch.cuda, "Event"), (torch.cuda, "synchronize"), (torch.cuda, "current_stream"), (torch.cuda, "CUDAGraph"),
    (torch.cuda.Event, "record"), (torch.cuda.Event, "elapsed_time"), (torch.cuda.Event, "synchronize"),
    (torch.profiler, "profile"),
)  # fmt: skip
_ORIGINALS = [getattr(owner, name) for owner, name in _TIMERS]
_perf_counter, _process_time = time.perf_counter, time.process_time


def require_own_timers() -> None:
    """Raise Refused if a function that measures or compares is not the one that was imported first."""
    for (owner, name), original in zip(_TIMERS, _ORIGINALS, strict=True):
        if getattr(owner, name) is not original:
            raise Refused(f"{getattr(owner, '__name__', owner)}.{name} was replaced, so its figures prove nothing")


def copied(results: Results) -> Results:
    """Copies of results, made on the current stream."""
    return tuple(x.detach().clone() for x in results)


@dataclass(frozen=True)
class CpuClock:
    """Wall-clock and processor times of at least five calls, after one call of each step for warm-up."""

    seconds: float
    """Least wall-clock seconds of a measurement, which calls the steps in turn."""

    def time(self, steps: Sequence[Step], prepare: Prepare) -> tuple[Timing, list[Results]]:
        for number, step in enumerate(steps):
            prepare(number)
            step()
        times: list[float] = []
        cpu: list[float] = []
        last: list[Results] = [()] * len(steps)
        end = _perf_counter() + self.seconds
        while len(times) < max(5, len(steps)) or _perf_counter() < end:
            number = len(times) % len(steps)
            prepare(number)
            start_cpu, start = _process_time(), _perf_counter()
            results = steps[number]()
            times.append(1e6 * (_perf_counter() - start))
            cpu.append(1e6 * (_process_time() - start_cpu))
            last[number] = copied(results)
            del results
        require_own_timers()
        return Timing.of(times, cpu), last

    def graph(self, make_steps: Callable[[], Sequence[Step]]) -> tuple[float, list[Results]] | None:
        return None

    def peak_mb(self, step: Step) -> float | None:
        return None


@dataclass(frozen=True)
class CudaClock:
    """Times from CUDA events around each call, with a clean L2 cache.

    Before each call 1 GiB is read, which leaves nothing of the inputs in the cache and nothing for the timed call to
    write back. Overwriting the cache instead would leave dirty lines, and up to 15 us of writing them. Reading takes a
    third of a millisecond, in which the host gets ahead: its launches are not timed unless they take longer.
    """

    milliseconds: int
    """Duration of a measurement, without the work between the calls."""

    def time(self, steps: Sequence[Step], prepare: Prepare) -> tuple[Timing, list[Results]]:
        flush = torch.zeros(2**28, dtype=torch.float32, device="cuda")
        total = torch.empty((), device="cuda")
        last: list[Results] = [()] * len(steps)

        def timed(number: int) -> tuple[Any, Any]:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            prepare(number)
            torch.sum(flush, dim=0, out=total)
            start.record()
            results = steps[number]()
            end.record()
            last[number] = copied(results)
            return start, end

        for _ in range(2):  # the first calls compile
            events = [timed(number) for number in range(len(steps))]
        torch.cuda.synchronize()
        estimate = statistics.median(start.elapsed_time(end) for start, end in events)
        count = min(max(10, 2 * len(steps), round(self.milliseconds / max(estimate, 1e-3))), 1000)

        def measure() -> list[tuple[Any, Any]]:
            found = [timed(number % len(steps)) for number in range(count)]
            _require_idle()
            return found

        events = twice_if_busy(measure)
        require_own_timers()
        return Timing.of([1e3 * start.elapsed_time(end) for start, end in events]), last

    def graph(self, make_steps: Callable[[], Sequence[Step]]) -> tuple[float, list[Results]] | None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            # autograd runs a backward on the stream of its forward, so the steps are made on the graph's stream.
            steps = make_steps()
            for step in steps:
                step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        results: list[Results] = []
        with recording(graph, stream):
            for number in range(GRAPH_CALLS):
                # Results are in the graph's memory. The last ones of each step are kept as long as the graph.
                results = [*results, steps[number % len(steps)]()][-len(steps) :]
        ordered = [results[(number - GRAPH_CALLS) % len(steps)] for number in range(len(steps))]
        graph.replay()
        with torch.no_grad():  # poison: a graph that computes nothing leaves NaN
            for x in (x for one in ordered for x in one):
                x.fill_(float("nan") if x.is_floating_point() else 1)

        def measure() -> list[tuple[Any, Any]]:
            events = []
            for _ in range(max(5, self.milliseconds)):
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                graph.replay()
                end.record()
                events.append((start, end))
            _require_idle()
            return events

        events = twice_if_busy(measure)
        require_own_timers()
        us = statistics.median(1e3 * start.elapsed_time(end) / GRAPH_CALLS for start, end in events)
        return us, [copied(one) for one in ordered]

    def peak_mb(self, step: Step) -> float | None:
        step()
        return cuda_peak_mb(step)


def cuda_peak_mb(call: Callable[[], Any]) -> float:
    """Megabytes (10^6) that a call allocates at its peak on the GPU, above those before it."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


@contextlib.contextmanager
def recording(graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream | None = None) -> Iterator[None]:
    """Record the calls of a block into a CUDA graph, as `torch.cuda.graph` does, which a failure would leave open.

    What follows a failed capture would run on its stream, and the allocator would take it for a part of the graph.
    """
    before, pool = torch.cuda.current_stream(), torch.cuda.graph_pool_handle()
    try:
        with torch.cuda.graph(graph, pool=pool, stream=stream):
            yield
    except BaseException:
        torch.cuda.set_stream(before)
        with contextlib.suppress(RuntimeError, AttributeError):  # the capture could be ended, and released the pool
            torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
            torch._C._cuda_releasePool(torch.cuda.current_device(), pool)
        raise


def _require_idle() -> None:
    """Raise Busy if the device still works when the last timed call of the current stream has ended."""
    torch.cuda.current_stream().synchronize()
    start = _perf_counter()
    torch.cuda.synchronize()
    waited = 1e6 * (_perf_counter() - start)
    if waited > 500:  # far above the host's own cost of a synchronisation
        raise Busy(f"the device worked for {waited:.0f} us more on another stream when the timer had stopped")


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
    """The clock of a device, "cpu" or "cuda"; `quick` takes less time."""
    if device == "cuda":
        return CudaClock(4 if quick else 10)
    return CpuClock(0.01 if quick else 0.05)
