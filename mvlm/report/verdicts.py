"""What the verdicts of a split tell together: which labels are confused, and how good the most frequent label is."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from mvlm.tasks.task import Task, Verdict
from mvlm_dataloading import Dataset

CONFUSED = 10
"""Most frequent labels that a table of confusion names, where a task has no list of a few."""


@dataclass(frozen=True, slots=True)
class Confusion:
    """Counts of right labels (rows) and predicted ones (columns); they add up to the samples of the split."""

    labels: list[str]
    counts: list[list[int]]


def confusion(verdicts: Sequence[Verdict], known: Sequence[str] | None = None) -> Confusion | None:
    """Confusion of the `known` labels of a task; without them, of the most frequent ones and "other".

    None for samples without labels, as captions are.
    """
    frequent = by_frequency(verdicts)
    if not frequent:
        return None
    labels: list[str] = list(known or frequent[:CONFUSED])
    row = {label: number for number, label in enumerate(labels)}
    other = len(labels)
    counts = [[0] * (other + 1) for _ in range(other + 1)]
    for v in verdicts:
        counts[row.get(v.label, other)][row.get(v.predicted, other)] += 1
    if any(counts[other]) or any(line[other] for line in counts):
        return Confusion([*labels, "other"], counts)
    return Confusion(labels, [line[:other] for line in counts[:other]])


def majority(task: type[Task], records: Sequence[dict[str, Any]], dataset: Dataset) -> float | None:
    """Main figure, in per cent, of giving the split's most frequent label to every sample; None without labels."""
    frequent = by_frequency(task.judge(records, dataset) or ())
    if not frequent:
        return None
    always = [{name: x if name == "sample" else frequent[0] for name, x in record.items()} for record in records]
    return fmean(v.score for v in task.judge(always, dataset) or ())


def by_frequency(verdicts: Sequence[Verdict]) -> list[str]:
    """The different labels, most frequent first."""
    counts = Counter(v.label for v in verdicts if v.label)
    return sorted(counts, key=lambda label: (-counts[label], label))
