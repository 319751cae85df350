"""Which updates are made. Decided on the device, so that the step never waits for the answer."""

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mvlm.distributed.world import World
from mvlm.training.metrics import MetricsBuffer

WINDOW = 128
"""Losses that a spike is held against."""
SIGMAS = 6.0


class UpdateGuard:
    """Says of each update whether it is to be made: loss and gradient are finite and, when asked for, no spike.

    A loss is a spike when it is more than 6 standard deviations above the mean of the last 128 that were let through.
    (The window of 128 and the 6 are those of OLMo-core's SkipStepOptimizer.) Losses of other objectives are no measure:
    `reset` when these change, and the first 128 of the new ones pass.
    """

    def __init__(self, world: World, skip_spikes: bool) -> None:
        self._world, self._skip_spikes = world, skip_spikes
        self._window = torch.zeros(WINDOW, device=world.device)
        self._seen = torch.zeros((), dtype=torch.int64, device=world.device)

    def judge(self, loss: Tensor, gradient_norm: Tensor) -> Tensor:
        """Scalars in, bool () out, True = make the update; the same on every rank. No device sync."""
        good = torch.isfinite(loss) & torch.isfinite(gradient_norm)
        if self._skip_spikes:
            deviation, mean = torch.std_mean(self._window)
            good &= (self._seen < WINDOW) | (loss - mean <= SIGMAS * deviation)
        bad = self._world.all_reduce((~good).float(), dist.ReduceOp.MAX)
        good = bad == 0
        slot = torch.arange(WINDOW, device=bad.device) == self._seen % WINDOW
        self._window = torch.where(slot & good, loss.float(), self._window)
        self._seen = self._seen + good
        return good

    def reset(self) -> None:
        """Forget the losses seen. No device sync."""
        self._seen = torch.zeros_like(self._seen)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, ready for JSON: the window, exactly, and how many losses it has seen."""
        return {"window": self._window.tolist(), "seen": int(self._seen)}

    def load(self, state: dict[str, Any]) -> None:
        """Go on with the state of a checkpoint."""
        self._window = torch.tensor(state["window"], device=self._window.device)
        self._seen = torch.tensor(state["seen"], dtype=torch.int64, device=self._seen.device)


class SkippedUpdates:
    """Counts, on the host and after the fact, the updates that the guard forbade.

    Args:
        limit: updates in a row that may be skipped.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._counted = 0
        self.total = 0
        self.in_a_row = 0

    def count(self, metrics: MetricsBuffer) -> tuple[int, dict[str, float], list[int]] | None:
        """Count the steps not counted yet. Returns step, numbers and sample ids of one that is past the limit."""
        for step, row, samples in zip(metrics.steps, metrics.read(), metrics.samples, strict=True):
            if step <= self._counted:
                continue
            self._counted = step
            self.total += not row["good"]
            self.in_a_row = 0 if row["good"] else self.in_a_row + 1
            if self.in_a_row > self._limit:
                return step, row, samples
        return None

    @staticmethod
    def reason(row: dict[str, float]) -> str:
        """What was wrong with the numbers of a step, objective by objective."""
        names = [name for name in row if name == "grad_norm" or not name.startswith(("grad_norm", "good", "total"))]
        wrong = [f"{name} is {row[name]}" for name in names if not math.isfinite(row[name])]
        return ", ".join(wrong) or f"the loss {row['total']:.4g} is a spike"

    def state(self) -> dict[str, int]:
        """What a checkpoint keeps, ready for JSON."""
        return {"counted": self._counted, "total": self.total, "in_a_row": self.in_a_row}

    def load(self, state: dict[str, int]) -> None:
        """Go on with the state of a checkpoint."""
        self._counted, self.total, self.in_a_row = state["counted"], state["total"], state["in_a_row"]
