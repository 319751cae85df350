"""Accuracy, recall per class and confusion of single-label classification."""

from collections.abc import Sequence
from typing import Any

import numpy as np


def confusion_matrix(predicted: Sequence[str], wanted: Sequence[str], labels: Sequence[str]) -> np.ndarray:
    """Counts, int64 (labels, labels): rows are the wanted labels, columns the predicted ones.

    ValueError for a label that is not in `labels`.
    """
    row = {label: number for number, label in enumerate(labels)}
    unknown = sorted({*predicted, *wanted} - row.keys())
    if unknown:
        raise ValueError(f"label {unknown[0]!r}: wanted one of {', '.join(labels)}; correct the file")
    counts = np.zeros((len(labels), len(labels)), dtype=np.int64)
    np.add.at(counts, ([row[x] for x in wanted], [row[x] for x in predicted]), 1)
    return counts


def classification_figures(predicted: Sequence[str], wanted: Sequence[str], labels: Sequence[str]) -> dict[str, Any]:
    """Accuracy, mean per-class recall and the recall of each label, in per cent, and the confusion.

    The mean is over the classes that occur in `wanted`; a class that does not occur has recall None.
    """
    counts = confusion_matrix(predicted, wanted, labels)
    right, total = counts.diagonal(), counts.sum(1)
    recall = {label: 100 * float(r / t) if t else None for label, r, t in zip(labels, right, total, strict=True)}
    present = [value for value in recall.values() if value is not None]
    return {
        "accuracy": 100 * float(right.sum() / counts.sum()),
        "mean_per_class_recall": sum(present) / len(present),
        "recall": recall,
        "confusion": counts.tolist(),
    }
