"""A toy op whose bytes and operations are small numbers, and a clock that takes no time."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from mvlm_benchmarks.clock import Timing
from mvlm_benchmarks.kernels.cases import Case
from mvlm_benchmarks.kernels.inputs import Inputs


@dataclass
class FakeClock:
    """Runs each step once and says what it was told to: ``readings`` in turn, then 10 us for ever."""

    readings: list[float] = field(default_factory=list)
    times: int = 0
    graph_error: str = ""

    def time(self, step: Callable[[], Any]) -> Timing:
        step()
        self.times += 1
        us = self.readings.pop(0) if self.readings else 10.0
        return Timing(us, us - 1, us + 1)

    def graph(self, make_step: Callable[[], Callable[[], Any]]) -> float | None:
        make_step()()
        if self.graph_error:
            raise RuntimeError(self.graph_error)
        return 5.0

    def peak_mb(self, step: Callable[[], Any]) -> float | None:
        step()
        return 1.5


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def toy() -> Case:
    """y = 2 x of 1,000 float32: forward moves 8,000 bytes, backward as many; 1,000 and 3,000 operations."""

    def make(device: str) -> Inputs:
        x = torch.linspace(-1, 1, 1000, device=device).requires_grad_()
        return Inputs({"x": x}, {"factor": 2})

    def double(x: torch.Tensor, factor: int) -> torch.Tensor:
        return x * factor

    return Case("toy", "1000", torch.float32, make, double, double, (8000, 8000), (1000, 3000))
