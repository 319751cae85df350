"""Rounds of training steps: order, budget, a contender that runs out of memory, rows as they are timed."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from mvlm_benchmarks import budget
from mvlm_benchmarks.step import timing
from mvlm_benchmarks.step.timing import WARM_UP, measure_rounds, rotated


class Step:
    """A contender that does nothing, and raises in the steps of `fails`, counted from 1 at the peak measurement."""

    def __init__(self, name: str, fails: tuple[int, ...] = ()) -> None:
        self.name, self.module, self.calls = name, nn.Linear(1, 1), 0
        self.fails = fails

    def backward(self, inputs: Any) -> Any:
        self.calls += 1
        if self.calls in self.fails:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return SimpleNamespace(total=torch.tensor(2.5))

    def update(self) -> None: ...


class Rounds:
    """A budget of a number of calls."""

    def __init__(self, allowed: int) -> None:
        self.left = allowed

    def allows(self) -> bool:
        self.left -= 1
        return self.left >= 0


@pytest.fixture
def inputs(monkeypatch) -> Any:
    monkeypatch.setattr(timing, "peak_mb", lambda step, parameters, device: step() and 7.0)
    return SimpleNamespace(batch=SimpleNamespace(images=torch.zeros(1)))


def measure(contenders: list, inputs: Any, rounds: int, budget: Any = None) -> tuple[list[dict], list[dict]]:
    timed: list[dict] = []
    return measure_rounds(contenders, inputs, rounds, budget, timed.append), timed


def test_every_step_is_a_row_and_every_round_a_figure(inputs) -> None:
    rows, timed = measure([Step("a"), Step("b")], inputs, 3)
    assert [(row["contender"], row["peak_mb"], len(row["seconds"]), row["loss"]) for row in rows] == [
        ("a", 7.0, 3, 2.5), ("b", 7.0, 3, 2.5),
    ]  # fmt: skip
    assert [(row["contender"], row["round"]) for row in timed] == [
        ("a", 0), ("b", 0), ("b", 1), ("a", 1), ("a", 2), ("b", 2),
    ]  # fmt: skip
    assert [row["seconds"] for row in timed if row["contender"] == "a"] == rows[0]["seconds"]


@pytest.mark.parametrize("when", [1, 2, 1 + WARM_UP + 2])
def test_contender_without_memory_is_left_out_and_the_others_go_on(inputs, when) -> None:
    """In the measurement of its peak, in a warm-up round, and in the second timed round."""
    hungry = Step("hungry", fails=(when,))
    rows, timed = measure([hungry, Step("fine")], inputs, 3)
    assert rows[0] == {"contender": "hungry", "note": "OutOfMemoryError: CUDA out of memory"}
    assert hungry.calls == when
    assert len(rows[1]["seconds"]) == 3
    assert [row["note"] for row in timed if row["contender"] == "hungry"][-1] == "OutOfMemoryError: CUDA out of memory"


def test_spent_budget_ends_after_a_whole_round(inputs) -> None:
    rows, timed = measure([Step("a"), Step("b")], inputs, 10, Rounds(3))
    assert [len(row["seconds"]) for row in rows] == [3, 3]
    assert len(timed) == 6


def test_no_round_starts_that_would_end_after_the_budget(inputs, monkeypatch) -> None:
    """A round takes 6 s. After the warm-up and the first timed one 2 s are left of 20."""
    now = [0.0]
    monkeypatch.setattr(budget.time, "monotonic", lambda: now[0])

    class Slow(Step):
        def update(self) -> None:
            now[0] += 3

    limit = budget.Budget(20)
    rows, _ = measure([Slow("a"), Slow("b")], inputs, 10, limit)
    assert [len(row["seconds"]) for row in rows] == [1, 1]
    assert limit.used == 18


def test_budget_that_is_spent_at_once_leaves_one_round(inputs) -> None:
    rows, _ = measure([Step("a")], inputs, 10, Rounds(0))
    assert len(rows[0]["seconds"]) == 1


def test_order_rotates_over_the_rounds() -> None:
    ready: list[Any] = ["a", "b", "c"]
    assert [list(rotated(ready, n)) for n in range(3)] == [["a", "b", "c"], ["b", "c", "a"], ["c", "a", "b"]]
