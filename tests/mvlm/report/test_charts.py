"""Line charts: where points, axes and labels stand."""

import math
import re
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mvlm.report.charts import HEIGHT, WIDTH, line_chart, nice_range, series


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


def test_each_series_of_a_chart_has_a_line_and_a_key():
    chart = line_chart("R@1", {"image to text": ([1, 2], [3, 4]), "text to image": ([1, 3], [5, 6])})
    assert [len(line) for line in polylines(chart)] == [2, 2]
    assert [key.text for key in parse(chart).iter("span")] == ["image to text", "text to image"]
    classes = [line.attrib["class"] for line in parse(chart).iter("polyline")]
    keys = [key.attrib["class"] for key in parse(chart).iter("span")]
    assert classes == ["line0", "line1"]
    assert keys == ["key0", "key1"]


def test_guides_of_a_chart_widen_its_axis_and_are_named():
    chart = line_chart("L1", {"l1": ([1, 2], [0.3, 0.31])}, {"constant white": 0.4})
    guide = next(line for line in parse(chart).iter("line") if line.attrib["class"] == "guide")
    assert all(y > float(guide.attrib["y1"]) > 0 for _, y in polylines(chart)[0])
    assert "constant white" in [t.text for t in parse(chart).iter("text")]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_chart_points_that_are_not_finite_are_left_out(bad):
    chart = line_chart("x", {"x": ([1, 2, 3, 4], [1.0, bad, 3.0, 2.0])})
    assert chart == line_chart("x", {"x": ([1, 3, 4], [1.0, 3.0, 2.0])})
    assert "nan" not in chart
    assert "inf" not in chart


def test_a_chart_without_points_says_so():
    for lines in ({}, {"x": ([], [])}, {"x": ([1], [math.nan])}):
        chart = line_chart("x", lines, {"guide": 1.0})
        assert "no points" in "".join(parse(chart).itertext())
        assert not polylines(chart)


@pytest.mark.parametrize("xs, ys", [([5], [2.0]), ([1, 2], [0.0, 0.0]), ([1, 2], [-3.0, -3.0])])
def test_a_chart_of_one_point_or_of_a_constant(xs, ys):
    (line,) = polylines(line_chart("x", {"x": (xs, ys)}))
    assert all(0 < x < WIDTH and 0 < y < HEIGHT for x, y in line)


def test_names_in_a_chart_are_escaped():
    name = '<script>alert("1")</script> & co'
    chart = line_chart(name, {name: ([1, 2], [1, 2]), "<b>": ([1, 2], [2, 1])}, {name: 1.5})
    root = parse(chart)
    assert not list(root.iter("script"))
    assert not list(root.iter("b"))
    assert [key.text for key in root.iter("span")] == [name, "<b>"]
    assert name in [t.text for t in root.iter("text")]
    svg = root.find("svg")
    assert svg is not None
    assert svg.attrib["aria-label"] == name


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


@pytest.mark.parametrize("window", [1, 2, 7, 50])
def test_trailing_means_against_numpy(window):
    values = np.random.default_rng(0).normal(size=40).tolist()
    wanted = [np.mean(values[max(0, i - window + 1) : i + 1]) for i in range(40)]
    steps, found = series(rows_of(values), "loss", window)
    np.testing.assert_allclose(found, wanted, atol=1e-12)
    assert steps == list(range(1, 41))
    assert series([], "loss", window) == ([], [])
    assert series(rows_of([1, 2, 3e20, *[1] * 60]), "loss", window)[1][-1] == 1


def rows_of(values):
    return [{"step": step, "loss": value} for step, value in enumerate(values, 1)]


@pytest.mark.parametrize("count", [1, 1000, 1999])
def test_a_short_history_is_drawn_whole(count):
    assert series(rows_of(range(count)), "loss") == (list(range(1, count + 1)), list(range(count)))


@pytest.mark.parametrize("count", [2000, 12_345, 100_000])
def test_a_long_history_is_about_a_thousand_points_of_means_over_all_rows(count):
    values = np.random.default_rng(0).normal(size=count)
    window = count // 60
    steps, found = series(rows_of(values.tolist()), "loss", window)
    assert 1000 <= len(steps) <= 1100
    assert (steps[0], steps[-1]) == (1, count)
    assert np.diff(steps).max() <= count // 1000
    sums = np.concatenate([[0], np.cumsum(values)])
    ends = np.array(steps, dtype=int)
    wanted = (sums[ends] - sums[np.maximum(0, ends - window)]) / np.minimum(ends, window)
    np.testing.assert_allclose(found, wanted, atol=1e-10)


@pytest.mark.parametrize(
    "ends, wanted",
    [
        ([0.014, 0.059], ["0.014", "0.0365", "0.059"]),
        ([1, 4], ["1", "2.5", "4"]),
        ([1, 123_457], ["1", "61729", "123457"]),
    ],
)
def test_ticks_say_where_they_stand(ends, wanted):
    texts = parse(line_chart("R@1", {"a": (ends, [3, 4])})).iter("text")
    assert [text.text for text in texts if text.attrib["y"] == str(HEIGHT - 10)] == wanted


def test_long_labels_fit_beside_the_axis():
    """Of 12 px a digit is up to 7 px wide."""
    chart = line_chart("learning rate", {"a": ([1, 2], [0.00012, 0.00028])})
    labels = [(text.text or "", float(text.attrib["x"])) for text in parse(chart).iter("text")]
    label, end = max(labels, key=lambda label: len(label[0]))
    assert label == "0.00015"
    assert 7 * len(label) <= end
