"""The HTML of all pages: what is escaped, what is an error, and where the points, axes and labels of charts stand."""

import base64
import io
import math
import re
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from mvlm.report.figures import curves, parts
from mvlm.report.html import (
    HEIGHT,
    WIDTH,
    interval_chart,
    line_chart,
    nice_range,
    render,
    series,
    thumbnail,
    write_page,
)
from mvlm.search.index import Hit
from support.pages import Page
from support.scenes import png


def test_the_page_of_a_search_shows_answers_and_escapes_what_others_wrote(tmp_path):
    hits = [
        Hit("a<b>.png", "test", 0, 3, "0" * 64, "<script>alert(1)</script>", 0.51234, {"note": "<i>"}, 2.3456),
        Hit("stra_e_7-02f9", "", 1, 4, "0" * 64, "", -0.2, {"file": "straße 7.png"}),
    ]
    image, title = thumbnail(png(np.full((400, 200, 3), 77, np.uint8))), "red & <blue>"
    answers = [(hit, image) for hit in hits]
    page = write_page(tmp_path / "deep/page", "answers.html", title=title, query_image=image, answers=answers)
    found = Page(page.read_text())
    assert not found.all("script")
    assert not found.all("i")
    for text in (
        title,
        "1. test/a<b>.png",
        "2. straße 7.png",
        "similarity 0.512, re-ranked 2.35",
        "similarity -0.200",
        "note: <i>",
    ):
        assert text in found.text
    assert [img["src"] for img in found.all("img")] == [image] * 3
    with Image.open(io.BytesIO(base64.b64decode(image.partition(",")[2]))) as small:
        assert (small.size, small.getpixel((5, 5))) == ((80, 160), (77, 77, 77))
    assert "No answer." in render("answers.html", title="red", query_image=None, answers=[])


def parse(chart: str) -> ElementTree.Element:
    return ElementTree.fromstring(chart)


def polylines(chart: str) -> list[list[tuple[float, float]]]:
    found = []
    for line in parse(chart).iter("polyline"):
        points = [point.split(",") for point in line.attrib["points"].split()]
        found.append([(float(x), float(y)) for x, y in points])
    return found


def test_chart_points_stand_where_the_axes_say():
    chart = line_chart("loss", {"mlm": ([10, 20, 40], [1.0, 4.0, 2.0])})
    root = parse(chart)
    labels = {t.text: (float(t.attrib["x"]), float(t.attrib["y"])) for t in root.iter("text")}
    (line,) = polylines(chart)
    # A grid line's label stands 4 below it: from two of them, where each y belongs.
    low, high = labels["1"][1] - 4, labels["4"][1] - 4
    assert high < low
    for (_, found), value in zip(line, (1.0, 4.0, 2.0), strict=True):
        assert found == pytest.approx(low + (value - 1) / 3 * (high - low), abs=0.1)
    left, right = labels["10"][0], labels["40"][0]
    for (found, _), value in zip(line, (10, 20, 40), strict=True):
        assert found == pytest.approx(left + (value - 10) / 30 * (right - left), abs=0.1)
    box = [float(v) for v in root.find("svg").attrib["viewBox"].split()]  # pyright: ignore[reportOptionalMemberAccess]
    assert box == [0, 0, WIDTH, HEIGHT]
    assert all(0 < x < WIDTH and 0 < y < HEIGHT for x, y in line)
    names = line_chart("<script>", {"<script>": ([1, 2], [3, 4]), "<b>": ([1, 3], [5, 6])}, {"<i>": 9})
    assert [key.text for key in parse(names).iter("span")] == ["<script>", "<b>"]  # plain text


def test_intervals_stand_where_the_axis_says():
    chart = interval_chart("R@1", {"<b>": (2.0, -1.0, 5.0), "more": (-3.0, -4.0, -2.0)})
    root = parse(chart)
    ticks = {text.text: float(text.attrib["x"]) for text in root.iter("text") if text.get("text-anchor")}
    zero, unit = ticks["0"], (ticks["4"] - ticks["-4"]) / 8
    lines = [line for line in root.iter("line") if line.attrib["class"] in ("around", "apart")]
    dots = list(root.iter("circle"))
    expected = [("around", 2, -1, 5), ("apart", -3, -4, -2)]
    for line, dot, (kind, value, low, high) in zip(lines, dots, expected, strict=True):
        assert line.attrib["class"] == dot.attrib["class"] == kind
        found = [float(x) for x in (dot.attrib["cx"], line.attrib["x1"], line.attrib["x2"])]
        assert found == pytest.approx([zero + unit * x for x in (value, low, high)], abs=0.2)
    (guide,) = (line for line in root.iter("line") if line.attrib["class"] == "guide")
    assert float(guide.attrib["x1"]) == zero
    assert [text.text for text in root.iter("text") if not text.get("text-anchor")] == ["<b>", "more"]  # plain text


