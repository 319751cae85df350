"""Cheating contenders: each is refused.

The toy case is y = 2 x. A cheat that knows of the check before timing is honest for its first calls.
"""

import threading
import time
from collections.abc import Callable

import pytest
import torch

from mvlm_benchmarks.clock import CpuClock, CudaClock
from mvlm_benchmarks.kernels.checks import relative_error, same_bits
from mvlm_benchmarks.kernels.compare import bench_case, rows_of
from mvlm_benchmarks.kernels.peers import Peer
from support.benchmarks import FakeClock, toy_case

TOY = toy_case()
HONEST_CALLS = 4
"""More calls than the check before timing makes."""


def doubling(forward: Callable, backward: Callable = lambda gradient: gradient * 2) -> Callable:
    """A function with a forward and a backward pass. `forward` also gets the number of its call, from 1."""
    calls = []

    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            calls.append(1)
            return forward(x, len(calls))

        @staticmethod
        def backward(ctx, *grads):
            return backward(grads[0])

    return Double.apply


def zeros() -> Callable:
    """Zeros of the right shape, once the check before timing is over."""
    return doubling(lambda x, call: x * 2 if call <= HONEST_CALLS else x * 0)


def unwritten() -> Callable:
    """Memory that nobody writes: after an honest call it may still hold the right values."""
    return doubling(lambda x, call: x * 2 if call <= HONEST_CALLS else torch.empty_like(x))


def kept_output() -> Callable:
    """An output kept from the first call with the same tensor, which is found by its address."""
    kept: dict[int, torch.Tensor] = {}
    return doubling(lambda x, call: kept.setdefault(x.data_ptr(), x * 2).clone())


def kept_gradient() -> Callable:
    """A gradient kept from the first backward pass."""
    kept: dict[str, torch.Tensor] = {}
    return doubling(lambda x, call: x * 2, lambda gradient: kept.setdefault("first", gradient * 2).clone())


def changed_input() -> Callable:
    """Inputs that are made easy: all ones, in place, so that the next call has nothing to compute."""

    def forward(x, call):
        out = x * 2
        return out if call <= HONEST_CALLS else (out, x.data.fill_(1))[0]

    return doubling(forward)


def on_another_thread(x, call):
    """Work which the timer does not wait for. On a GPU the same is another stream."""
    if call <= HONEST_CALLS:
        return x * 2
    out, source = torch.empty_like(x), x.detach()
    target = out.detach()

    def work() -> None:
        time.sleep(0.2)  # far longer than a timer needs to stop, also on a busy machine
        torch.mul(source, 2, out=target)

    threading.Thread(target=work).start()
    return out


def patched_timer() -> Callable:
    """A timer that stands still."""

    def forward(x, call):
        time.perf_counter = lambda: 0.0
        return x * 2

    return doubling(forward)


CHEATS = {  # cheat -> what the row says
    zeros: ("WRONG", "the timed result of inputs 1 is off by 1 of"),
    unwritten: ("WRONG", "the timed result of inputs 1 is off by inf"),
    kept_output: ("REFUSED", "after new values were written into the inputs, the result 1 of 2 is off"),
    kept_gradient: ("WRONG", "the timed result of inputs 2 is off"),
    changed_input: ("REFUSED", "the inputs were changed"),
    # The other thread may have written a part when the result is looked at.
    lambda: doubling(on_another_thread): ("WRONG", "the timed result of inputs 1 is off by"),
    patched_timer: ("REFUSED", "time.perf_counter was replaced"),
}


def rows_of_contender(make: Callable, timer=None) -> list[dict]:
    function, real = make(), time.perf_counter
    peer = Peer("contender", {"toy": lambda inputs: function})
    try:
        entries = bench_case(TOY, "cpu", [peer], timer or CpuClock(0.002), 2)
    finally:
        time.perf_counter = real
    return [row for row in rows_of(TOY, entries) if row["contender"] == "contender"]


@pytest.mark.parametrize("cheat", CHEATS, ids=lambda cheat: cheat.__name__)
def test_cheat_is_refused(cheat) -> None:
    rows = rows_of_contender(cheat)
    status, note = CHEATS[cheat]
    refused = [row for row in rows if row["status"] == status]
    assert refused, rows
    assert note in refused[0]["note"]
    for row in refused:
        assert all(row[figure] is None for figure in ("us", "gb_per_s", "graph_us", "peak_mb", "vs_ours"))


def test_honest_contender_is_timed() -> None:
    rows = rows_of_contender(lambda: lambda x: x + x)
    assert [row["status"] for row in rows] == ["ok"] * 3
    assert all(row["us"] > 0 for row in rows)
    assert {row["repeats"] for row in rows} == {"5 of 5 equal"}


def test_graph_that_computes_nothing_is_wrong() -> None:
    class Clock(FakeClock):
        def graph(self, make_steps):
            return 1.0, [tuple(torch.full_like(x, float("nan")) for x in step()) for step in make_steps()]

    rows = rows_of(TOY, bench_case(TOY, "cpu", [], Clock(), 1))
    assert {(row["status"], row["us"], row["graph_us"]) for row in rows} == {("WRONG", None, None)}
    assert "the graph's result of inputs 1 is off by inf" in rows[0]["note"]


def test_errors_are_over_the_largest_wanted_value_and_repeats_are_compared_by_bits() -> None:
    assert relative_error(torch.tensor([1.0, -3.0]), torch.tensor([1.0, -4.0], dtype=torch.float64)) == 0.25
    nan = torch.tensor([float("nan"), 0.0])
    assert same_bits(nan, nan.clone())
    assert not same_bits(nan, torch.tensor([float("nan"), -0.0]))
    assert not same_bits(torch.zeros(2), torch.zeros(2, dtype=torch.int32))


@pytest.mark.gpu
def test_work_on_another_stream_is_refused() -> None:
    """It begins once the check before timing is over. No stream waits for it."""

    def forward(x, call):
        if call <= HONEST_CALLS:
            return x * 2
        out, stream = torch.empty_like(x), torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(5_000_000)
            torch.mul(x, 2, out=out)
        return out

    function = doubling(forward)
    entries = bench_case(TOY, "cuda", [Peer("stream", {"toy": lambda inputs: function})], CudaClock(5), 1)
    rows = [row for row in rows_of(TOY, entries) if row["contender"] == "stream"]
    assert rows[0]["status"] in ("WRONG", "REFUSED")
    assert rows[0]["us"] is None
