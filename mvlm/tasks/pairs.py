"""Statements about pairs of images (NLVR2), or about n images (NLVR): is the statement true of them?

The text is fused with each image in a pass of its own, and the features are joined in the order of the images, as
METER and BEiT-3 do. A sample's image is a strip of n square images side by side; its caption is the statement. Its
metadata holds `images` (n), `label` (true, false), `identifier` and, if there is one, `set_id`, equal for rows with the
same images.
"""

from typing import Any, ClassVar

from torch import Tensor

from mvlm.tasks.metrics.labels import check_identifier, score_statements, set_of
from mvlm.tasks.task import LabelTask, TaskOptions
from mvlm_dataloading import DataError, Dataset


class Pairs(LabelTask):
    """Judgement of a statement about n images: true or false."""

    name = "pairs"
    bootstrapped_over = "sets of images"
    labels = ("false", "true")
    recipe: ClassVar = {"max_steps": 3_400}  # 10 passes over the 86,373 statements of NLVR2

    @classmethod
    def labelled(cls, dataset: Dataset, images: int | None = None, repeated: bool = False) -> list[dict[str, Any]]:
        found, seen = [], set()
        for i in range(len(dataset)):
            record = dataset.metadata(i)
            label = str(record.get("label")).lower()
            number = record.get("images")
            if label not in cls.labels or "identifier" not in record or not isinstance(number, int) or number < 1:
                raise DataError(
                    f"{dataset.where(i)}: wanted a statement with `identifier`, `images` and a label true or false, "
                    f"found {sorted(record)} and the label {record.get('label')!r}; is it data of another task?"
                )
            images = images or number
            if number != images:
                raise DataError(
                    f"{dataset.where(i)}: wanted {images} images a statement, found {number}; keep them in other data "
                    f"sets"
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

    @classmethod
    def make_state(cls, train: Dataset, options: TaskOptions) -> dict[str, Any]:
        """The labels in the order of the logits, and the number of images of a statement."""
        return {"labels": list(cls.labels), "images": cls.labelled(train, repeated=True)[0]["images"]}

    @classmethod
    def example(cls, samples: int) -> tuple[dict[str, Any], tuple[Tensor]]:
        """State and targets for a cost estimate of so many statements, each about two images, as in NLVR2."""
        state, targets = super().example(samples)
        return state | {"images": 2}, targets

    def loader_options(self) -> dict[str, Any]:
        return {"strip": self.images}

    @classmethod
    def score(cls, records: list[dict[str, Any]], dataset: Dataset) -> dict[str, Any]:
        """Accuracy with its 95 % interval, bootstrapped over sets of images, consistency, and the `majority` baseline.

        Consistency is the share of sentences that are judged right on all their image pairs; the baseline gives every
        statement the more frequent label.
        """
        truth = cls.labelled(dataset)
        wanted = {r["identifier"]: r["label"] == "true" for r in truth}
        predicted = {t["identifier"]: r["label"] == "true" for t, r in zip(truth, records, strict=True)}
        sets = [str(r.get("set_id", set_of(r["identifier"]))) for r in truth]
        share = 100 * sum(wanted.values()) / len(wanted)
        return {**score_statements(predicted, wanted, sets).all_figures, "majority": max(share, 100 - share)}
