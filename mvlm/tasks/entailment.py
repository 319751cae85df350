"""Visual entailment (SNLI-VE): does an image contradict a hypothesis, say nothing about it, or entail it?

A sample's caption is the hypothesis; its metadata holds `pairID` and `label`.

Shape legend: B batch, S samples of a split.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mvlm.model.maskvlm import MaskVLM
from mvlm.statistics import grouped_bootstrap
from mvlm.tasks.metrics.classification import classification_figures
from mvlm.tasks.score import ENTAILMENT_LABELS
from mvlm.tasks.task import AnswerHead, Task, TaskLosses, TaskOptions, Verdict, judge_labels
from mvlm_dataloading import Batch, DataError, Dataset
from mvlm_dataloading.dataset.dataset import image_name


def labelled(dataset: Dataset) -> list[dict[str, Any]]:
    """Metadata of all samples. DataError for a sample without one of the three labels."""
    found = [dataset.metadata(i) for i in range(len(dataset))]
    for i, record in enumerate(found):
        if record.get("label") not in ENTAILMENT_LABELS:
            raise DataError(
                f"{dataset.where(i)}: wanted a label of {', '.join(ENTAILMENT_LABELS)}, found "
                f"{record.get('label')!r}; is it data of another task?"
            )
    return found


class Entailment(Task):
    """Classification of a hypothesis and its image into three labels."""

    name = "entailment"
    main = "accuracy"
    shares = True

    def __init__(self, model: MaskVLM, options: TaskOptions, state: dict[str, Any]) -> None:
        super().__init__(model, options, state)
        if tuple(state["labels"]) != ENTAILMENT_LABELS:
            raise DataError(f"labels: wanted {', '.join(ENTAILMENT_LABELS)} in this order, found {state['labels']}")
        width = model.config.width
        self.head = AnswerHead(3 * width, 2 * width, len(ENTAILMENT_LABELS))

    @classmethod
    def make_state(cls, train: Dataset, options: TaskOptions) -> dict[str, Any]:
        """The labels in the order of the logits."""
        labelled(train)
        return {"labels": list(ENTAILMENT_LABELS)}

    @classmethod
    def example(cls, samples: int) -> tuple[dict[str, Any], tuple[Tensor]]:
        """The three labels, and targets of some hypotheses."""
        return {"labels": list(ENTAILMENT_LABELS)}, (torch.zeros(samples, dtype=torch.int64),)

    @classmethod
    def check_references(cls, validation: Dataset, state: dict[str, Any]) -> None:
        labelled(validation)

    def targets(self, dataset: Dataset) -> tuple[Tensor]:
        """Label of each sample, int64 (S,)."""
        return (torch.tensor([ENTAILMENT_LABELS.index(record["label"]) for record in labelled(dataset)]),)

    def losses(self, batch: Batch, targets: Sequence[Tensor], plan: str) -> TaskLosses:
        """Cross-entropy and accuracy."""
        logits, (labels,) = self.head(self.fuse(batch, plan)), targets
        return TaskLosses(F.cross_entropy(logits, labels), (logits.argmax(1) == labels).float().mean())

    def predict(self, batch: Batch, plan: str) -> list[dict[str, Any]]:
        """The most probable label of each sample."""
        return [{"label": ENTAILMENT_LABELS[i]} for i in self.head(self.fuse(batch, plan)).argmax(1).tolist()]

    @classmethod
    def judge(cls, records: Sequence[dict[str, Any]], dataset: Dataset) -> list[Verdict]:
        """Labels, right or wrong."""
        return judge_labels(records, [record["label"] for record in labelled(dataset)], dataset)

    @staticmethod
    def score(records: list[dict[str, Any]], dataset: Dataset) -> dict[str, Any]:
        """Accuracy with its 95 % interval over images, recall of each label, and confusion."""
        truth = labelled(dataset)
        wanted, found = [record["label"] for record in truth], [record["label"] for record in records]
        right = [float(a == b) for a, b in zip(found, wanted, strict=True)]
        interval = grouped_bootstrap(right, [image_name(r) or str(i) for i, r in enumerate(truth)])
        figures = classification_figures(found, wanted, ENTAILMENT_LABELS)
        return {"questions": len(truth), **figures, "accuracy_95": [100 * x for x in interval]}
