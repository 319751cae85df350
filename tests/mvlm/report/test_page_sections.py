"""The sections of a report that are made from figures alone."""

import json

import pytest

from mvlm.report.figures import curves, unseen_note
from mvlm.report.page import attribution, settings
from support.pages import HOSTILE, Page


@pytest.mark.parametrize("unseen, words", [(None, ""), (10, ""), (4, "6 of 10 images show a concept")])
def test_unseen_concepts_are_explained_where_they_are_some(unseen, words):
    note = unseen_note({"n_images": 10, "unseen": unseen and {"n_images": unseen}})
    assert words in note
    assert bool(note) == bool(words)


def test_curves_leave_out_what_was_not_computed():
    """While reconstruction runs alone, ITC and ITM are null."""
    rows = [
        {"step": s, "mlm": 1.0, "mim": 1.0, "itc": None, "itm": None if s < 3 else 0.5, "lr": 0.1, "grad_norm": 1.0}
        for s in (1, 2, 3, 4)
    ]
    found = Page("".join(curves(rows, 1)))
    points = {
        svg["aria-label"]: line["points"] for svg, line in zip(found.all("svg"), found.all("polyline"), strict=True)
    }
    assert "ITC, nats" not in points
    assert "no points" in found.text
    assert len((points["ITM, nats"] or "").split()) == 2
    assert len((points["MLM, nats per masked token"] or "").split()) == 4


def test_settings_and_attribution_are_plain_text():
    assert settings({"data": HOSTILE, "model": {"width": 3}}) == [("data", json.dumps(HOSTILE)), ("model.width", "3")]
    assert attribution({"source": HOSTILE, "licence": ""}) == [f"source: {HOSTILE}"]
