"""A toy benchmark case whose figures are small numbers, and a clock that takes no time."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from mvlm.config.model import MaskVLMConfig
from mvlm_benchmarks.clock import Prepare, Results, Step, Timing
from mvlm_kernels.case import Case, Inputs


@dataclass
class FakeClock:
    """Runs each step once. Reports the `readings` in turn, then always 10 us."""

    readings: list[float] = field(default_factory=list)
    times: int = 0
    """Number of timed steps."""

    def time(self, steps: Sequence[Step], prepare: Prepare) -> tuple[Timing, list[Results]]:
        results = []
        for number, step in enumerate(steps):
            prepare(number)
            results.append(step())
        self.times += 1
        us = self.readings.pop(0) if self.readings else 10.0
        return Timing(us, us - 1, us + 1), results

    def graph(self, make_steps: Callable[[], Sequence[Step]]) -> tuple[float, list[Results]] | None:
        return 5.0, [step() for step in make_steps()]

    def peak_mb(self, step: Callable[[], Any]) -> float | None:
        step()
        return 1.5


def toy_case(**changes: Any) -> Case:
    """y = 2 x of 1,000 float32. Forward moves 8,000 bytes, backward as many; 1,000 and 3,000 operations."""

    def make(device: str, seed: int = 0) -> Inputs:
        x = torch.linspace(-1, 1 + seed, 1000, device=device)
        return Inputs({"x": x}, {"factor": 2})

    def double(x: torch.Tensor, factor: int) -> torch.Tensor:
        return x * factor

    values: dict[str, Any] = {
        "op": "toy", "label": "1000", "dtype": torch.float32, "make": make, "ours": double, "oracle": double,
        "minimum": (8000, 8000), "flops": (1000, 3000),
    }  # fmt: skip
    return Case(**(values | changes))


def micro_config(**changes: Any) -> MaskVLMConfig:
    """A model of one or two small layers, post-norm as the baselines are."""
    values: dict[str, Any] = {
        "image_size": 32, "patch_size": 8, "mask_block": 16, "width": 32, "heads": 2, "image_layers": 1,
        "text_layers": 1, "cross_layers": 1, "decoder_layers": 1, "vocab_size": 300, "mask_token_id": 4,
        "text_length": 12, "itc_width": 8,
    }  # fmt: skip
    return MaskVLMConfig(**(values | changes))
