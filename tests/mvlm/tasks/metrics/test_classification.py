"""Recall and confusion against scikit-learn."""

import numpy as np
import pytest
from sklearn import metrics

from mvlm.tasks.metrics.classification import classification_figures, confusion_matrix

LABELS = ["cat", "dog", "owl", "yak"]


def test_figures_equal_scikit_learn():
    rng = np.random.default_rng(0)
    wanted = rng.choice(LABELS[:3], 200).tolist()  # no yak
    predicted = [w if rng.random() < 0.5 else str(rng.choice(LABELS)) for w in wanted]
    found = classification_figures(predicted, wanted, LABELS)
    assert found["accuracy"] == pytest.approx(100 * metrics.accuracy_score(wanted, predicted))
    recall = [100 * float(metrics.recall_score(wanted, predicted, labels=[x], average="macro")) for x in LABELS[:3]]
    assert [found["recall"][x] for x in LABELS[:3]] == pytest.approx(recall)
    assert found["recall"]["yak"] is None
    assert found["mean_per_class_recall"] == pytest.approx(sum(recall) / 3)
    assert found["confusion"] == metrics.confusion_matrix(wanted, predicted, labels=LABELS).tolist()


def test_an_unknown_label_is_refused():
    with pytest.raises(ValueError, match="label 'cow': wanted one of cat, dog, owl, yak"):
        confusion_matrix(["cow"], ["cat"], LABELS)
