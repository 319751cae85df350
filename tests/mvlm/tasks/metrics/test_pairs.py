"""NLVR2's consistency, counted by hand."""

import pytest

from mvlm.tasks.metrics.pairs import nlvr_figures


def test_a_sentence_is_consistent_if_all_its_image_pairs_are_right():
    wanted = {"dev-1-0-0": True, "dev-1-1-0": False, "dev-1-2-0": True, "dev-1-0-1": True, "dev-2-0-0": False}
    found = wanted | {"dev-1-1-0": True}
    # The sentences are dev-1-0 (three pairs, one wrong), dev-1-1 and dev-2-0 (one pair each).
    figures = nlvr_figures(found, wanted)
    assert figures["accuracy"] == pytest.approx(80)
    assert figures["consistency"] == pytest.approx(200 / 3)
    assert (figures["examples"], figures["sentences"]) == (5, 3)
