"""The pointing game and its blind baselines."""

import pytest

from mvlm.tasks.metrics.pointing import box_contains, pointing_figures


@pytest.mark.parametrize(
    "point, inside", [((10, 20), True), ((19.9, 29.9), True), ((20, 25), False), ((15, 30), False)]
)
def test_a_box_holds_its_left_and_upper_edge(point, inside):
    assert box_contains((10, 20, 10, 10), point) is inside


def test_figures_of_points():
    boxes, sizes = [(0, 0, 50, 50), (40, 40, 20, 20)], [(100, 100), (100, 100)]
    found = pointing_figures([(10, 10), (90, 90)], boxes, sizes)
    assert found == pytest.approx({"accuracy": 50, "center": 50, "chance": 100 * (0.25 + 0.04) / 2})
