"""The page of a study: what it concludes."""

from pathlib import Path

import pytest

from mvlm.studies.compare import Comparison, Interval
from mvlm.studies.page import answer
from mvlm.studies.study import read_study

STUDY = Path(__file__).parents[3] / "studies/objectives.toml"


@pytest.mark.parametrize("seeds, found", [(1, "no arm differs beyond its interval"), (2, "ITC +0.001 [0.001, 0.001]")])
def test_one_seed_makes_no_difference_certain(seeds, found):
    """The bootstrap of one value gives that value, with no width."""
    row = Comparison(seeds, 1.0, 0.0, 0.001, Interval(0.001, 0.001), None, 0.0, 0.0)
    assert answer(read_study(STUDY), "masked_nats", {"ITC": row}) == f"masked_nats: {found}"


@pytest.mark.parametrize(
    "over_seeds, over_images, found",
    [
        (Interval(-1, 5), Interval(1, 3), "no arm differs beyond its interval"),
        (Interval(1, 3), Interval(-1, 5), "no arm differs beyond its interval"),
        (Interval(0.5, 3.5), Interval(1, 3), "ITC +2 [0.5, 3.5]"),
        (Interval(-3, -1), Interval(-5, -2), "ITC +2 [-5, -1]"),
    ],
)
def test_an_arm_differs_if_neither_interval_contains_0(over_seeds, over_images, found):
    row = Comparison(2, 1.0, 0.0, 2.0, over_seeds, over_images, 0.0, 0.0)
    assert answer(read_study(STUDY), "ir.r1", {"ITC": row}) == f"ir.r1: {found}"
