"""The rules by which a trial is evidence about masked modelling, and the number of seeds, against simulated studies."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from mvlm.errors import ConfigError
from mvlm.studies.evidence import evidence, seeds_needed
from mvlm.studies.page import power
from mvlm.studies.study import read_study

STUDY = read_study(Path(__file__).parents[3] / "studies/objectives.toml")
GOOD: dict[str, Any] = {"masked_l1": 0.2699, "masked_l1_train_median": 0.3, "gain_text_nats": 0.5}
GOOD |= {"gain_mim_pct": 5.0, "gain_pixels_pct": 0.0}
"""Just good enough, as is the base arm's: ITM ranks like ITC, and R@1 is at an end of its range."""


def trial(arm: str, seed: int = 0, *, r1: float = 70.0, itm: float | None = 40.0, **figures: Any) -> dict[str, Any]:
    recalls = {way: {"r1": r1} for way in ("tr", "ir")}
    itc = {"tr": {"r1": 50.0}, "ir": {"r1": 30.0}}  # 40 in the mean
    alone = None if itm is None else {"tr": {"r1": itm - 20}, "ir": {"r1": itm + 20}}
    weights = {f"{name}_weight": float(name.upper() in arm) for name in ("mlm", "mim")}
    found = GOOD | recalls | {"itc": itc, "itm": alone} | figures
    return {"arm": arm, "seed": seed, "settings": weights, "figures": found}


ALL, BASE = "ITC + ITM + MLM + MIM", "ITC + ITM"


@pytest.mark.parametrize(
    "arm, base, counts",
    [
        ({}, {}, True),
        ({"masked_l1": 0.271}, {}, False),
        ({"gain_text_nats": 0.49}, {}, False),
        ({"gain_mim_pct": 4.99}, {}, False),
        ({"r1": 90.0, "itm": 10.0}, {}, True),  # of the base arm alone
        ({}, {"r1": 70.1}, False),
        ({}, {"r1": 10.0}, True),
        ({}, {"r1": 9.9}, False),
        ({}, {"itm": 39.9}, False),
        ({}, {"masked_l1": 0.9, "gain_text_nats": 0.0, "gain_mim_pct": 0.0}, True),  # which it does not learn
    ],
)
def test_a_seed_counts_if_it_and_the_base_arm_pass_the_rules(arm, base, counts) -> None:
    arms = {BASE: [trial(BASE, **base)], ALL: [trial(ALL, **arm), trial(ALL, seed=1)]}
    _, (_, row) = evidence(replace(STUDY, base=BASE), arms)
    assert row[0] == ALL
    assert row[-1] == ("1 of 2 seeds" if counts else "no evidence")  # the base arm has no seed 1


def test_a_result_without_a_gain_of_mims_own_loss_had_pixels_as_the_target() -> None:
    own = {name: value for name, value in GOOD.items() if name != "gain_mim_pct"}
    for gain, counts in ((5.0, "1 of 1 seeds"), (4.99, "no evidence")):
        result = trial(ALL)
        result["figures"] = {**result["figures"], **own, "gain_pixels_pct": gain}
        del result["figures"]["gain_mim_pct"]
        _, (_, row) = evidence(replace(STUDY, base=BASE), {BASE: [trial(BASE)], ALL: [result]})
        assert row[-1] == counts


@pytest.mark.parametrize("effect, deviation", [(2.0, 2.0), (1.5, 2.5), (2.0, 0.7)])
def test_seeds_needed_find_the_effect_in_80_of_100_studies_fewer_do_not(effect: float, deviation: float) -> None:
    needed, rng = seeds_needed(deviation, effect), np.random.default_rng(0)
    found = []
    for seeds in (needed - 1, needed):
        drawn = rng.normal(effect, deviation, size=(20_000, seeds))
        tested: Any = stats.ttest_1samp(drawn, 0, axis=1)
        found.append(np.mean(tested.pvalue < 0.05) if seeds > 1 else 0.0)
    assert found[0] < 0.81
    assert found[1] > 0.79


def test_the_page_says_how_many_seeds_are_needed() -> None:
    changed = replace(STUDY, base=BASE, primary="gain_text_nats", measures=["gain_text_nats"], effect=0.1)
    gains = (0.5, 0.6, 0.8, 5.0)  # of which the first three count
    arms = {
        BASE: [trial(BASE, s) for s in range(4)],
        ALL: [trial(ALL, s, gain_text_nats=x) for s, x in enumerate(gains)],
    }
    assert f"{ALL}: {seeds_needed(float(np.std([0, 0.1, 0.3], ddof=1)), 0.1)} " in power(changed, arms)
    assert power(replace(changed, effect=0.0), arms) == ""
    with pytest.raises(ConfigError, match="effect"):
        seeds_needed(1.0, 0.0)
