"""The tables and curves of a report that are made from figures alone."""

from mvlm.report.figures import curves
from support.pages import Page


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
