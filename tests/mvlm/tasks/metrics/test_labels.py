"""Labels against scikit-learn; statements counted by hand."""

import numpy as np
import pytest
from sklearn import metrics

from mvlm.tasks.metrics.labels import confusion_matrix, score_labels, score_statements

LABELS = ["cat", "dog", "owl", "yak"]


def test_figures_of_labels_equal_scikit_learn():
    rng = np.random.default_rng(0)
    wanted = rng.choice(LABELS[:3], 200).tolist()  # no yak
    predicted = [w if rng.random() < 0.5 else str(rng.choice(LABELS)) for w in wanted]
    scored = score_labels(predicted, wanted, LABELS, [str(i // 2) for i in range(200)])
    found = scored.all_figures
    assert found["accuracy"] == pytest.approx(100 * metrics.accuracy_score(wanted, predicted))
    assert found["accuracy"] == pytest.approx(100 * scored.scores.mean())
    recall = [100 * float(metrics.recall_score(wanted, predicted, labels=[x], average="macro")) for x in LABELS[:3]]
    assert [found["recall"][x] for x in LABELS[:3]] == pytest.approx(recall)
    assert found["recall"]["yak"] is None
    assert found["mean_per_class_recall"] == pytest.approx(sum(recall) / 3)
    assert found["confusion"] == metrics.confusion_matrix(wanted, predicted, labels=LABELS).tolist()
    with pytest.raises(ValueError, match="cow"):
        confusion_matrix(["cow"], ["cat"], LABELS)


def test_a_sentence_is_consistent_if_all_its_image_pairs_are_right():
    wanted = {"dev-1-0-0": True, "dev-1-1-0": False, "dev-1-2-0": True, "dev-1-0-1": True, "dev-2-0-0": False}
    # The sentences are dev-1-0 (three pairs, one wrong), dev-1-1 and dev-2-0 (one pair each).
    figures = score_statements(wanted | {"dev-1-1-0": True}, wanted, ["a"] * 5).figures
    assert figures == pytest.approx({"accuracy": 80, "consistency": 200 / 3, "examples": 5, "sentences": 3})
