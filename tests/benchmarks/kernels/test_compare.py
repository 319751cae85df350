"""Contenders at a case: missing, wrong, raising and cheating ones are reported, and the others continue."""

import itertools
import time
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from mvlm_benchmarks.budget import Budget
from mvlm_benchmarks.clock import CpuClock, CudaClock, Refused
from mvlm_benchmarks.kernels.checks import check_kernels
from mvlm_benchmarks.kernels.compare import Ceilings, bench_case, rows_of
from mvlm_benchmarks.kernels.peers import Peer
from mvlm_benchmarks.unavailable import Missing, NotApplicable
from mvlm_kernels.hardware import GPUS, Gpu
from support.benchmarks import FakeClock, toy_case

TOY = toy_case()


def peer(name: str, function=None, *, error: Exception | None = None) -> Peer:
    def build(inputs):
        if error is not None:
            raise error
        assert function is not None
        return function

    return Peer(name, {"toy": build})


GOOD = peer("good", lambda x: x + x)


def gpu_of(flops: float) -> Gpu:
    """A GPU of 1 GB/s."""
    return replace(GPUS["H100"], bandwidth=1e9, flops=flops)


def compared(
    *peers: Peer, case=TOY, clock: FakeClock | CpuClock | None = None, rounds: int = 1, **options
) -> dict[str, list[dict]]:
    """Rows of the passes of every contender."""
    rows = rows_of(case, bench_case(case, "cpu", peers, clock or FakeClock(), rounds), **options)
    return {name: [row for row in rows if row["contender"] == name] for name in {row["contender"] for row in rows}}


class NoBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, *grads):
        raise NotImplementedError("no backward\nhere")


def refuses(x):
    raise RuntimeError("no kernel")


SPOT = torch.zeros(1000)
SPOT[17] = 0.001


@pytest.mark.parametrize(
    "contender, statuses, note",
    [
        (peer("", error=ImportError("No module named 'nothing'")), ["missing"] * 3, "No module named 'nothing'"),
        (peer("", error=Missing("needs a CUDA device")), ["missing"] * 3, "needs a CUDA device"),
        (peer("", error=NotApplicable("has no such op")), ["not applicable"] * 3, "has no such op"),
        (peer("", error=ValueError("bad build")), ["error"] * 3, "ValueError: bad build"),
        (peer("", refuses), ["error"] * 3, "RuntimeError: no kernel"),
        (peer("", NoBackward.apply), ["ok", "error", "error"], "NotImplementedError: no backward here"),
        (peer("", lambda x: x * 2.01), ["WRONG"] * 3, "output is off by 0.005 of its largest value, allowed 1e-04"),
        (peer("", lambda x: (x * 2)[:-1]), ["WRONG"] * 3, "off by inf"),
        (peer("", lambda x: x * 2 + float("nan")), ["WRONG"] * 3, "off by inf"),
        (peer("", lambda x: -2 * x), ["WRONG"] * 3, "off by 2"),
        (peer("", lambda x: x * 2 + SPOT), ["WRONG"] * 3, "off by 0.0005"),
        (peer("", lambda x: x + x.detach()), ["ok", "WRONG", "WRONG"], "gradient is off by 0.5"),
    ],
)
def test_a_contender_without_a_right_result_says_why_and_stops_no_other(contender, statuses, note) -> None:
    rows = compared(contender, GOOD)
    found = rows[""]
    assert [row["status"] for row in found] == statuses
    assert note in found[-1]["note"]
    for row in found:
        if row["status"] != "ok":
            assert all(row[key] is None for key in ("us", "graph_us", "peak_mb", "vs_ours"))
    assert [row["us"] for row in rows["good"]] == [10.0] * 3


HONEST_CALLS = 4
"""More calls than the check before timing makes."""


def doubling(forward: Callable, backward: Callable = lambda gradient: gradient * 2) -> Callable:
    """A function with a forward and a backward pass. `forward` also gets the number of its call, from 1."""
    calls = itertools.count(1)

    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return forward(x, next(calls))

        @staticmethod
        def backward(ctx, *grads):
            return backward(grads[0])

    return Double.apply


def later(cheat: Callable) -> Callable:
    """Honest until the check before timing is over."""
    return doubling(lambda x, call: x * 2 if call <= HONEST_CALLS else cheat(x))


def keep_output() -> Callable:
    """An output kept from the first call with the same tensor, which is found by its address."""
    kept: dict[int, torch.Tensor] = {}
    return doubling(lambda x, call: kept.setdefault(x.data_ptr(), x * 2).clone())


@pytest.mark.parametrize(
    "cheat, status, note",
    [
        (later(lambda x: x * 0), "WRONG", "the timed result of inputs 1 is off by 1 of"),
        (keep_output(), "REFUSED", "after new values were written into the inputs, the result 1 of 2 is off"),
        # Inputs that are made easy, so that the next call has nothing to compute.
        (later(lambda x: (x * 2, x.data.fill_(1))[0]), "REFUSED", "the inputs were changed"),
    ],
    ids=["zeros", "kept output", "changed input"],
)
def test_a_contender_that_cheats_has_no_figure(cheat, status, note) -> None:
    rows = compared(peer("cheat", cheat), clock=CpuClock(0.002), rounds=2)["cheat"]
    refused = [row for row in rows if row["status"] == status]
    assert refused, rows
    assert note in refused[0]["note"]
    for row in refused:
        assert all(row[figure] is None for figure in ("us", "gb_per_s", "graph_us", "peak_mb", "vs_ours"))


