"""NLVR2's consistency and Winoground's scores, counted by hand."""

import pytest

from mvlm.tasks.metrics.pairs import nlvr_figures, winoground_figures


def test_a_sentence_is_consistent_if_all_its_image_pairs_are_right():
    wanted = {"dev-1-0-0": True, "dev-1-1-0": False, "dev-1-2-0": True, "dev-1-0-1": True, "dev-2-0-0": False}
    found = wanted | {"dev-1-1-0": True}
    # The sentences are dev-1-0 (three pairs, one wrong), dev-1-1 and dev-2-0 (one pair each).
    figures = nlvr_figures(found, wanted)
    assert figures["accuracy"] == pytest.approx(80)
    assert figures["consistency"] == pytest.approx(200 / 3)
    assert (figures["examples"], figures["sentences"]) == (5, 3)


@pytest.mark.parametrize(
    "scores, wanted",
    [
        ([[2, 1], [1, 2]], (100, 100, 100)),
        ([[2, 3], [1, 4]], (100, 0, 0)),
        ([[2, 1.5], [1, 1.2]], (0, 100, 0)),
        ([[2, 0], [1, 0.5]], (100, 0, 0)),  # caption 1 prefers image 0
        ([[2, 1], [3, 4]], (0, 100, 0)),
        ([[1, 1], [1, 1]], (0, 0, 0)),  # ties are wrong
    ],
)
def test_winoground_scores(scores, wanted):
    figures = winoground_figures([scores])
    assert (figures["text_score"], figures["image_score"], figures["group_score"]) == wanted
