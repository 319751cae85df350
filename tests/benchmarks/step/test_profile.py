"""Milliseconds by part, from made-up profiler events."""

from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch

from mvlm_benchmarks.step.profile import BACKWARD_NODE, OperationTimes, break_down, operations_table


class Span(NamedTuple):
    start: float
    end: float


@dataclass
class FakeEvent:
    """The fields of a profiler event that a breakdown reads. Times are microseconds."""

    name: str
    time_range: Span
    sequence_nr: int
    cpu_time_total: float
    device_type: str = "DeviceType.CPU"


def event(name: str, start: float, end: float, number: int = -1) -> FakeEvent:
    return FakeEvent(name, Span(start, end), number, end - start)


def test_breakdown_books_a_backward_node_to_the_part_that_created_it() -> None:
    events = [
        event("part:ITM", 0, 1000),
        event("part:MIM cross", 100, 300),  # inside ITM
        event("aten::mm", 150, 250, number=5),
        event("aten::t", 1500, 1600, number=6),  # between parts, created no node
        event("part:ITC", 2000, 2400),
        event("aten::mm", 2100, 2200, number=6),
        event("part:MIM cross", 2500, 2900),
        event("part:decoder", 2600, 2700),  # inside another part
        event("part:backward", 3000, 6000),
        event(f"{BACKWARD_NODE}: MmBackward0", 3000, 3500, number=6),
        event(f"{BACKWARD_NODE}: MmBackward0", 3500, 5500, number=5),
        event(f"{BACKWARD_NODE}: torch::autograd::AccumulateGrad", 5500, 5700),
        event("part:optimizer", 6000, 7000),
    ]
    assert break_down(events, "cpu_time_total") == {
        "ITM": {"forward": 1.0, "backward": 2.0},
        "ITC": {"forward": 0.4, "backward": 0.5},
        "MIM cross": {"forward": pytest.approx(0.3), "backward": 0.0},
        "decoder": {"forward": 0.1, "backward": 0.0},
        "other": {"forward": pytest.approx(1.2), "backward": pytest.approx(0.5)},
        "optimizer": {"forward": 1.0, "backward": 0.0},
    }


def test_operations_are_counted_with_their_backward() -> None:
    x, w = torch.randn(8, 64, requires_grad=True), torch.randn(64, 256, requires_grad=True)
    with OperationTimes() as times:
        ((x @ w).relu() @ w.t()).sum().backward()
    calls = {name: count for name, (count, _) in times.rows.items()}
    assert calls["aten.mm"] == 6  # two products, and two gradients of each
    assert calls["aten.relu"] == 1
    assert all(milliseconds >= 0 for _, milliseconds in times.rows.values())
    shown = operations_table("fast", {"aten.mm": (6, 3.0), "aten.relu": (1, 1.0)}, rows=1).splitlines()
    assert shown[-2].split() == ["aten.mm", "6", "3.0", "75.0"]
    assert shown[-1].split() == ["total", "7", "4.0", "100.0"]
