"""Figures of an arm over its seeds, and the paired difference to the base arm, with intervals.

Trials of two arms with the same seed see the same samples, crops and masks in the same order. Their difference is
therefore taken seed by seed. Two 95 % intervals are given: over seeds, by Student's t, which says whether other runs
would agree; and over seeds and test images, by the bootstrap, which says whether other runs on other images would. A
figure that is not a recall is not a mean over queries, and has only the first.

Shape legend: S seeds, Q queries, I images.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mvlm.errors import ConfigError
from mvlm.statistics import Interval, grouped_bootstrap, mean_interval

RESAMPLES = 4000
Floats = NDArray[np.float64]
Result = dict[str, Any]
"""What a trial found: the content of its result.json."""


class Comparison(NamedTuple):
    """One figure of one arm, beside the base arm's."""

    seeds: int
    """S, seeds that both arms have."""
    mean: float
    spread: float
    """Standard deviation over seeds; 0 for one seed."""
    difference: float
    """Mean of the differences to the base arm, seed by seed."""
    over_seeds: Interval
    """Interval of the difference, by Student's t; without width for one seed."""
    over_images: Interval | None
    """Interval of the difference, by drawing seeds and images; None for a figure that is not a recall."""
    paired: float
    """Standard deviation of the differences over seeds."""
    unpaired: float
    """What it would be with other seeds for the base arm: the root of the sum of both variances."""


def compare(arm: Sequence[Result], base: Sequence[Result], measure: str) -> Comparison:
    """Compare trials of an arm with the base arm's trials of the same seeds. ConfigError for an unknown measure.

    Trials without a partner are left out. At least one has one.
    """
    partners = {result["seed"]: result for result in base}
    pairs = [(result, partners[result["seed"]]) for result in arm if result["seed"] in partners]
    ours, theirs = (np.array([figure(r, measure) for r in side]) for side in zip(*pairs, strict=True))
    differences = ours - theirs
    over_images = None
    if is_recall(measure):
        per_query = np.stack([query_hits(a, measure) - query_hits(b, measure) for a, b in pairs])  # (S, Q)
        over_images = grouped_bootstrap(per_query, image_of_query(pairs[0][0], measure).tolist(), resamples=RESAMPLES)
    return Comparison(
        seeds=len(pairs),
        mean=float(ours.mean()),
        spread=_deviation(ours),
        difference=float(differences.mean()),
        over_seeds=interval_over_seeds(differences),
        over_images=over_images,
        paired=_deviation(differences),
        unpaired=float(np.hypot(_deviation(ours), _deviation(theirs))),
    )


def figure(result: Result, measure: str) -> float:
    """A trial's figure by its dotted name. ConfigError if there is none."""
    value: Any = result["figures"]
    for name in measure.split("."):
        absent = not isinstance(value, dict) or name not in value
        value = None if absent else value[name]
    if value is None and not absent:
        raise ConfigError(
            f"{result['arm']}, seed {result['seed']}: wanted a finite {measure}, found none; leave the arm out"
        )
    if not isinstance(value, int | float):
        raise ConfigError(
            f"measures: wanted a figure of `mvlm eval retrieval`, such as ir.r1 or gain_text_nats, or a split and a "
            f"figure of a task, such as test.accuracy, got {measure!r}"
        )
    return float(value)


def is_recall(measure: str) -> bool:
    """True for a recall, such as ir.r1, itc.tr.r5 or unseen.ir.r10: a mean over queries."""
    *where, cut = measure.split(".")
    return bool(where) and where[-1] in ("tr", "ir") and cut in ("r1", "r5", "r10")


def query_hits(result: Result, measure: str) -> Floats:
    """100 for each query that a recall counts as found, else 0: (Q,), so that its mean is the recall in per cent."""
    *where, cut = measure.split(".")
    ranks = result["ranks"]
    kind = "itc" if "itc" in where else "itm_alone" if "itm" in where else "itm"
    found = np.where(np.array(ranks[where[-1]][kind]) < int(cut[1:]), 100.0, 0.0)
    if "unseen" in where:
        found = found[np.array(ranks["unseen"], bool)[image_of_query(result, where[-1] + "." + cut)]]
    return found


def image_of_query(result: Result, measure: str) -> NDArray[np.int64]:
    """The image of each query of a recall: int64 (Q,)."""
    *where, _ = measure.split(".")
    ranks = result["ranks"]
    images = np.arange(len(ranks["tr"]["itm"])) if where[-1] == "tr" else np.array(ranks["owner"])
    return images[np.array(ranks["unseen"], bool)[images]] if "unseen" in where else images


def interval_over_seeds(values: Floats) -> Interval:
    """95 % interval of the mean of values (S,) by Student's t. One value alone has an interval without width."""
    if len(values) == 1:
        return Interval(float(values[0]), float(values[0]))
    return mean_interval(values.tolist())


def _deviation(values: Floats) -> float:
    return float(values.std(ddof=1)) if len(values) > 1 else 0.0
