"""Statements about pairs of images (NLVR2), or about n images (NLVR): is the statement true of them?

The text is fused with each image in a pass of its own, and the features are joined in the order of the images, as
METER and BEiT-3 do. A sample's image is a strip of n square images side by side; its caption is the statement. Its
metadata holds `images` (n), `label` (true, false), `identifier` and, if there is one, `set_id`, equal for rows with the
same images.

Shape legend: B batch, S samples of a split.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mvlm.model.maskvlm import MaskVLM
from mvlm.statistics import grouped_bootstrap
from mvlm.tasks.metrics.pairs import check_identifier, nlvr_figures, set_of
from mvlm.tasks.task import AnswerHead, Task, TaskLosses, TaskOptions, Verdict, judge_labels
from mvlm_dataloading import Batch, DataError, Dataset

LABELS = ("false", "true")
"""Labels in the order of the logits."""


def statements(dataset: Dataset, images: int | None = None, repeated: bool = False) -> list[dict[str, Any]]:
    """Metadata of all samples, with labels in lower case.

    Args:
        images: wanted number of images of a sample; None for that of the first sample.
        repeated: an identifier may occur again, as in the training split of a weighted view.

    Raises:
        DataError: a sample is no statement about so many images, or two have the same identifier.
    """
    found, seen = [], set()
    for i in range(len(dataset)):
        record = dataset.metadata(i)
        label = str(record.get("label")).lower()
        number = record.get("images")
        if label not in LABELS or "identifier" not in record or not isinstance(number, int) or number < 1:
            raise DataError(
                f"{dataset.where(i)}: wanted a statement with `identifier`, `images` and a label true or false, found "
                f"{sorted(record)} and the label {record.get('label')!r}; is it data of another task?"
            )
        images = images or number
        if number != images:
            raise DataError(
                f"{dataset.where(i)}: wanted {images} images a statement, found {number}; keep them in other data sets"
            )
        if problem := check_identifier(str(record["identifier"])):
            raise DataError(f"{dataset.where(i)}: {problem}")
        if record["identifier"] in seen and not repeated:
            raise DataError(
                f"{dataset.where(i)}: identifier {record['identifier']} occurs twice; evaluate data without copies"
            )
        seen.add(record["identifier"])
        found.append({**record, "label": label})
    return found


class Pairs(Task):
    """Judgement of a statement about n images: true or false."""

    name = "pairs"
    main = "accuracy"
    shares = True

    def __init__(self, model: MaskVLM, options: TaskOptions, state: dict[str, Any]) -> None:
        super().__init__(model, options, state)
        if tuple(state["labels"]) != LABELS:
            raise DataError(f"labels: wanted {', '.join(LABELS)} in this order, found {state['labels']}")
        self.images: int = state["images"]
        width = model.config.width
        self.head = AnswerHead(self.images * 3 * width, 2 * width, len(LABELS))

    @classmethod
    def make_state(cls, train: Dataset, options: TaskOptions) -> dict[str, Any]:
        """The labels in the order of the logits, and the number of images of a statement."""
        return {"labels": list(LABELS), "images": statements(train, repeated=True)[0]["images"]}

    @classmethod
    def example(cls, samples: int) -> tuple[dict[str, Any], tuple[Tensor]]:
        """NLVR2's two images a statement, and targets of some statements."""
        return {"labels": list(LABELS), "images": 2}, (torch.zeros(samples, dtype=torch.int64),)

    def loader_options(self) -> dict[str, Any]:
        """Strips of the task's number of images."""
        return {"strip": self.images}

    @classmethod
    def check_references(cls, validation: Dataset, state: dict[str, Any]) -> None:
        statements(validation, state["images"])

    def targets(self, dataset: Dataset) -> tuple[Tensor]:
        """Label of each sample, int64 (S,)."""
        records = statements(dataset, self.images, repeated=True)
        return (torch.tensor([LABELS.index(record["label"]) for record in records]),)

    def losses(self, batch: Batch, targets: Sequence[Tensor], plan: str) -> TaskLosses:
        """Cross-entropy and accuracy."""
        logits, (labels,) = self.head(self.fuse(batch, plan, self.images)), targets
        return TaskLosses(F.cross_entropy(logits, labels), (logits.argmax(1) == labels).float().mean())

    def predict(self, batch: Batch, plan: str) -> list[dict[str, Any]]:
        """The more probable label of each sample."""
        return [{"label": LABELS[i]} for i in self.head(self.fuse(batch, plan, self.images)).argmax(1).tolist()]

    @classmethod
    def judge(cls, records: Sequence[dict[str, Any]], dataset: Dataset) -> list[Verdict]:
        """Labels, right or wrong."""
        return judge_labels(records, [record["label"] for record in statements(dataset)], dataset)

    @staticmethod
    def score(records: list[dict[str, Any]], dataset: Dataset) -> dict[str, Any]:
        """Accuracy with its 95 % interval over sets of images, consistency, and the share of the majority's label."""
        truth = statements(dataset)
        wanted = {r["identifier"]: r["label"] == "true" for r in truth}
        found = {t["identifier"]: r["label"] == "true" for t, r in zip(truth, records, strict=True)}
        figures = nlvr_figures(found, wanted)
        sets = [str(r.get("set_id", set_of(r["identifier"]))) for r in truth]
        interval = grouped_bootstrap([float(found[key] == wanted[key]) for key in wanted], sets)
        share = 100 * sum(wanted.values()) / len(wanted)
        return {**figures, "accuracy_95": [100 * x for x in interval], "majority": max(share, 100 - share)}
