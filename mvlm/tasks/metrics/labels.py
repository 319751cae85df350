"""Metrics of answers that are right or wrong: labels, and NLVR2's statements about images."""

from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np

from mvlm.tasks.metrics import Scored


def confusion_matrix(predicted: Sequence[str], wanted: Sequence[str], labels: Sequence[str]) -> np.ndarray:
    """Counts, int64 (labels, labels): rows are the wanted labels, columns the predicted ones.

    ValueError for a label that is not in `labels`.
    """
    row = {label: number for number, label in enumerate(labels)}
    if unknown := sorted({*predicted, *wanted} - row.keys()):
        raise ValueError(f"label {unknown[0]!r}: wanted one of {', '.join(labels)}; correct the file")
    counts = np.zeros((len(labels), len(labels)), dtype=np.int64)
    np.add.at(counts, ([row[x] for x in wanted], [row[x] for x in predicted]), 1)
    return counts


def score_labels(predicted: Sequence[str], wanted: Sequence[str], labels: Sequence[str], groups: list[str]) -> Scored:
    """Accuracy, mean per-class recall and the recall of each label, in per cent, and the confusion.

    The mean is over the classes that occur in `wanted`; a class that does not occur has recall None.
    """
    counts = confusion_matrix(predicted, wanted, labels)
    right, total = counts.diagonal(), counts.sum(1)
    recall = {label: 100 * float(r / t) if t else None for label, r, t in zip(labels, right, total, strict=True)}
    present = [value for value in recall.values() if value is not None]
    figures = {
        "accuracy": 100 * float(right.sum() / counts.sum()),
        "mean_per_class_recall": sum(present) / len(present),
        "recall": recall,
        "confusion": counts.tolist(),
    }
    return Scored(figures, np.array([float(a == b) for a, b in zip(predicted, wanted, strict=True)]), groups)


def set_of(identifier: str) -> str:
    """Name "split-set" of the set of images that a NLVR2 identifier "split-set-pair-sentence" belongs to.

    Statements about one set are not independent, so intervals are bootstrapped over sets.
    """
    return "-".join(identifier.rsplit("-", 3)[:2])


def check_identifier(identifier: str) -> str:
    """Message on an identifier that is not "split-set-pair-sentence", NLVR2's form; empty if it is."""
    if identifier.count("-") >= 3:
        return ""
    return f'identifier {identifier!r}: wanted the form "split-set-pair-sentence", as NLVR2 has it'


def score_statements(predicted: Mapping[str, bool], wanted: Mapping[str, bool], groups: list[str]) -> Scored:
    """Accuracy over examples, and consistency: the share of sentences that are judged right on all their image pairs.

    NLVR2 (Suhr et al., ACL 2019) judges each sentence on several image pairs.

    Args:
        predicted: judgement of each identifier of `wanted`.
        wanted: truth of each identifier "split-set-pair-sentence".

    Returns:
        accuracy and consistency in per cent, and the numbers of examples and sentences.
    """
    sentences: dict[str, list[bool]] = defaultdict(list)
    for identifier, truth in wanted.items():
        split, images, _, sentence = identifier.rsplit("-", 3)
        sentences[f"{split}-{images}-{sentence}"].append(predicted[identifier] == truth)
    right = [predicted[identifier] == truth for identifier, truth in wanted.items()]
    figures = {
        "accuracy": 100 * sum(right) / len(right),
        "consistency": 100 * sum(map(all, sentences.values())) / len(sentences),
        "examples": len(right),
        "sentences": len(sentences),
    }
    return Scored(figures, np.array(right, dtype=float), groups)
