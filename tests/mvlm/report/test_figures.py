"""The tables and curves of a report that are made from figures alone."""

import json

import pytest

from mvlm.errors import RunError
from mvlm.report.figures import curves, pointing_game, unseen_note
from support.pages import POINTING_GAME, Page


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
    lines = zip(found.all("svg"), found.all("polyline"), strict=True)
    points = {svg["aria-label"]: len((line["points"] or "").split()) for svg, line in lines}
    assert "ITC, nats" not in points
    assert "no points" in found.text
    assert (points["ITM, nats"], points["MLM, nats per masked token"]) == (2, 4)


@pytest.mark.parametrize(
    "difference, verdict",
    [
        ([2.0, 9.04], "points better than the untrained one (95 % interval of the difference +2.0 to +9.0 points)"),
        ([0.0, 2.0], "does not point better than the untrained one"),
        ([-5.0, -2.0], "points worse than the untrained one"),
    ],
)
@pytest.mark.parametrize("named, stale", [({}, False), ({"model": "own"}, False), ({"model": "another's"}, True)])
def test_the_pointing_game_stands_beside_its_baselines_and_says_what_it_shows(
    tmp_path, difference, verdict, named, stale
):
    file = tmp_path / "grounding.json"  # of an earlier version if it names no model
    assert pointing_game(file, "own") is None
    file.write_text(json.dumps(POINTING_GAME | {"above_untrained_95": difference} | named))
    found = pointing_game(file, "own")
    assert found is not None
    assert found["source"] == "7 phrases of phrases, test; checkpoint runs/a"
    assert [row[1:] for row in found["rows"]] == [
        ["31.2", "28.0 to 34.5"], ["30.0", ""], ["12.5", "10.0 to 15.0"], ["4.0", ""], ["10.0", ""],
    ]  # fmt: skip
    assert verdict in found["verdict"]
    assert found["stale"] == stale
    file.write_text(json.dumps(POINTING_GAME))  # without the difference
    with pytest.raises(RunError, match="above_untrained_95"):
        pointing_game(file, "own")
