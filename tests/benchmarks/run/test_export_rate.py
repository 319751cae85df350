"""Figures of exported programs beside eager: ratios are taken round by round."""

from collections.abc import Callable
from typing import Any

from mvlm_benchmarks.run.export_rate import rounds_of, rows_of


def test_ratios_are_medians_of_rounds_and_load_that_hits_all_cancels():
    eager = [(10.0, 8.0), (20.0, 8.0), (40.0, 8.0), (10.0, 8.0), (20.0, 8.0)]
    rows = rows_of({"eager": eager, "onnx": [(wall / 2, cpu / 4) for wall, cpu in eager], "pt2": [(10.0, 16.0)] * 5})
    found = {row["contender"]: row for row in rows}
    assert (found["eager"]["ms"], found["eager"]["wall_ratio"], found["eager"]["cpu_ratio"]) == (20.0, 1.0, 1.0)
    names = ("ms", "wall_ratio", "low", "high", "cpu_ms", "cpu_ratio")
    assert [found["onnx"][name] for name in names] == [10.0, 2.0, 2.0, 2.0, 2.0, 4.0]
    assert [found["pt2"][name] for name in names] == [10.0, 2.0, 1.0, 3.0, 16.0, 0.5]


def test_contenders_take_turns_and_the_first_round_is_not_counted():
    called: list[tuple[str, int]] = []

    def runner(name: str) -> Callable[[Any], object]:
        return lambda inputs: called.append((name, inputs))

    runners = {name: runner(name) for name in ("eager", "pt2", "onnx")}
    times = rounds_of(runners, 7, 3)
    assert {name: len(found) for name, found in times.items()} == {"eager": 3, "pt2": 3, "onnx": 3}
    assert [name for name, _ in called[:6]] == ["eager", "pt2", "onnx", "pt2", "onnx", "eager"]
    assert {inputs for _, inputs in called} == {7}
