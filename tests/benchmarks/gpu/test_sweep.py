"""Stage `sweep`: which variants are tried, which of them wins, and the table of tiles that the winners make."""

import csv

import pytest
import torch

from mvlm_benchmarks.budget import Budget
from mvlm_benchmarks.clock import Timing
from mvlm_benchmarks.gpu import sweep
from mvlm_benchmarks.gpu.stage import Stage
from mvlm_benchmarks.gpu.variants import Options, Target, launches_of
from mvlm_benchmarks.kernels.cases import cases, small_cases
from mvlm_benchmarks.kernels.reference import CaseData
from mvlm_benchmarks.results import MACHINE_COLUMNS
from mvlm_kernels import dispatch
from support.benchmarks import FakeClock, toy_case


def test_every_op_with_kernels_has_a_small_case_that_launches_them() -> None:
    """The sanitizers and the first checks on a GPU see no other cases."""
    wanted = {case.op for case in cases(2, torch.bfloat16) if case.has_kernels}
    launched = {c.op for c in small_cases(torch.bfloat16) if launches_of(c, c.make("meta"), 90)}
    assert launched == wanted


CHANGES: list[Options] = [{}, {"num_warps": 8}, {"num_stages": 3}]


def swept(tmp_path, monkeypatch, ours, microseconds) -> tuple[dict, list[tuple]]:
    """Winner and rows of a kernel `slow`, whose op is `ours` and whose calls take so many microseconds."""

    class Clock(FakeClock):
        def __init__(self, *_) -> None:
            super().__init__()

        def time(self, steps, prepare):
            us = microseconds(dispatch.overridden("slow", {}))
            return Timing(us, us, us, (us, us)), super().time(steps, prepare)[1]

    monkeypatch.setattr(sweep, "variants", lambda *_, **__: CHANGES)
    monkeypatch.setattr(sweep, "CpuClock", Clock)
    case = toy_case(ours=ours)
    stage = Stage("sweep", tmp_path, Budget(60), rehearse=True)
    stage.about = dict.fromkeys(MACHINE_COLUMNS, "") | {"versions": {}}
    table = stage.table("sweep", sweep.COLUMNS)
    found = sweep.sweep_target(
        stage, Target(case, "forward", "slow", {"num_warps": 4}), CaseData.make(case, "cpu"), {}, table
    )
    rows = csv.DictReader((tmp_path / "sweep.csv").read_text().splitlines())
    return found, [(row["change"], row["turn"], row["us"], row["status"]) for row in rows]


def test_a_variant_that_is_right_and_faster_wins_and_a_wrong_one_is_a_row(tmp_path, monkeypatch) -> None:
    def ours(x, factor):
        return x * (0 if "num_stages" in dispatch.overridden("slow", {}) else factor)

    found, rows = swept(tmp_path, monkeypatch, ours, lambda options: 5.0 if options else 10.0)
    assert (found["winner"], found["ratio"]) == ({"num_warps": 8}, 0.5)
    assert rows == [
        ("default", "0", "10.0", "ok"), ("num_warps=8", "0", "5.0", "ok"), ("num_stages=3", "0", "", "WRONG"),
        ("default", "1", "10.0", "ok"), ("num_warps=8", "1", "5.0", "ok"),
        ("num_warps=8", "2", "5.0", "ok"), ("default", "2", "10.0", "ok"),
    ]  # fmt: skip


def test_a_default_that_is_wrong_stops_the_sweep(tmp_path, monkeypatch) -> None:
    with pytest.raises(sweep.WrongValue, match="slow, with its default options: output is off"):
        swept(tmp_path, monkeypatch, lambda x, factor: x * 2.01, lambda _: 10.0)
