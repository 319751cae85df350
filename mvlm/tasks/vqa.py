"""Visual question answering as classification over a list of answers (VQA v2, easy-VQA, scenes).

The loss is METER's and BEiT-3's: binary cross-entropy with the answers' soft targets, summed over answers. A sample's
metadata holds `question_id` and `answers`, a record {answer, answer_id} an annotator, as in VQA v2's annotations.

Shape legend: B batch, A answers of the list, S samples of a split, H most answers of a question.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mvlm.model.maskvlm import MaskVLM
from mvlm.tasks.metrics.significance import grouped_bootstrap
from mvlm.tasks.metrics.vqa import soft_targets, vqa_accuracy
from mvlm.tasks.task import AnswerHead, Task, TaskLosses, TaskOptions
from mvlm_dataloading import Batch, DataError, Dataset

ANSWERS_OF_A_QUESTION = 10


def questions(dataset: Dataset) -> list[dict[str, Any]]:
    """Metadata of all samples. DataError for a sample that is not a question with answers and an id of its own."""
    found = [dataset.metadata(i) for i in range(len(dataset))]
    seen: set[str] = set()
    for i, record in enumerate(found):
        if "question_id" not in record or not record.get("answers"):
            raise DataError(
                f"{dataset.where(i)}: wanted a question with `question_id` and `answers`, found {sorted(record)}; "
                f"`mvlm data easy-vqa` writes such data"
            )
        if str(record["question_id"]) in seen:
            raise DataError(
                f"{dataset.where(i)}: question_id {record['question_id']} occurs twice; build the data again"
            )
        seen.add(str(record["question_id"]))
    return found


class VisualQuestionAnswering(Task):
    """Classification of a question and its image over the answers of the training split."""

    name = "vqa"
    main = "accuracy"

    def __init__(self, model: MaskVLM, options: TaskOptions, state: dict[str, Any]) -> None:
        super().__init__(model, options, state)
        width = model.config.width
        self.head = AnswerHead(3 * width, 2 * width, len(state["answers"]))

    @classmethod
    def make_state(cls, train: Dataset, options: TaskOptions) -> dict[str, Any]:
        """The answers that at least `min_count` training questions have, most frequent first."""
        counts = Counter(answer for record in questions(train) for answer in soft_targets(record["answers"]))
        kept = sorted((a for a, n in counts.items() if n >= options.min_count), key=lambda a: (-counts[a], a))
        if len(kept) < 2:
            raise DataError(
                f"{train.folder}: wanted at least 2 answers with {options.min_count} training questions each, found "
                f"{len(kept)}; lower --min-count"
            )
        return {"answers": kept}

    @classmethod
    def example(cls, samples: int) -> tuple[dict[str, Any], tuple[Tensor, Tensor]]:
        """The 3,129 answers of VQA v2, and targets of some questions."""
        shape = samples, ANSWERS_OF_A_QUESTION
        return {"answers": [str(i) for i in range(3129)]}, (torch.zeros(shape, dtype=torch.int64), torch.zeros(shape))

    def targets(self, dataset: Dataset) -> tuple[Tensor, Tensor]:
        """Answers int64 (S, H) of each question, -1 for none and for those not on the list, and targets (S, H)."""
        place = {answer: i for i, answer in enumerate(self.state["answers"])}
        records = questions(dataset)
        ids = torch.full((len(records), ANSWERS_OF_A_QUESTION), -1)
        values = torch.zeros(len(records), ANSWERS_OF_A_QUESTION)
        for row, record in enumerate(records):
            known = [(place[a], t) for a, t in soft_targets(record["answers"]).items() if a in place]
            for column, (answer, target) in enumerate(known[:ANSWERS_OF_A_QUESTION]):
                ids[row, column], values[row, column] = answer, target
        return ids, values

    def logits(self, batch: Batch, plan: str) -> Tensor:
        """Logits of all answers of the list, float32 (B, A)."""
        return self.head(self.fuse(batch, plan))

    def losses(self, batch: Batch, targets: Sequence[Tensor], plan: str) -> TaskLosses:
        """Binary cross-entropy summed over answers, mean over questions; and the mean target of the best answer."""
        ids, values = targets
        logits = self.logits(batch, plan)
        dense = logits.new_zeros(len(logits), logits.shape[1] + 1)  # the last column takes what has no answer
        dense.scatter_(1, ids.remainder(logits.shape[1] + 1), values.to(dense.dtype))
        dense = dense[:, :-1]
        loss = F.binary_cross_entropy_with_logits(logits, dense, reduction="sum") / len(logits)
        return TaskLosses(loss, dense.gather(1, logits.argmax(1, keepdim=True)).mean().detach())

    def predict(self, batch: Batch, plan: str) -> list[dict[str, Any]]:
        """The most probable answer of each question."""
        best = self.logits(batch, plan).argmax(1)
        return [{"answer": self.state["answers"][i]} for i in best.tolist()]

    @staticmethod
    def score(records: list[dict[str, Any]], dataset: Dataset) -> dict[str, Any]:
        """VQA accuracy, with its 95 % interval over images, by type of answer and of question."""
        annotations = questions(dataset)
        answers = {a["question_id"]: r["answer"] for a, r in zip(annotations, records, strict=True)}
        figures = vqa_accuracy(answers, annotations)
        images = [str(a.get("image_id", a["question_id"])) for a in annotations]
        interval = grouped_bootstrap(figures.pop("scores").tolist(), images)
        return {"questions": len(annotations), **figures, "accuracy_95": [100 * x for x in interval]}
