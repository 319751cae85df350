"""A task of your own: how many objects does an image show? The number is a regression on the fused features.

    mvlm finetune examples/counting_task.py --checkpoint runs/demo --data data/counts --out runs/counting
    mvlm eval examples/counting_task.py --checkpoint runs/counting --data data/counts

A sample's caption names what is counted; its metadata holds `count`, and `image_id` if an image has several questions.
"""

from collections.abc import Sequence
from statistics import fmean, mode
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvlm.model.implementation import Implementation
from mvlm.model.maskvlm import MaskVLM
from mvlm.tasks.metrics import percent_interval
from mvlm.tasks.task import Task, TaskLosses, TaskOptions
from mvlm_dataloading import Batch, DataError, Dataset
from mvlm_dataloading.dataset.dataset import image_name


def counts(dataset: Dataset) -> list[int]:
    """Number of objects of each sample. DataError for a sample without one."""
    numbers = []
    for i in range(len(dataset)):
        count = dataset.metadata(i).get("count")
        if not isinstance(count, int):
            raise DataError(f"{dataset.where(i)}: wanted a whole number `count`, found {count!r}; is it other data?")
        numbers.append(count)
    return numbers


class Counting(Task):
    """Regression of a number of objects."""

    name = "counting"
    main = "accuracy"
    bootstrapped_over = "images"

    def __init__(self, model: MaskVLM, options: TaskOptions, state: dict[str, Any]) -> None:
        super().__init__(model, options, state)
        self.head = nn.Linear(3 * model.config.width, 1)

    @classmethod
    def make_state(cls, train: Dataset, options: TaskOptions) -> dict[str, Any]:
        """The mean count, to which the head adds."""
        return {"mean": fmean(counts(train))}

    def targets(self, dataset: Dataset) -> tuple[Tensor]:
        """Count of each sample, float32 (samples,)."""
        return (torch.tensor(counts(dataset), dtype=torch.float32),)

    def numbers(self, batch: Batch, implementation: Implementation) -> Tensor:
        """Predicted counts of a batch, float32 (B,)."""
        return self.state["mean"] + self.head(self.fuse(batch, implementation)).squeeze(1).float()

    def losses(self, batch: Batch, targets: Sequence[Tensor], implementation: Implementation) -> TaskLosses:
        """Smooth L1, and the share of counts that are right when rounded."""
        (wanted,) = targets
        predicted = self.numbers(batch, implementation)
        right = predicted.round() == wanted
        return TaskLosses(F.smooth_l1_loss(predicted, wanted), right.float().mean())

    def predict(self, batch: Batch, implementation: Implementation) -> list[dict[str, Any]]:
        """The nearest whole number."""
        return [{"count": round(number)} for number in self.numbers(batch, implementation).tolist()]

    @staticmethod
    def score(records: list[dict[str, Any]], dataset: Dataset) -> dict[str, Any]:
        """Share of right counts in per cent, with its 95 % interval, and that of the most frequent count."""
        wanted = counts(dataset)
        right = [float(record["count"] == count) for record, count in zip(records, wanted, strict=True)]
        # Answers about one image are not independent: images are drawn, each with all of its questions.
        images = [image_name(dataset.metadata(i)) or dataset.keys[i] for i in range(len(dataset))]
        return {
            "accuracy": 100 * fmean(right),
            "accuracy_95": percent_interval(right, images),
            "majority": 100 * wanted.count(mode(wanted)) / len(wanted),
        }
