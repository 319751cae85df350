"""Decide which updates are made. The decision stays on the device, so that no step waits for it."""

import math
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from mvlm.distributed.world import World
from mvlm.errors import NonFiniteLossError
from mvlm.training.metrics import MetricsBuffer


def finite_on_all_ranks(world: World, loss: Tensor, gradient_norm: Tensor) -> Tensor:
    """Decide on an update from scalars on the device: bool (), True = make it, as both are finite. No sync.

    All ranks decide alike.
    """
    good = torch.isfinite(loss) & torch.isfinite(gradient_norm)
    return world.all_reduce((~good).float(), dist.ReduceOp.MAX) == 0


class SkippedUpdates:
    """Counts the updates that were not made, on the host, once their metrics have arrived.

    Args:
        limit: number of updates in a row that may be skipped.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._counted = 0
        self.total = 0
        self.in_a_row = 0

    def count(self, metrics: MetricsBuffer) -> tuple[int, dict[str, float], list[int]] | None:
        """Count new steps. Returns step, metrics and sample ids of the first beyond the limit, or None."""
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
        """Reason for a skipped update: the metrics that are not finite."""
        names = [name for name in row if name == "grad_norm" or not name.startswith(("grad_norm", "good", "total"))]
        # The total is named if it alone is not finite: a part that is not finite makes it so.
        not_finite = [f"{name} is {row[name]}" for name in names if not math.isfinite(row[name])]
        if not not_finite and not math.isfinite(row["total"]):
            return f"the loss is {row['total']}"
        return ", ".join(not_finite) or "the gradient of another rank is not finite"

    def error(self, step: int, row: dict[str, float], keys: list[str], checkpoint: Path | None) -> NonFiniteLossError:
        """Error of a run in which too many updates in a row were skipped.

        Args:
            step, row: of the first one beyond the limit, from `count`.
            keys: of its samples on all ranks.
            checkpoint: the newest one, if there is one.
        """
        more = f" and {len(keys) - 8} more" if len(keys) > 8 else ""
        return NonFiniteLossError(
            f"step {step}: {self.reason(row)}; the update was not made ({self.in_a_row} in a row, "
            f"max_bad_steps is {self._limit}). Its samples: {', '.join(keys[:8])}{more}. "
            f"Last good checkpoint: {checkpoint or 'none'}; no checkpoint holds such an update. "
            f"A new run can go on from it with a lower learning rate or --precision fp32: name it by --initial-model, "
            f"in fine-tuning by --checkpoint, and another folder by --out"
        )

    def state(self) -> dict[str, int]:
        """State for a checkpoint, as plain JSON."""
        return {"counted": self._counted, "total": self.total, "in_a_row": self.in_a_row}

    def load(self, state: dict[str, int]) -> None:
        """Continue from the state of a checkpoint."""
        self._counted, self.total, self.in_a_row = state["counted"], state["total"], state["in_a_row"]
