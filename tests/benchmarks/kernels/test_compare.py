"""Comparison of contenders at a case: missing, wrong and raising ones are reported, and the others continue."""

import pytest
import torch

from mvlm_benchmarks.ceilings import MemoryRates
from mvlm_benchmarks.kernels.checks import check_kernels
from mvlm_benchmarks.kernels.compare import Ceilings, bench_case, rows_of
from mvlm_benchmarks.kernels.measure import LocalContender
from mvlm_benchmarks.kernels.peers import Peer
from mvlm_benchmarks.unavailable import Missing, NotApplicable
from mvlm_kernels.hardware import Gpu
from support.benchmarks import FakeClock, toy_case


def peer(name: str, function=None, *, error: Exception | None = None) -> Peer:
    def build(inputs):
        if error is not None:
            raise error
        assert function is not None
        return function

    return Peer(name, {"toy": build})


TOY = toy_case()
GOOD = peer("good", lambda x: x + x)


def by_contender(case, entries, **options):
    rows = rows_of(case, entries, **options)
    return {name: [row for row in rows if row["contender"] == name] for name in {row["contender"] for row in rows}}


def test_missing_peer_is_named_with_its_reason() -> None:
    absent = [
        peer("no-package", error=ImportError("No module named 'nothing'")),
        peer("no-gpu", error=Missing("needs a CUDA device")),
        peer("elsewhere", error=NotApplicable("has no such op")),
    ]
    rows = by_contender(TOY, bench_case(TOY, "cpu", [*absent, GOOD], FakeClock(), 1))
    assert {(r["status"], r["note"]) for r in rows["no-package"]} == {("missing", "No module named 'nothing'")}
    assert {(r["status"], r["note"]) for r in rows["no-gpu"]} == {("missing", "needs a CUDA device")}
    assert {(r["status"], r["note"]) for r in rows["elsewhere"]} == {("not applicable", "has no such op")}
    assert all(r["us"] is None for name in ("no-package", "no-gpu", "elsewhere") for r in rows[name])
    assert [r["us"] for r in rows["good"]] == [10.0] * 3


def test_peer_of_other_ops_is_no_contender() -> None:
    entries = bench_case(TOY, "cpu", [Peer("other", {"another_op": lambda inputs: torch.neg})], FakeClock(), 1)
    assert [entry.contender for entry in entries] == ["ours"]


@pytest.mark.parametrize(
    "function",
    [lambda x: x * 2.01, lambda x: (x * 2)[:-1], lambda x: x * 2 + x.new_full((), float("nan")), lambda x: -2 * x],
    ids=["off by half a per cent", "another shape", "nan", "sign"],
)
def test_wrong_peer_is_reported_and_not_timed(function) -> None:
    clock = FakeClock()
    rows = by_contender(TOY, bench_case(TOY, "cpu", [peer("liar", function)], clock, 2))
    assert {r["status"] for r in rows["liar"]} == {"WRONG"}
    assert "allowed 1e-04" in rows["liar"][0]["note"]
    assert all(r[key] is None for r in rows["liar"] for key in ("us", "graph_us", "peak_mb", "vs_ours"))
    assert clock.times == 2 * 3  # ours alone


def test_peer_with_one_wrong_value_is_wrong() -> None:
    spot = torch.zeros(1000)
    spot[17] = 0.001
    rows = by_contender(TOY, bench_case(TOY, "cpu", [peer("almost", lambda x: x * 2 + spot)], FakeClock(), 1))
    assert {r["status"] for r in rows["almost"]} == {"WRONG"}


def test_wrong_gradient_fails_backward_and_not_forward() -> None:
    rows = by_contender(TOY, bench_case(TOY, "cpu", [peer("half", lambda x: x + x.detach())], FakeClock(), 1))
    assert {r["pass"]: r["status"] for r in rows["half"]} == {"forward": "ok", "backward": "WRONG", "both": "WRONG"}
    assert "gradient is off by 0.5" in rows["half"][1]["note"]


def test_peer_that_raises_does_not_stop_the_others() -> None:
    class NoBackward(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, *grads):
            raise NotImplementedError("no backward\nhere")

    def refuses(x):
        raise RuntimeError("no kernel for this shape")

    contenders = [
        peer("builder", error=ValueError("bad build")), peer("call", refuses), peer("late", NoBackward.apply), GOOD,
    ]  # fmt: skip
    rows = by_contender(TOY, bench_case(TOY, "cpu", contenders, FakeClock(), 1))
    assert {(r["status"], r["note"]) for r in rows["builder"]} == {("error", "ValueError: bad build")}
    assert {(r["status"], r["note"]) for r in rows["call"]} == {("error", "RuntimeError: no kernel for this shape")}
    assert [r["status"] for r in rows["late"]] == ["ok", "error", "error"]
    assert rows["late"][1]["note"] == "NotImplementedError: no backward here"
    assert [r["status"] for r in rows["good"]] == ["ok"] * 3


