"""Visual entailment (SNLI-VE): does an image contradict a hypothesis, say nothing about it, or entail it?

A sample's caption is the hypothesis; its metadata holds `pairID` and `label`.
"""

from typing import Any, ClassVar

from mvlm.tasks.metrics.labels import score_labels
from mvlm.tasks.score import ENTAILMENT_LABELS
from mvlm.tasks.task import LabelTask
from mvlm_dataloading import DataError, Dataset
from mvlm_dataloading.dataset.dataset import image_name


class Entailment(LabelTask):
    """Classification of a hypothesis and its image into three labels."""

    name = "entailment"
    bootstrapped_over = "images"
    labels = ENTAILMENT_LABELS
    recipe: ClassVar = {"max_steps": 10_300, "flip": 0.5}  # 5 passes over the 529,527 hypotheses of SNLI-VE

    @classmethod
    def labelled(cls, dataset: Dataset, images: int | None = None, repeated: bool = False) -> list[dict[str, Any]]:
        found = [dataset.metadata(i) for i in range(len(dataset))]
        for i, record in enumerate(found):
            if record.get("label") not in ENTAILMENT_LABELS:
                raise DataError(
                    f"{dataset.where(i)}: wanted a label of {', '.join(ENTAILMENT_LABELS)}, found "
                    f"{record.get('label')!r}; is it data of another task?"
                )
        return found

    @classmethod
    def score(cls, records: list[dict[str, Any]], dataset: Dataset) -> dict[str, Any]:
        """Accuracy with its 95 % interval, bootstrapped over images, recall of each label, and confusion matrix."""
        truth = cls.labelled(dataset)
        images = [image_name(record) or str(i) for i, record in enumerate(truth)]
        predicted, wanted = ([record["label"] for record in each] for each in (records, truth))
        return {"questions": len(truth), **score_labels(predicted, wanted, ENTAILMENT_LABELS, images).all_figures}
