"""Visual question answering (VQA v2, easy-VQA, scenes), by a classifier or masked answers.

- classifier, METER's and BEiT-3's form and the default: binary cross-entropy with the answers' soft targets, summed
  over answers.
- masked: the answer's words are masked and predicted, as in pretraining. The loss is the log-likelihood of each answer
  that an annotator gave, weighted by the share of annotators who gave it (ALBEF).

A sample's metadata holds `question_id` and `answers`, a record {answer, answer_id} per annotator, as in VQA v2's
annotations. Answers are compared as the official metric compares them: normalised, unless all annotators agree.

Shape legend: B batch, A answers of the list, S samples of a split, H largest number of answers per question, R answers
of a batch.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mvlm.config.model import MaskVLMConfig
from mvlm.errors import ConfigError
from mvlm.model.maskvlm import MaskVLM
from mvlm.statistics import grouped_bootstrap
from mvlm.tasks.masked_answers import AnswerTable, answers_loss, likeliest, mask_features
from mvlm.tasks.metrics.vqa import (
    answer_accuracy,
    answer_fault,
    compared_answers,
    normalize_answer,
    soft_targets,
    strip_answer,
    vqa_accuracy,
    warn_of_few_answers,
)
from mvlm.tasks.records import read_json
from mvlm.tasks.task import AnswerHead, Task, TaskLosses, TaskOptions, Verdict
from mvlm_dataloading import Batch, DataError, Dataset, Tokenizer
from mvlm_dataloading.dataset.dataset import image_name

ANSWERS_OF_A_QUESTION = 10
SHORTEST_QUESTION = 8
"""Tokens that a question must at least have room for, [CLS] and [SEP] included."""


def questions(dataset: Dataset, may_lack_answers: bool = False, repeated: bool = False) -> list[dict[str, Any]]:
    """Metadata of all samples. DataError for a sample that is not a question with answers and an id of its own.

    With `may_lack_answers`, a split without any answers is fine too, as VQA v2's test split is. Without it, questions
    with too few answers for the metric are logged. With `repeated`, an id may occur again, as in a weighted view.
    """
    found = [dataset.metadata(i) for i in range(len(dataset))]
    unanswered = may_lack_answers and not any(record.get("answers") for record in found)
    seen: set[str] = set()
    for i, record in enumerate(found):
        if "question_id" not in record or not (unanswered or record.get("answers")):
            raise DataError(
                f"{dataset.where(i)}: wanted a question with `question_id` and `answers`, found {sorted(record)}; "
                f"`mvlm data easy-vqa` writes such data"
            )
        number = str(record["question_id"])
        if number in seen and not repeated:
            raise DataError(f"{dataset.where(i)}: question_id {number} occurs twice; evaluate data without copies")
        seen.add(number)
        if record.get("answers") and (fault := answer_fault(record["answers"])):
            raise DataError(f"{dataset.where(i)}: {fault}")
    if not may_lack_answers:
        warn_of_few_answers(found)
    return found


def mean_targets(records: list[dict[str, Any]], answers: list[str]) -> list[float]:
    """Mean soft target of each answer over n questions, at most 1 - 1 / 2n. Each answer must occur at least once."""
    sums: dict[str, float] = dict.fromkeys(answers, 0.0)
    for record in records:
        for answer, target in soft_targets(record["answers"]).items():
            if answer in sums:
                sums[answer] += target
    return [min(total, len(records) - 0.5) / len(records) for total in sums.values()]


def annotator_shares(record: dict[str, Any]) -> dict[str, float]:
    """Share of a question's annotators who gave each answer, as the metric compares it; the shares add up to 1."""
    counts = Counter(compared_answers(record["answers"])[0])
    return {answer: count / counts.total() for answer, count in counts.items()}


def main_answer(record: dict[str, Any]) -> str:
    """A question's most frequent answer, the first of equally frequent ones: VQA v2's `multiple_choice_answer`."""
    return Counter(compared_answers(record["answers"])[0]).most_common(1)[0][0]