def test_error_while_timing_ends_that_pass_only() -> None:
    clock = FakeClock()

    def tires(x):
        if clock.times == 4:  # ours has three passes, then this one its first
            raise RuntimeError("out of memory")
        return x * 2

    rows = by_contender(TOY, bench_case(TOY, "cpu", [peer("tires", tires), GOOD], clock, 1))
    assert [r["status"] for r in rows["tires"]] == ["ok", "error", "error"]
    assert rows["tires"][1]["note"] == "time: RuntimeError: out of memory"
    assert [r["us"] for r in rows["tires"]] == [10.0, None, None]
    assert [r["us"] for r in rows["good"]] == [10.0] * 3


def test_contender_that_cannot_be_checked_after_timing_has_no_figure() -> None:
    clock = FakeClock()

    def tires(x):
        if clock.times == 6:
            raise RuntimeError("out of memory")
        return x * 2

    rows = by_contender(TOY, bench_case(TOY, "cpu", [peer("tires", tires)], clock, 1))
    assert {(r["status"], r["us"]) for r in rows["tires"]} == {("error", None)}
    assert rows["tires"][0]["note"] == "checks after timing: RuntimeError: out of memory"


def test_rows_have_no_ratio_when_ours_failed() -> None:
    clock = FakeClock()

    def tires(x, factor):
        if clock.times >= 6:  # in the second round
            raise RuntimeError("out of memory")
        return x * factor

    ours = toy_case(ours=tires)
    rows = by_contender(ours, bench_case(ours, "cpu", [GOOD], clock, 2))
    assert [(r["status"], r["us"]) for r in rows["ours"]] == [("error", None)] * 3
    assert [(r["status"], r["us"], r["vs_ours"]) for r in rows["good"]] == [("ok", 10.0, None)] * 3


def test_op_that_this_version_lacks_is_missing_and_its_peers_are_timed() -> None:
    rows = by_contender(TOY, bench_case(toy_case(ours=None), "cpu", [GOOD], FakeClock(), 1))
    assert {(r["status"], r["note"]) for r in rows["ours"]} == {("missing", "this version of mvlm_kernels has no toy")}
    assert [r["us"] for r in rows["good"]] == [10.0] * 3


def test_difference_within_the_noise_is_said_to_be_none() -> None:
    """Two rounds: good's second pass is as fast as ours on average, its first twice as slow in both rounds."""
    clock = FakeClock([10, 20, 30, 20, 22, 60, 10, 20, 30, 20, 18, 60])
    forward, backward, both = by_contender(TOY, bench_case(TOY, "cpu", [GOOD], clock, 2))["good"]
    assert [r["verdict"] for r in (forward, backward, both)] == ["slower", "no difference", "slower"]
    assert backward["vs_ours_low"] == 0.9
    assert backward["vs_ours_high"] == 1.1


def test_results_of_ours_that_differ_between_repeats_are_wrong() -> None:
    calls = []

    def noisy(x, factor):
        calls.append(1)
        return x * (factor + 1e-6 * (len(calls) % 3))

    case = toy_case(ours=noisy)
    rows = by_contender(case, bench_case(case, "cpu", [peer("noisy too", lambda x: noisy(x, 2))], FakeClock(), 1))
    assert {(r["status"], r["us"]) for r in rows["ours"]} == {("WRONG", None)}
    assert rows["ours"][0]["note"].startswith("repeats differ: ")
    assert {(r["status"], r["us"]) for r in rows["noisy too"]} == {("ok", 10.0)}
    assert "of 5 equal, the first that differs: 1" in rows["noisy too"][0]["repeats"]


def test_failed_graph_capture_is_a_note() -> None:
    clock = FakeClock(graph_error="capture failed")
    rows = by_contender(TOY, bench_case(TOY, "cpu", [], clock, 1))["ours"]
    assert {(r["status"], r["us"], r["graph_us"]) for r in rows} == {("ok", 10.0, None)}
    assert rows[0]["note"] == "graph: RuntimeError: capture failed"