@pytest.mark.gpu
def test_work_on_another_stream_has_no_figure() -> None:
    """It begins once the check before timing is over. No stream waits for it."""

    def cheat(x):
        out, stream = torch.empty_like(x), torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(5_000_000)
            torch.mul(x, 2, out=out)
        return out

    entries = bench_case(TOY, "cuda", [peer("stream", later(cheat))], CudaClock(5), 1)
    row = next(row for row in rows_of(TOY, entries) if row["contender"] == "stream")
    assert row["status"] in ("WRONG", "REFUSED")
    assert row["us"] is None


def test_what_does_not_fit_into_the_seconds_is_broken_off() -> None:
    compared()  # the first calls of a process are slow
    slow = Peer("slow", {"toy": lambda inputs: time.sleep(30) or (lambda x: x)})
    start = time.perf_counter()
    rows = rows_of(TOY, bench_case(TOY, "cpu", [slow, GOOD], FakeClock(), 1, budget=Budget(2)))
    assert time.perf_counter() - start < 2
    assert {(row["contender"], row["status"]) for row in rows} == {
        ("ours", "ok"),
        ("slow", "not timed"),
        ("good", "ok"),
    }


def test_graph_that_computes_nothing_is_wrong() -> None:
    class Clock(FakeClock):
        def graph(self, make_steps):
            return 1.0, [tuple(torch.full_like(x, float("nan")) for x in step()) for step in make_steps()]

    rows = compared(clock=Clock())["ours"]
    assert {(row["status"], row["us"], row["graph_us"]) for row in rows} == {("WRONG", None, None)}
    assert "the graph's result of inputs 1 is off by inf" in rows[0]["note"]


def test_results_of_ours_that_differ_between_repeats_are_wrong() -> None:
    calls = []

    def noisy(x, factor=2):
        calls.append(1)
        return x * (factor + 1e-6 * (len(calls) % 3))

    rows = compared(peer("noisy too", noisy), case=toy_case(ours=noisy))
    assert {(row["status"], row["us"]) for row in rows["ours"]} == {("WRONG", None)}
    assert rows["ours"][0]["note"].startswith("repeats differ: ")
    assert {(row["status"], row["us"]) for row in rows["noisy too"]} == {("ok", 10.0)}
    assert "of 5 equal, the first that differs: 1" in rows["noisy too"][0]["repeats"]


def test_contenders_take_turns_and_medians_are_reported() -> None:
    """Two contenders, three rounds: each round is ours forward, backward, both, then good's; the middle one counts."""
    readings: list[float] = [10, 20, 30, 40, 50, 60, 1, 2, 3, 4, 5, 6, 11, 21, 31, 41, 51, 61]
    rows = compared(GOOD, clock=FakeClock(readings), rounds=3)
    assert [row["us"] for row in rows["ours"]] == [10, 20, 30]
    assert [row["us"] for row in rows["good"]] == [40, 50, 60]
    assert [row["vs_ours"] for row in rows["good"]] == [4.0, 2.5, 2.0]
    assert [row["verdict"] for row in rows["good"]] == ["slower"] * 3


def test_rates_and_roofline_match_a_count_by_hand() -> None:
    """8,000 bytes at 1 GB/s are 8 us and 1,000 operations at 1 GFLOPS are 1 us: memory decides, at 10 us 80 %."""
    half = toy_case(dtype=torch.float16)

    def of_ours(ceilings, case=half) -> list[dict]:
        return compared(case=case, ceilings=ceilings)["ours"]

    forward, _, both = of_ours(Ceilings(gpu_of(1e9)))
    assert (forward["gb_per_s"], forward["roofline_pct"], forward["bytes_minimum"]) == (0.8, 80.0, 8000)
    assert (both["gb_per_s"], both["roofline_pct"], both["bytes_minimum"]) == (1.6, 160.0, 16000)
    # At 0.3 GFLOPS backward's 3,000 operations take 10 us and its bytes 8.
    assert of_ours(Ceilings(gpu_of(0.3e9)))[1]["roofline_pct"] == pytest.approx(100)
    # The table's operations are bfloat16's: float32 has no roofline in it; nor has an unknown machine.
    for rows in (of_ours(Ceilings(gpu_of(1e9)), TOY), of_ours(Ceilings())):
        assert all(row["roofline_pct"] is None for row in rows)


def test_kernels_of_another_implementation_are_refused() -> None:
    """Also if none was expected, or if they run on a stream that no timer sees."""
    assert check_kernels(["a"], [("a", 7), ("fill", 7), ("a", 7)]) == "a x2; fill x1"
    for expected, launched in ((["a"], [("gemm", 7)]), ([], [("gemm", 7)]), (["a"], [("a", 7), ("a", 8)])):
        with pytest.raises(Refused):
            check_kernels(expected, launched)