@pytest.mark.slow
@settings(deadline=None, max_examples=300)
@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6))
@example(0.5, 5.0)
@example(0.0, 1.0)
@example(-0.3, 0.6)
def test_the_axis_is_round_and_covers_the_values(low, span):
    high = low + span
    first, last, step = nice_range(low, high)
    assert re.fullmatch(r"[125]e[+-]\d\d", f"{step:.0e}")
    assert step == pytest.approx(float(f"{step:.0e}"), rel=1e-9)
    slack = 1e-9 * max(abs(low), abs(high))
    assert first <= low + slack
    assert high - slack <= last
    assert low - first < step * (1 + 1e-6)  # and no wider than it has to be
    assert last - high < step * (1 + 1e-6)
    assert 3 <= round((last - first) / step) + 1 <= 7


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_chart_points_that_are_not_finite_are_left_out(bad):
    chart = line_chart("x", {"x": ([1, 2, 3, 4], [1.0, bad, 3.0, 2.0])})
    assert chart == line_chart("x", {"x": ([1, 3, 4], [1.0, 3.0, 2.0])})
    for lines in ({}, {"x": ([], [])}, {"x": ([1], [bad])}):
        nothing = line_chart("x", lines, {"guide": 1.0})
        assert "no points" in "".join(parse(nothing).itertext())
        assert not polylines(nothing)


@pytest.mark.parametrize("count", [1, 40, 1999, 2000, 100_000])
def test_a_history_is_drawn_as_trailing_means_over_all_rows(count):
    """Whole if it is short, and as about a thousand points if it is long."""
    values = np.random.default_rng(0).normal(size=count)
    rows = [{"step": step, "loss": value} for step, value in enumerate(values.tolist(), 1)]
    for window in {1, min(count, 7), max(1, count // 60)}:
        steps, found = series(rows, "loss", window)
        assert (steps[0], steps[-1]) == (1, count)
        assert len(steps) == count if count < 2000 else 1000 <= len(steps) <= 1100
        assert np.diff(steps, prepend=0).max() <= max(1, count // 1000)
        sums, ends = np.concatenate([[0], np.cumsum(values)]), np.array(steps)
        wanted = (sums[ends] - sums[np.maximum(0, ends - window)]) / np.minimum(ends, window)
        np.testing.assert_allclose(found, wanted, atol=1e-10)
    spike = [{"step": step, "loss": value} for step, value in enumerate([1, 2, 3e20, *[1] * 60], 1)]
    assert series(spike, "loss", 50)[1][-1] == 1
    assert series([], "loss") == ([], [])


def test_curves_leave_out_what_was_not_computed():
    """ITC and ITM are null where they were not finite. Rows of a run without an objective lack it, here MIM."""
    rows = [
        {"step": s, "mlm": 1.0, "itc": None, "itm": None if s < 3 else 0.5, "lr": 0.1, "grad_norm": 1.0}
        for s in (1, 2, 3, 4)
    ]
    found = Page("".join(curves(rows, 1)))
    lines = zip(found.all("svg"), found.all("polyline"), strict=True)
    points = {svg["aria-label"]: len((line["points"] or "").split()) for svg, line in lines}
    assert "ITC, nats" not in points
    assert found.text.count("no points") == 1
    assert (points["ITM, nats"], points["MLM, nats per masked token"]) == (2, 4)


def start_event(step: int, ranks: int, **way: int) -> dict[str, Any]:
    machine = {"ranks": ranks, "device": "cpu"}
    return {"step": step, "time": "now", "machine": machine, "precision": "fp32", "way": way}


def test_resumes_are_listed_and_marked_where_computing_changed():
    """A part that computes as before has a row and no mark."""
    rows = [{"step": s, "mlm": 1.0, "lr": 0.1, "grad_norm": 1.0} for s in (0, 10, 20)]
    events = [start_event(0, 4, accumulate=1), start_event(5, 4, accumulate=1), start_event(15, 2, accumulate=2)]
    listed, places = parts(events, {})
    assert places == [15]
    assert Page(str(listed)).rows[1:] == [
        ["0", "now", "4", "cpu", "fp32", ""],
        ["5", "now", "4", "cpu", "fp32", ""],
        ["15", "now", "2", "cpu", "fp32", "ranks 2 in place of 4, accumulate 2 in place of 1"],
    ]
    assert parts(events[:1], {}) == (None, [])
    chart = parse(curves(rows, 1, places=places)[0])
    upright = [line.attrib for line in chart.iter("line") if line.attrib["x1"] == line.attrib["x2"]]
    ((x0, _), _, (x20, _)) = polylines(curves(rows, 1)[0])[0]
    assert [float(line["x1"]) for line in upright] == [pytest.approx(x0 + 0.75 * (x20 - x0), abs=0.1)]