def test_failing_reference_is_an_error_of_every_contender() -> None:
    def fails(**_):
        raise RuntimeError("too large")

    broken = toy_case(reference=fails)
    rows = rows_of(broken, bench_case(broken, "cpu", [GOOD], FakeClock(), 1))
    assert {row["note"] for row in rows} == {"the float64 reference did not run: RuntimeError: too large"}
    assert {row["contender"] for row in rows} == {"ours", "good"}


def test_contenders_take_turns_and_medians_are_reported() -> None:
    """Two contenders, three rounds: each round is ours forward, backward, both, then good's; the middle one counts."""
    clock = FakeClock([10, 20, 30, 40, 50, 60, 1, 2, 3, 4, 5, 6, 11, 21, 31, 41, 51, 61])
    rows = by_contender(TOY, bench_case(TOY, "cpu", [GOOD], clock, 3))
    assert [r["us"] for r in rows["ours"]] == [10, 20, 30]
    assert [r["us"] for r in rows["good"]] == [40, 50, 60]
    assert [(r["us_p20"], r["us_p80"]) for r in rows["good"]] == [(39, 41), (49, 51), (59, 61)]
    assert [r["vs_ours"] for r in rows["good"]] == [4.0, 2.5, 2.0]
    assert [r["verdict"] for r in rows["good"]] == ["slower"] * 3
    assert [r["peak_mb"] for r in rows["good"]] == [1.5] * 3
    assert [r["graph_us"] for r in rows["good"]] == [5.0] * 3


def test_a_peer_has_no_bound_of_a_pass_where_our_forward_does_the_work_of_backward() -> None:
    """One product forward and two backward take a peer as long as our three forward, and its forward less time."""
    fused = toy_case(dtype=torch.float16, flops=(3000, 0))
    rows = rows_of(fused, bench_case(fused, "cpu", [GOOD], FakeClock(), 1), Ceilings(Gpu(1e9, 0.3e9, "")))
    bounds = {(row["contender"], row["pass"]): row["roofline_pct"] is not None for row in rows}
    assert bounds == {
        **{("ours", name): True for name in ("forward", "backward", "both")},
        ("good", "forward"): False,
        ("good", "backward"): False,
        ("good", "both"): True,
    }


def test_rates_and_roofline_match_a_count_by_hand() -> None:
    """8,000 bytes at 1 GB/s are 8 us and 1,000 operations at 1 GFLOPS are 1 us: memory decides, at 10 us 80 %."""
    half = toy_case(dtype=torch.float16)
    entries = bench_case(half, "cpu", [], FakeClock(), 1)
    forward, _, both = rows_of(half, entries, Ceilings(Gpu(bandwidth=1e9, flops=1e9, source="")))
    assert (forward["gb_per_s"], forward["roofline_pct"], forward["bytes_minimum"]) == (0.8, 80.0, 8000)
    assert both["bytes_minimum"] == 16000
    assert both["gb_per_s"] == 1.6
    assert both["roofline_pct"] == 160.0  # the fake FakeClock() is faster than this GPU
    # At 0.3 GFLOPS backward's 3,000 operations take 10 us and its bytes 8.
    assert rows_of(half, entries, Ceilings(Gpu(1e9, 0.3e9, "")))[1]["roofline_pct"] == pytest.approx(100)
    # The table's operations are bfloat16's: float32 has no roofline in it; nor has an unknown machine.
    assert all(row["roofline_pct"] is None for row in rows_of(TOY, entries, Ceilings(Gpu(1e9, 1e9, ""))))
    assert all(row["roofline_pct"] is None for row in rows_of(half, entries))
    # Against what this machine reached: 0.8 GB/s over a copy of 1.6, a read of 2 and a triad of 0.8.
    measured = Ceilings(measured=MemoryRates(copy=1.6e9, read=2e9, triad=0.8e9), gemm_us=7.0)
    row = rows_of(half, entries, measured)[0]
    assert (row["copy_pct"], row["read_pct"], row["triad_pct"], row["gemm_us"]) == (50.0, 40.0, 100.0, 7.0)


def test_an_op_of_torchs_operations_keeps_its_figures_where_kernels_are_looked_for(monkeypatch) -> None:
    """On a GPU the names of launched kernels are compared with those of the op, of which this one has none."""
    monkeypatch.setattr(LocalContender, "kernels", lambda self, name: check_kernels([], [("gemm", 7)]))
    for has_kernels, status in ((False, "ok"), (True, "REFUSED")):
        case = toy_case(has_kernels=has_kernels)
        ours = next(entry for entry in bench_case(case, "cpu", [], FakeClock(), 1) if entry.contender == "ours")
        ours.check_after("cuda")
        assert {outcome.status for outcome in ours.outcomes.values()} == {status}
