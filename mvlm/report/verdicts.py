"""Records of an evaluation, judged one by one: what a page needs to show a sample as right or wrong.

Each function takes the records of a split and the split, and returns a verdict for each sample, in order; of
captions, for the first sample of each image.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from mvlm.tasks.caption import captions_of_images
from mvlm.tasks.entailment import labelled
from mvlm.tasks.metrics.captions import cider
from mvlm.tasks.metrics.vqa import answer_accuracy, compared_answers
from mvlm.tasks.pairs import LABELS, statements
from mvlm.tasks.score import ENTAILMENT_LABELS
from mvlm.tasks.vqa import questions
from mvlm_dataloading import Dataset

CONFUSED = 10
"""Most frequent answers of vqa that a table of confusion names."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Prediction for a sample, and how good it is."""

    sample: int
    text: str
    """The question, hypothesis or statement; empty for a caption."""
    predicted: str
    wanted: str
    """Right answers, as the page shows them."""
    score: float
    """Share of the main figure, in per cent: their mean over the split is the figure."""
    right: bool | None
    """None for an answer that is neither: one that too few annotators gave."""
    label: str = ""
    """The one right answer, where there are labels to confuse."""


def judge_answers(records: Sequence[dict[str, Any]], dataset: Dataset) -> list[Verdict]:
    """Answers of `vqa`: right with an accuracy of 100 %, wrong with 0 %."""
    found = []
    for i, (record, asked) in enumerate(zip(records, questions(dataset), strict=True)):
        counts = Counter(reference["answer"] for reference in asked["answers"])
        wanted = ", ".join(f"{a} ({n} of {counts.total()})" for a, n in counts.most_common())
        score = answer_accuracy(record["answer"], asked["answers"])
        right = None if 0 < score < 1 else score == 1
        found.append(
            Verdict(
                i,
                dataset.captions(i)[0],
                record["answer"],
                next(iter(counts)) if len(counts) == 1 else wanted,
                100 * score,
                right,
                Counter(compared_answers(asked["answers"])[0]).most_common(1)[0][0],
            )
        )
    return found


def judge_hypotheses(records: Sequence[dict[str, Any]], dataset: Dataset) -> list[Verdict]:
    """Labels of `entailment`."""
    return _judge_labels(records, [record["label"] for record in labelled(dataset)], dataset)


def judge_statements(records: Sequence[dict[str, Any]], dataset: Dataset) -> list[Verdict]:
    """Labels of `pairs`."""
    return _judge_labels(records, [record["label"] for record in statements(dataset)], dataset)


def judge_captions(records: Sequence[dict[str, Any]], dataset: Dataset) -> list[Verdict]:
    """Captions: right means a CIDEr-D above the median of the split."""
    found, wanted = captions_of_images(records, dataset)
    scores = (100 * cider(found, wanted)).tolist()
    middle = median(scores)
    return [
        Verdict(int(key), "", found[key], " · ".join(texts), score, score > middle)
        for (key, texts), score in zip(wanted.items(), scores, strict=True)
    ]


def _judge_labels(records: Sequence[dict[str, Any]], labels: Sequence[str], dataset: Dataset) -> list[Verdict]:
    return [
        Verdict(i, dataset.captions(i)[0], record["label"], label, 100.0 * right, right, label)
        for i, (record, label) in enumerate(zip(records, labels, strict=True))
        for right in [record["label"] == label]
    ]


JUDGES: dict[str, Callable[[Sequence[dict[str, Any]], Dataset], list[Verdict]]] = {
    "vqa": judge_answers,
    "entailment": judge_hypotheses,
    "pairs": judge_statements,
    "caption": judge_captions,
}
"""Judge of the records of each task."""


@dataclass(frozen=True, slots=True)
class Confusion:
    """Counts of right labels (rows) and predicted ones (columns); they add up to the samples of the split."""

    labels: list[str]
    counts: list[list[int]]


def confusion(task: str, verdicts: Sequence[Verdict]) -> Confusion | None:
    """Confusion of the labels of a task; of `vqa`, of the most frequent answers and "other". None for captions."""
    if task == "caption":
        return None
    labels: list[str]
    if task == "vqa":
        frequent = sorted(Counter(v.label for v in verdicts).items(), key=lambda item: (-item[1], item[0]))
        labels = [label for label, _ in frequent[:CONFUSED]]
    else:
        labels = [*(ENTAILMENT_LABELS if task == "entailment" else LABELS)]
    row = {label: number for number, label in enumerate(labels)}
    other = len(labels)
    counts = [[0] * (other + 1) for _ in range(other + 1)]
    for v in verdicts:
        counts[row.get(v.label, other)][row.get(v.predicted, other)] += 1
    if any(counts[other]) or any(line[other] for line in counts):
        return Confusion([*labels, "other"], counts)
    return Confusion(labels, [line[:other] for line in counts[:other]])


def majority(task: str, verdicts: Sequence[Verdict], dataset: Dataset) -> float | None:
    """Main figure, in per cent, of giving the split's most frequent label to every sample.

    None for captions, and for `pairs`, whose figures have it.
    """
    if task in ("caption", "pairs"):
        return None
    label = min(Counter(v.label for v in verdicts).items(), key=lambda item: (-item[1], item[0]))[0]
    if task == "vqa":
        return 100 * sum(answer_accuracy(label, asked["answers"]) for asked in questions(dataset)) / len(verdicts)
    return 100 * sum(v.label == label for v in verdicts) / len(verdicts)
