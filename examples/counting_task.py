"""A task of one's own: how many objects does an image show? The number is a regression on the fused features.

    mvlm finetune examples/counting_task.py --checkpoint runs/demo --data data/counts --out runs/counting
    mvlm eval examples/counting_task.py --checkpoint runs/counting --data data/counts

A sample's caption names what is counted; its metadata holds `count`.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvlm.model.maskvlm import MaskVLM
from mvlm.statistics import grouped_bootstrap
from mvlm.tasks.task import Task, TaskLosses, TaskOptions
from mvlm_dataloading import Batch, DataError, Dataset


def counts(dataset: Dataset) -> list[int]:
    """Number of objects of each sample. DataError for a sample without one."""
    found = [dataset.metadata(i).get("count") for i in range(len(dataset))]
    for i, count in enumerate(found):
        if not isinstance(count, int):
            raise DataError(f"{dataset.where(i)}: wanted a whole number `count`, found {count!r}; is it other data?")
    return [int(count or 0) for count in found]


class Counting(Task):
    """Regression of a number of objects."""

    name = "counting"
    main = "accuracy"

    def __init__(self, model: MaskVLM, options: TaskOptions, state: dict[str, Any]) -> None:
        super().__init__(model, options, state)
        self.head = nn.Linear(3 * model.config.width, 1)

    @classmethod
    def make_state(cls, train: Dataset, options: TaskOptions) -> dict[str, Any]:
        """The mean count, to which the head adds."""
        found = counts(train)
        return {"mean": sum(found) / len(found)}

    def targets(self, dataset: Dataset) -> tuple[Tensor]:
        """Count of each sample, float32 (samples,)."""
        return (torch.tensor(counts(dataset), dtype=torch.float32),)

    def numbers(self, batch: Batch, plan: str) -> Tensor:
        """Predicted counts of a batch, float32 (B,)."""
        return self.state["mean"] + self.head(self.fuse(batch, plan)).squeeze(1).float()

    def losses(self, batch: Batch, targets: Sequence[Tensor], plan: str) -> TaskLosses:
        """Smooth L1, and the share of counts that are right when rounded."""
        found, (wanted,) = self.numbers(batch, plan), targets
        return TaskLosses(F.smooth_l1_loss(found, wanted), (found.round() == wanted).float().mean())

    def predict(self, batch: Batch, plan: str) -> list[dict[str, Any]]:
        """The nearest whole number."""
        return [{"count": round(x)} for x in self.numbers(batch, plan).tolist()]

    @staticmethod
    def score(records: list[dict[str, Any]], dataset: Dataset) -> dict[str, Any]:
        """Share of right counts in per cent, with its 95 % interval."""
        right = [float(r["count"] == wanted) for r, wanted in zip(records, counts(dataset), strict=True)]
        interval = grouped_bootstrap(right, [str(i) for i in range(len(right))])
        return {"accuracy": 100 * sum(right) / len(right), "accuracy_95": [100 * x for x in interval]}