class VisualQuestionAnswering(Task):
    """Answers to questions about images, in one of two forms: classifier, masked."""

    name = "vqa"
    main = "accuracy"
    shares = True

    def __init__(self, model: MaskVLM, options: TaskOptions, state: dict[str, Any]) -> None:
        super().__init__(model, options, state)
        answers = state["answers"]
        if len(set(answers)) < max(2, len(answers)):
            raise DataError(f"answers: wanted at least 2 different ones, found {answers[:20]}")
        self.masked = options.answers == "masked"
        width = model.config.width
        model.language_head.requires_grad_(self.masked)
        if self.masked:
            model.image_cross.requires_grad_(False)  # only texts attend to the other modality
        else:
            self.head = AnswerHead(3 * width, 2 * width, len(answers))
            if "means" in state:  # older checkpoints have none, and their own bias is loaded instead
                with torch.no_grad():
                    self.head.answers.bias.copy_(torch.tensor(state["means"], dtype=torch.float64).logit())

    def set_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Tokenize masked answers."""
        super().set_tokenizer(tokenizer)
        if self.masked:
            table = AnswerTable(self.state["answers"], tokenizer, self.config.text_length)
            self.table = table.to(self.log_scale.device)

    @classmethod
    def longest_text(
        cls, state: dict[str, Any], options: TaskOptions, tokenizer: Tokenizer, config: MaskVLMConfig
    ) -> int:
        """Most tokens of a question. ConfigError if the masks of the longest answer leave no room for one."""
        if options.answers != "masked":
            return config.text_length
        masks = AnswerTable(state["answers"], tokenizer, config.text_length).masks
        if config.text_length - masks < SHORTEST_QUESTION:
            raise ConfigError(
                f"question_length: wanted at least {masks + SHORTEST_QUESTION}, room for the {masks} masks of the "
                f"longest answer and for a question, got {config.text_length}"
            )
        return config.text_length - masks

    @property
    def masks(self) -> int:
        """Number of [MASK]s before a question: tokens of the longest answer and [SEP]; 0 unless answers are masked."""
        return self.table.masks if self.masked else 0

    def loader_options(self) -> dict[str, Any]:
        """Questions are cut where they would not fit behind the masks."""
        return {"text_length": self.config.text_length - self.masks}

    @classmethod
    def make_state(cls, train: Dataset, options: TaskOptions) -> dict[str, Any]:
        """The list of answers, `answers`.

        A classifier starts from `means`, the mean target of each answer. From equal probabilities it would spend its
        first steps on learning that all answers but one are wrong.

        The list is that of the options' file, or the most frequent answers of at least `min_count` training questions
        each, most frequent first. METER and BEiT-3 count so, over training and validation questions: 9 gives
        their 3,129 answers.

        Raises:
            DataError: `train` is not a training split, its samples are no questions, or the list has fewer than two
                answers, or one that no training question has.
        """
        if train.split != "train":
            raise DataError(
                f"{train.folder}: wanted the split train, from which alone the list of answers may come, found the "
                f"split {train.split}; name the data set with the training questions"
            )
        records = questions(train, repeated=True)
        counts = Counter(answer for record in records for answer in soft_targets(record["answers"]))
        main = Counter(map(main_answer, {record["question_id"]: record for record in records}.values()))  # no copies
        kept = sorted((a for a in main if main[a] >= options.min_count), key=lambda answer: (-main[answer], answer))
        if options.answer_list is not None:
            kept = read_answers(options.answer_list, counts)
        if len(kept) < 2:
            wanted, remedy = f"with {options.min_count} training questions each", "lower --min-count"
            if options.answer_list is not None:
                wanted, remedy = f"in {options.answer_list}", "add answers to the file"
            raise DataError(f"{train.folder}: wanted at least 2 answers {wanted}, found {len(kept)}; {remedy}")
        return {"answers": kept} | ({"means": mean_targets(records, kept)} if options.answers == "classifier" else {})

    @classmethod
    def example(cls, samples: int) -> tuple[dict[str, Any], tuple[Tensor, Tensor]]:
        """The 3,129 answers of VQA v2, and targets of some questions."""
        shape = samples, ANSWERS_OF_A_QUESTION
        return {"answers": [str(i) for i in range(3129)]}, (torch.zeros(shape, dtype=torch.int64), torch.zeros(shape))

    @classmethod
    def check_references(cls, validation: Dataset, state: dict[str, Any]) -> None:
        questions(validation)

    @classmethod
    def check_split(cls, dataset: Dataset, state: dict[str, Any]) -> None:
        warn_of_few_answers(questions(dataset, may_lack_answers=True))

    def targets(self, dataset: Dataset) -> tuple[Tensor, Tensor]:
        """Answers int64 (S, H) of each question, -1 for none and for unknown ones, and their targets (S, H).

        Targets are soft targets for the classifier, shares of annotators for masked answers.
        """
        place = {answer: i for i, answer in enumerate(self.state["answers"])}
        records = questions(dataset, repeated=True)
        ids = torch.full((len(records), ANSWERS_OF_A_QUESTION), -1)
        values = torch.zeros(len(records), ANSWERS_OF_A_QUESTION)
        for row, record in enumerate(records):
            given = annotator_shares(record) if self.masked else soft_targets(record["answers"])
            known = [(place[a], t) for a, t in given.items() if a in place]
            for column, (answer, target) in enumerate(known[:ANSWERS_OF_A_QUESTION]):
                ids[row, column], values[row, column] = answer, target
        return ids, values

    def losses(self, batch: Batch, targets: Sequence[Tensor], plan: str) -> TaskLosses:
        """Mean loss of the questions. Accuracy: of the answers' tokens, or the mean target of the likeliest answer."""
        ids, values = targets
        if self.masked:
            of, column = (ids >= 0).nonzero(as_tuple=True)  # (R,) each
            answers, weights = self.table.select(ids[of, column]), values[of, column] / len(ids)
            x = mask_features(self.model, self.hide(batch), self.masks, plan)
            found = answers_loss(self.model, x, answers, of, weights, plan)
            return TaskLosses(*found, counted=len(answers.tokens))
        logits = self.head(self.fuse(batch, plan))  # (B, A)
        dense = logits.new_zeros(len(logits), logits.shape[1] + 1)  # the last column takes what has no answer
        dense.scatter_(1, ids.remainder(logits.shape[1] + 1), values.to(dense.dtype))
        dense = dense[:, :-1]
        loss = F.binary_cross_entropy_with_logits(logits, dense, reduction="sum") / len(logits)
        return TaskLosses(loss, dense.gather(1, logits.argmax(1, keepdim=True)).mean().detach())

    def predict(self, batch: Batch, plan: str) -> list[dict[str, Any]]:
        """The likeliest answer of the list to each question."""
        if self.masked:
            best = likeliest(self.model, mask_features(self.model, self.hide(batch), self.masks, plan), self.table)
        else:
            best = self.head(self.fuse(batch, plan)).argmax(1)
        return [{"answer": self.state["answers"][i]} for i in best.tolist()]

    @classmethod
    def judge(cls, records: Sequence[dict[str, Any]], dataset: Dataset) -> list[Verdict]:
        """Answers: right with an accuracy of 100 %, wrong with 0 %."""
        found = []
        for i, (record, asked) in enumerate(zip(records, questions(dataset), strict=True)):
            counts = Counter(reference["answer"] for reference in asked["answers"])
            wanted = ", ".join(f"{a} ({n} of {counts.total()})" for a, n in counts.most_common())
            wanted = next(iter(counts)) if len(counts) == 1 else wanted
            score = answer_accuracy(record["answer"], asked["answers"])
            right = None if 0 < score < 1 else score == 1
            text, label = dataset.captions(i)[0], main_answer(asked)
            found.append(Verdict(i, text, record["answer"], wanted, 100 * score, right, label))
        return found

    @staticmethod
    def score(records: list[dict[str, Any]], dataset: Dataset) -> dict[str, Any]:
        """VQA accuracy with its 95 % interval over images, and that of each type of answer and of question.

        Of a split without answers: the number of questions alone. The benchmark's server scores its predictions.
        """
        annotations = questions(dataset, may_lack_answers=True)
        if not any(annotation.get("answers") for annotation in annotations):
            return {"questions": len(annotations)}
        answers = {a["question_id"]: r["answer"] for a, r in zip(annotations, records, strict=True)}
        figures = vqa_accuracy(answers, annotations)
        images = [image_name(a) or str(a["question_id"]) for a in annotations]
        interval = grouped_bootstrap(figures.pop("scores").tolist(), images)
        return {"questions": len(annotations), **figures, "accuracy_95": [100 * x for x in interval]}


def read_answers(path: Path, counts: Counter[str]) -> list[str]:
    """The answers of a JSON file, a list of strings, each once; an empty one is left out.

    An answer that no training question has as it stands is normalised.

    DataError if an answer is in no training question (`counts`): the list then comes from elsewhere, perhaps from the
    test split.
    """
    found = read_json(path, "a JSON list of answers")
    if not isinstance(found, list) or not all(isinstance(answer, str) for answer in found):
        raise DataError(f'{path}: wanted a JSON list of answers, found something else; write ["yes", "no", ...]')
    given = (answer if answer in counts else normalize_answer(answer) for answer in map(strip_answer, found))
    kept = [answer for answer in dict.fromkeys(given) if answer]
    unknown = [answer for answer in kept if answer not in counts]
    if unknown:
        raise DataError(
            f"{path}: wanted answers to training questions, found {len(unknown)} of {len(kept)} that are none, such "
            f"as {unknown[0]!r}; make the list from the training split alone"
        )
    return kept
