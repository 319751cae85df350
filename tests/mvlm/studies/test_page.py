"""Conclusions of a study's page; paired differences and their intervals, against scipy and loops."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mvlm.errors import ConfigError
from mvlm.statistics import mean_interval
from mvlm.studies import page
from mvlm.studies.page import Comparison, Interval, answer, compare, figure, image_of_query, query_hits
from mvlm.studies.study import read_study
from mvlm.studies.trial import loss_curve
from support.pages import Page

STUDY = Path(__file__).parents[3] / "studies/objectives.toml"


@pytest.mark.parametrize(
    "seeds, over_seeds, over_images, found",
    [
        (2, (1, 3), (-1, 5), "no arm differs beyond its interval"),
        (2, (1, 3), (0.5, 3.5), "ITC +2 [0.5, 3.5]"),
        (2, (-3, -1), (-5, -1), "ITC +2 [-5, -1]"),
        (2, (1, 1), None, "ITC +2 [1, 1]"),
        (1, (1, 1), None, "no arm differs beyond its interval"),  # of one value, the interval has no width
    ],
)
def test_an_arm_differs_if_its_widest_interval_leaves_0_out(seeds, over_seeds, over_images, found):
    row = Comparison(seeds, 1.0, 0.0, 2.0, Interval(*over_seeds), over_images and Interval(*over_images), 0.0, 0.0)
    assert answer(read_study(STUDY), "ir.r1", {"ITC": row}) == f"ir.r1: {found}"


OWNER = [0, 0, 1, 2, 2, 2]


def result(seed: int, ir: list[int], gain: float = 0.0, unseen: list[bool] | None = None) -> dict[str, Any]:
    hits = 100 * np.mean([rank < 1 for rank in ir])
    return {
        "seed": seed,
        "figures": {"ir": {"r1": float(hits)}, "gain_text_nats": gain},
        "ranks": {
            "tr": {"itm": [0, 3, 12], "itc": [1, 1, 1], "itm_alone": [4, 5, 6]},
            "ir": {"itm": ir, "itc": [0] * 6},
            "owner": OWNER,
            "unseen": unseen,
        },
    }


def test_a_difference_is_taken_seed_by_seed() -> None:
    base = [result(s, [0, 5, 0, 0, 9, s % 2], gain=s) for s in (4, 1, 3)]
    arm = [result(s, [0, 0, 0, 0, 9, s % 2], gain=s + 0.5 + 0.1 * (s == 3)) for s in (1, 3, 4, 7)]
    found = compare(arm, base, "ir.r1")
    assert found.seeds == 3
    assert found.difference == pytest.approx(100 / 6)
    assert found.mean == pytest.approx(np.mean([400 / 6, 400 / 6, 500 / 6]))
    assert found.over_images is not None
    assert found.over_images.low >= 0
    assert found.over_images.high > 0
    assert found.paired == pytest.approx(0)
    ranks = [400 / 6, 400 / 6, 500 / 6]
    assert found.unpaired == pytest.approx(np.sqrt(2 * np.var(ranks, ddof=1)))
    gain = compare(arm, base, "gain_text_nats")
    assert gain.over_images is None
    assert gain.difference == pytest.approx(0.5 + 0.1 / 3)
    assert gain.paired == pytest.approx(np.std([0.5, 0.6, 0.5], ddof=1))


@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize("most", [3, 12], ids=["alike", "better for one arm"])
def test_the_interval_over_images_is_never_narrower_than_that_over_seeds(seeds: int, most: int) -> None:
    rng = np.random.default_rng(seeds)
    trials = [[result(s, rng.integers(0, end, size=6).tolist()) for s in range(seeds)] for end in (3, most)]
    found = compare(trials[1], trials[0], "ir.r1")
    assert found.over_images is not None
    assert found.over_images.low <= found.over_seeds.low < found.over_seeds.high <= found.over_images.high


@pytest.mark.extended
@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize("spread", [0.05, 0.15, 0.5], ids=["seeds matter less", "as much", "more than images"])
def test_the_interval_over_images_holds_the_truth_in_95_of_100_studies(seeds: int, spread: float, monkeypatch) -> None:
    monkeypatch.setattr(page, "RESAMPLES", 200)
    rng, covered, number = np.random.default_rng(seeds), 0, 200
    for _ in range(number):
        values = rng.normal(size=60) + spread * rng.normal(size=(seeds, 1)) + rng.normal(size=(seeds, 60))  # around 0
        found = page.with_images(mean_interval(values.mean(1).tolist()), values, np.arange(60))
        covered += found.low <= 0 <= found.high
    assert covered / number > 0.91  # less than that by chance in one of 100, if it is 0.95


def test_the_curve_of_a_loss_has_few_points_which_are_means() -> None:
    values = np.random.default_rng(0).random(1001)
    rows = [{"step": step, "itc": None if step == 3 else float(x)} for step, x in enumerate(values, 1)]
    found = loss_curve(rows, "itc")
    assert 50 < len(found) <= 64
    steps, kept = [step for step, _ in found], np.delete(values, 2)
    assert (steps[0], steps[-1], sorted(steps)) == (17, 1001, steps)
    for (start, _), (step, mean) in zip([(1, 0), *found], found, strict=False):
        np.testing.assert_allclose(mean, kept[max(0, start - 1) : step - 1].mean(), rtol=1e-4)
    assert loss_curve(rows[:5], "itc") == [[s, pytest.approx(values[s - 1], rel=1e-4)] for s in (1, 2, 4, 5)]
    assert loss_curve(rows, "mlm") == []


def test_a_figure_that_is_not_finite_is_said_to_be_so() -> None:
    figures: dict[str, Any] = {"ir": {"r1": 1.0}, "gain_text_nats": None}
    trial = result(3, [0] * 6) | {"arm": "high rates", "figures": figures}
    with pytest.raises(ConfigError, match="high rates, seed 3: wanted a finite gain_text_nats, found none"):
        figure(trial, "gain_text_nats")
    for measure in ("gain_txt_nats", "ir.r2", "ir", ""):
        with pytest.raises(ConfigError, match="measures: wanted a figure of"):
            figure(trial, measure)


def test_recalls_count_the_queries_that_they_name() -> None:
    trial = result(0, [0, 4, 5, 9, 10, 2], unseen=[False, True, True])
    assert query_hits(trial, "ir.r5").tolist() == [100, 100, 0, 0, 0, 100]
    assert query_hits(trial, "itc.ir.r1").tolist() == [100] * 6
    assert query_hits(trial, "itm.tr.r5").tolist() == [100, 0, 0]
    assert query_hits(trial, "tr.r10").tolist() == [100, 100, 0]
    assert query_hits(trial, "unseen.ir.r10").tolist() == [100, 100, 0, 100]  # captions of the images 1 and 2
    assert query_hits(trial, "unseen.tr.r5").tolist() == [100, 0]
    both = trial | {"figures": {"tr": {"r1": 100 / 3}, "ir": {"r1": 100 / 6}}}  # 1 of 3 images, 1 of 6 captions
    assert query_hits(both, "r1").mean() == pytest.approx(figure(both, "r1")) == pytest.approx(25)
    assert image_of_query(both, "r1").tolist() == [0, 1, 2, *OWNER]


@pytest.mark.slow
def test_a_planted_effect_is_found_at_its_size_and_a_planted_null_is_not() -> None:
    """One arm is the base with the right answers of 3 % of 2,000 images shuffled, one is trained anew, as 8 seeds."""
    rng = np.random.default_rng(0)
    images, wrong = 2000, 60
    easy = rng.beta(3, 2, images)  # how often a model ranks the image's caption first
    first = rng.random((8, 2, images)) < easy  # of a seed and a direction
    shuffled, again = first.copy(), rng.random((8, 2, images)) < easy
    for hits in shuffled:  # a query whose right answer is another pair's finds it as often as by chance
        hits[:, rng.permutation(images)[:wrong]] = rng.random((2, wrong)) < 1 / images

    def trials(hits: np.ndarray) -> list[dict[str, Any]]:
        ranks = np.where(hits, 0, 9).tolist()
        of_figures = [
            {way: {"r1": 100 * np.mean(x)} for way, x in zip(("tr", "ir"), both, strict=True)} for both in hits
        ]
        of_ranks = [
            {way: {"itm": x, "itm_alone": x} for way, x in zip(("tr", "ir"), both, strict=True)} for both in ranks
        ]
        owner = {"owner": list(range(images))}
        return [{"seed": n, "figures": {"itm": of_figures[n]}, "ranks": of_ranks[n] | owner} for n in range(len(hits))]

    planted = compare(trials(shuffled), trials(first), "itm.r1").over_images
    null = compare(trials(again), trials(first), "itm.r1").over_images
    assert planted is not None
    assert null is not None
    assert planted.low < -100 * wrong / images * easy.mean() < planted.high < 0
    assert null.low < 0 < null.high


def test_few_seeds_take_the_deviation_of_other_arms() -> None:
    """Of simulated studies, one seed's interval covers the truth in 95 of 100; its own would have no width."""
    rng, name, covered = np.random.default_rng(0), "gain_text_nats", []

    def trials(values: Any) -> list[dict[str, Any]]:
        return [{"seed": seed, "figures": {name: float(value)}} for seed, value in enumerate(values)]

    for _ in range(400):
        base = trials(np.zeros(8))
        many = [(trials(rng.normal(5, 2, 8)), base) for _ in range(2)]
        others = page.pooled([*many, (base, base), (trials([9]), base)], name)
        assert others is not None
        assert others.freedom == 14
        drawn = rng.normal(3, 2, int(rng.integers(1, 3)))
        low, high = compare(trials(drawn), base, name, others).over_seeds
        covered.append(low < 3 < high)
    assert 0.92 < np.mean(covered) < 0.98
    assert compare(trials([1, 2, 4]), base, name, others) == compare(trials([1, 2, 4]), base, name)
    assert page.pooled([(trials([1]), base)], name) is None


def test_the_papers_figures_are_a_table_of_their_own() -> None:
    study = read_study(STUDY)
    assert page.paper_table(replace(study, paper={})) is None
    table = page.paper_table(replace(study, paper={"all": {"ir.r1": 44.5}, "ITC": {"ir.r1": 40.0, "tr.r1": 58.25}}))
    assert Page(str(table)).rows == [["arm", "ir.r1", "tr.r1"], ["all", "44.5", ""], ["ITC", "40", "58.25"]]


def test_a_study_draws_the_interval_of_each_arm_with_a_partner() -> None:
    study = read_study(STUDY)
    other = next(arm for arm in study.arms if arm != study.base)
    row = Comparison(2, 1.0, 0.0, 2.0, Interval(1, 3), Interval(-1, 5), 0.0, 0.0)
    chart = page.differences_chart(study, {study.base: row, other: row})
    assert chart is not None
    assert "+2 [-1, +5]" in chart
    assert chart.count("<circle") == 1
    assert page.differences_chart(study, {study.base: row}) is None
