"""Checks of a study: which trials are evidence about masked modelling, and how many seeds it needs.

A masked task that was not learned cannot help another one. A trial counts as evidence only if it passes five rules:
where pixels are masked, the masked L1 is at most 0.9 of that of the best constant, and a wrong caption raises MIM's
loss by 5 % or more; where tokens are masked, a wrong image raises MLM's by 0.5 nats or more; in the base arm ITM ranks
at least as well as ITC; and the base arm's R@1 leaves room in both directions.
"""

from statistics import fmean
from typing import Any, NamedTuple

from mvlm.errors import ConfigError
from mvlm.studies.study import Study

MOST_L1 = 0.9
LEAST_MIM_GAIN = 5.0
LEAST_TEXT_GAIN = 0.5
BETWEEN = (10.0, 70.0)
POWER = 0.8
PILOT = 3
"""Number of first seeds, from whose paired differences the number of seeds that a study needs is estimated."""
Result = dict[str, Any]


class Rule(NamedTuple):
    """Figure of a trial that a rule looks at, and whether it passes the rule."""

    figure: float
    passed: bool


def rules(result: Result, base: bool) -> dict[str, Rule]:
    """Judge a trial of pretraining by the rules for evidence that apply to it: rule's name -> figure and outcome.

    base: True if the trial is of the base arm, for which two further rules are.
    """
    figures, settings, found = result["figures"], result["settings"], {}
    if settings["mim_weight"] > 0:
        share = figures["masked_l1"] / figures["masked_l1_train_median"]
        found["masked L1 over the constant's, at most 0.9"] = Rule(share, share <= MOST_L1)
        gain = figures.get("gain_mim_pct", figures["gain_pixels_pct"])  # one number, before there were other targets
        found["MIM's gain in %, at least 5"] = Rule(gain, gain >= LEAST_MIM_GAIN)
    if settings["mlm_weight"] > 0:
        gain = figures["gain_text_nats"]
        found["text gain in nats, at least 0.5"] = Rule(gain, gain >= LEAST_TEXT_GAIN)
    if base:
        if figures.get("itm"):
            ahead = both_ways(figures["itm"]) - both_ways(figures["itc"])
            found["points of R@1 by which ITM leads ITC, at least 0"] = Rule(ahead, ahead >= 0)
        r1 = both_ways(figures)
        found["R@1 of the base arm, 10 to 70 %"] = Rule(r1, BETWEEN[0] <= r1 <= BETWEEN[1])
    return found


def both_ways(figures: Result) -> float:
    """Mean of R@1 from image to text and from text to image."""
    return fmean((figures["tr"]["r1"], figures["ir"]["r1"]))


def evidence(study: Study, arms: dict[str, list[Result]]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table of rules: each arm's mean figure, and how many of its seeds count as evidence.

    A seed counts if its trial and the base arm's trial with the same seed pass all rules that apply to them.
    """
    found = {arm: {r["seed"]: rules(r, arm == study.base) for r in results} for arm, results in arms.items()}
    of_base = found.get(study.base, {})
    names = list(dict.fromkeys(name for trials in found.values() for trial in trials.values() for name in trial))
    rows = []
    for arm, trials in found.items():
        counted = 0
        for seed, own in trials.items():
            both = [*own.values(), *of_base.get(seed, {}).values()]
            counted += seed in of_base and all(rule.passed for rule in both)
        means = [[trial[name].figure for trial in trials.values() if name in trial] for name in names]
        verdict = f"{counted} of {len(trials)} seeds" if counted else "no evidence"
        rows.append([arm, *(f"{fmean(values):.3g}" if values else "" for values in means), verdict])
    return ["arm", *names, "counts as evidence"], rows


def seeds_needed(deviation: float, effect: float) -> int:
    """Seeds for which a paired t-test at 5 % finds an effect with a probability of 80 %.

    Args:
        deviation: standard deviation of the differences over seeds, in the unit of the effect.

    ConfigError for an effect of 0 or below.
    """
    from scipy.stats import nct, t

    if not effect > 0:
        raise ConfigError(f"effect: wanted more than 0, got {effect}")
    seeds = 2
    while True:
        shift, critical = effect * seeds**0.5 / max(deviation, 1e-12), t.ppf(0.975, seeds - 1)
        # Of a large shift the distribution is far above the critical value, and SciPy's series gives NaN.
        if shift > 30 + critical or nct.sf(critical, seeds - 1, shift) >= POWER:
            return seeds
        seeds += 1
