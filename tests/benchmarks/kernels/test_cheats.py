"""Cheating contenders: each is refused, and would be timed if the check that refuses it were missing."""

import importlib
import pkgutil
from unittest.mock import patch

import pytest
import torch

from mvlm_benchmarks import clock
from mvlm_benchmarks.clock import CpuClock, CudaClock
from mvlm_benchmarks.kernels import measure, reference
from mvlm_benchmarks.kernels.compare import bench_case, rows_of
from mvlm_benchmarks.kernels.peers import Peer
from support import cheats
from support.benchmarks import FakeClock, toy_case

TOY = toy_case()
NAMES = [module.name for module in pkgutil.iter_modules(cheats.__path__)]
SAID = {
    "zeros": ("WRONG", "the timed result of inputs 1 is off by 1 of"),
    "unwritten": ("WRONG", "the timed result of inputs 1 is off by inf"),
    "kept_output": ("REFUSED", "after new values were written into the inputs, the result 1 of 2 is off"),
    "kept_gradient": ("WRONG", "the timed result of inputs 2 is off"),
    "changed_input": ("REFUSED", "the inputs were changed"),
    "other_thread": ("WRONG", "the timed result of inputs 1 is off by inf"),
    "patched_timer": ("REFUSED", "time.perf_counter was replaced"),
}


def rows_of_cheat(name: str, timer=None) -> list[dict]:
    module = importlib.import_module(f"support.cheats.{name}")
    function = module.make()
    peer = Peer(name, {"toy": lambda inputs: function})
    try:
        entries = bench_case(TOY, "cpu", [peer], timer or CpuClock(0.002), 2)
    finally:
        getattr(module, "restore", lambda: None)()
    return [row for row in rows_of(TOY, entries) if row["contender"] == name]


def test_every_cheat_of_the_folder_is_tried() -> None:
    assert set(NAMES) == set(SAID)


@pytest.mark.parametrize("name", NAMES)
def test_cheat_is_refused(name: str) -> None:
    rows = rows_of_cheat(name)
    status, note = SAID[name]
    refused = [row for row in rows if row["status"] == status]
    assert refused, rows
    assert note in refused[0]["note"]
    for row in refused:
        assert all(row[figure] is None for figure in ("us", "gb_per_s", "graph_us", "peak_mb", "vs_ours"))


def test_honest_contender_is_timed() -> None:
    entries = bench_case(TOY, "cpu", [Peer("honest", {"toy": lambda inputs: lambda x: x + x})], CpuClock(0.002), 2)
    rows = [row for row in rows_of(TOY, entries) if row["contender"] == "honest"]
    assert [row["status"] for row in rows] == ["ok"] * 3
    assert all(row["us"] > 0 for row in rows)
    assert {row["repeats"] for row in rows} == {"5 of 5 equal"}


WITHOUT = {  # cheat -> the check that it would pass without
    "zeros": (measure.LocalContender, "check_timed"),
    "kept_output": (measure.LocalContender, "check_kept_results"),
    "changed_input": (reference.CaseData, "restore"),
    "patched_timer": (clock, "require_own_timers"),
}


@pytest.mark.parametrize("name", WITHOUT)
def test_cheat_would_be_timed_without_its_check(name: str) -> None:
    owner, check = WITHOUT[name]
    timer = CpuClock(0.0)  # five calls: a patched timer never reaches a later end
    others = [(measure.LocalContender, "check_timed"), (measure.LocalContender, "check_kept_results")]
    with patch.object(owner, check, lambda *_, **__: None):
        if name == "changed_input":  # its results are wrong too, from the second call on
            with patch.object(*others[0], lambda *_: None), patch.object(*others[1], lambda *_: None):
                rows = rows_of_cheat(name, timer)
        elif name == "zeros":
            with patch.object(*others[1], lambda *_: None):
                rows = rows_of_cheat(name, timer)
        else:
            rows = rows_of_cheat(name, timer)
    assert rows[0]["status"] == "ok"
    assert rows[0]["us"] is not None


def test_output_kept_for_an_unmodified_tensor_is_computed_in_every_call() -> None:
    """A cheat that also looks at the tensor's version finds nothing kept: each timed call is honest work."""
    kept, computed = {}, []

    def function(x):
        key = x.data_ptr(), x._version
        if key not in kept:
            computed.append(1)
            kept[key] = x.detach() * 2
        return kept[key] + (x - x.detach())

    class Clock(FakeClock):
        def time(self, steps, prepare):
            for number in (0, 1, 0, 1):
                prepare(number)
                before = len(computed)
                steps[number]()
                timed.append(len(computed) - before)
            return super().time(steps, prepare)

    timed: list[int] = []
    data = reference.CaseData.make(TOY, "cpu")
    measure.LocalContender(data, [function] * 2, Clock()).time("forward")
    assert timed == [1, 1, 1, 1]


def test_graph_that_computes_nothing_is_wrong() -> None:
    class Clock(FakeClock):
        def graph(self, make_steps):
            return 1.0, [tuple(torch.full_like(x, float("nan")) for x in step()) for step in make_steps()]

    rows = rows_of(TOY, bench_case(TOY, "cpu", [], Clock(), 1))
    assert {(row["status"], row["us"], row["graph_us"]) for row in rows} == {("WRONG", None, None)}
    assert "the graph's result of inputs 1 is off by inf" in rows[0]["note"]


class OnAnotherStream(torch.autograd.Function):
    """y = 2 x, computed on another stream once the check before timing is over. No stream waits for it."""

    calls = 0

    @staticmethod
    def forward(ctx, x):
        OnAnotherStream.calls += 1
        if OnAnotherStream.calls <= cheats.HONEST_CALLS:
            return x * 2
        out, stream = torch.empty_like(x), torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(5_000_000)
            torch.mul(x, 2, out=out)
        return out

    @staticmethod
    def backward(ctx, *grads):
        return grads[0] * 2


@pytest.mark.gpu
def test_work_on_another_stream_is_refused() -> None:
    peer = Peer("stream", {"toy": lambda inputs: OnAnotherStream.apply})
    entries = bench_case(TOY, "cuda", [peer], CudaClock(5), 1)
    rows = [row for row in rows_of(TOY, entries) if row["contender"] == "stream"]
    assert rows[0]["status"] in ("WRONG", "REFUSED")
    assert rows[0]["us"] is None
