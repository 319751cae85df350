"""Results of a study's trials compared, and its table (CSV) and page (HTML).

Trials of two arms with the same seed see the same samples, crops and masks in the same order. Their difference is
therefore taken seed by seed. Two 95 % intervals are given: over seeds, by Student's t, which says whether other runs
would agree; and over seeds and test images, which says whether other runs on other images would. The second is that of
the bootstrap, widened where the first reaches further: few drawn seeds spread too little. A figure that is not a recall
is not a mean over queries, and has only the first.

Shape legend: S seeds, Q queries, I images.
"""

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from mvlm.errors import ConfigError
from mvlm.evaluation.retrieval import DIRECTIONS, RECALLS_AT
from mvlm.report.figures import EVALUATION_CURVES, RUN_CURVES, TASK_CURVES
from mvlm.report.html import interval_chart, line_chart, table, write_page
from mvlm.statistics import Interval, grouped_bootstrap, mean_interval, t_quantile
from mvlm.studies.evidence import PILOT, evidence, seeds_needed
from mvlm.studies.study import FIGURES, Study
from mvlm_dataloading.files import write_file

RESAMPLES = 4000
CUTS = tuple(f"r{k}" for k in RECALLS_AT)
MEASURES = {
    *("gain_text_nats", "gain_mim_pct", "gain_untrained_pct", "gain_pixels_pct", "masked_nats", "masked_mim"),
    *("masked_l1", "masked_l1_white", "masked_l1_train_median", "two_way.words_pct", "two_way.cells_pct"),
    *(
        f"{queries}{ranked_by}{way}r{k}"
        for queries in ("", "unseen.")
        for ranked_by in ("", "itc.", "itm.")
        for way in ("", *(f"{way}." for way in DIRECTIONS))
        for k in RECALLS_AT
    ),
}
"""Figures of a trial of pretraining that can be compared. A recall without a direction is the mean of both."""
FEW_SEEDS = 3
"""A study of fewer seeds is said to have too few: with 2, Student's t wants 12.7 standard errors."""
Floats = NDArray[np.float64]
Result = dict[str, Any]
"""Result of a trial: the content of its result.json."""


class Comparison(NamedTuple):
    """One figure of one arm, compared seed by seed with the arm that it is paired with, usually the base arm."""

    seeds: int
    """Number S of seeds that both arms have."""
    mean: float
    spread: float
    """Standard deviation over seeds; 0 for one seed."""
    difference: float
    """Mean over seeds of the arm's figure minus the other arm's."""
    over_seeds: Interval
    """95 % interval of `difference` over seeds, by Student's t.

    With one or two seeds it uses the standard deviation of the differences of other arms; if no arm has more seeds,
    that of one seed has no width.
    """
    over_images: Interval | None
    """95 % interval of `difference` over seeds and test images, which contains `over_seeds`; None if no recall."""
    paired: float
    """Standard deviation of the differences over seeds."""
    unpaired: float
    """Standard deviation of the differences if both arms had different seeds: root of the sum of both variances."""


class Pooled(NamedTuple):
    """Pooled standard deviation of seed-by-seed differences of several pairs of arms, and its degrees of freedom."""

    deviation: float
    freedom: int

    def interval(self, differences: Floats) -> Interval:
        """95 % interval of the mean of differences (S,) that have this deviation."""
        half = t_quantile(self.freedom) * self.deviation / len(differences) ** 0.5
        return Interval(float(differences.mean()) - half, float(differences.mean()) + half)


def pooled(pairs: Iterable[tuple[Sequence[Result], Sequence[Result]]], measure: str) -> Pooled | None:
    """Standard deviation of a measure's seed-by-seed differences, pooled over pairs of arms.

    Only pairs that share at least `FEW_SEEDS` seeds count; None if there are none. It serves arms of fewer seeds: two
    seeds may differ by chance as little as 0.1 points where eight differ by 3, and one has no deviation at all.

    pairs: results of an arm, and of the arm that it is compared with.
    """
    squares, freedom = 0.0, 0
    for arm, base in pairs:
        ours, theirs = ({r["seed"]: figure(r, measure) for r in side} for side in (arm, base))
        shared = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
        if arm is not base and len(shared) >= FEW_SEEDS:
            squares += (len(shared) - 1) * float(np.var(shared, ddof=1))
            freedom += len(shared) - 1
    return Pooled((squares / freedom) ** 0.5, freedom) if freedom else None


def compare(arm: Sequence[Result], base: Sequence[Result], measure: str, others: Pooled | None = None) -> Comparison:
    """Compare trials of an arm with the base arm's trials of the same seeds. ConfigError for an unknown measure.

    Seeds that only one of them has are left out; at least one must be shared.

    others: deviation of other arms' differences, which is used if fewer than `FEW_SEEDS` seeds are shared.
    """
    partners = {result["seed"]: result for result in base}
    pairs = [(result, partners[result["seed"]]) for result in arm if result["seed"] in partners]
    ours, theirs = (np.array([figure(r, measure) for r in side]) for side in zip(*pairs, strict=True))
    differences = ours - theirs
    if arm is base or len(pairs) >= FEW_SEEDS:
        others = None
    if others is not None:
        over_seeds = others.interval(differences)
    else:  # one seed alone has an interval without width
        over_seeds = mean_interval(differences.tolist()) if len(pairs) > 1 else Interval(*2 * differences.tolist())
    over_images = None
    if is_recall(measure):
        per_query = np.stack([query_hits(a, measure) - query_hits(b, measure) for a, b in pairs])  # (S, Q)
        images = image_of_query(pairs[0][0], measure)
        over_images = (with_images if others is None else beside_images)(over_seeds, per_query, images)
    return Comparison(
        seeds=len(pairs),
        mean=float(ours.mean()),
        spread=_deviation(ours),
        difference=float(differences.mean()),
        over_seeds=over_seeds,
        over_images=over_images,
        paired=_deviation(differences),
        unpaired=float(np.hypot(_deviation(ours), _deviation(theirs))),
    )


def beside_images(over_seeds: Interval, values: Floats, images: NDArray[np.int64]) -> Interval:
    """95 % interval of a mean over seeds and test images, for too few seeds to bootstrap.

    Its half-widths are the root of the sum of squares of those over seeds and over images, as if independent.

    Args:
        over_seeds: interval over seeds.
        values: (S, Q), a value for each seed and query.
        images: int64 (Q,), image of each query, over which the bootstrap draws.
    """
    mean, drawn = float(values.mean()), grouped_bootstrap(values.mean(0), images.tolist(), resamples=RESAMPLES)
    low, high = (float(np.hypot(one - mean, other - mean)) for one, other in zip(over_seeds, drawn, strict=True))
    return Interval(mean - low, mean + high)


def with_images(over_seeds: Interval, values: Floats, images: NDArray[np.int64]) -> Interval:
    """95 % interval of the mean of values (S, Q) by a bootstrap over seeds and images, widened to contain `over_seeds`.

    images: int64 (Q,), image of each query.
    """
    drawn = grouped_bootstrap(values, images.tolist(), resamples=RESAMPLES)
    return Interval(min(drawn.low, over_seeds.low), max(drawn.high, over_seeds.high))


def figure(result: Result, measure: str) -> float:
    """Value of a measure in a trial's figures, by its dotted name such as itc.tr.r1. ConfigError if it has none.

    A recall without a direction is the mean of both directions.
    """
    if len(names := directed(measure)) > 1:
        return fmean(figure(result, name) for name in names)
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


def directed(measure: str) -> list[str]:
    """Expand a recall without a direction, such as itm.r1, to itm.tr.r1 and itm.ir.r1; any other measure is alone."""
    *where, cut = measure.split(".")
    if cut not in CUTS or (where and where[-1] in DIRECTIONS):
        return [measure]
    return [".".join([*where, way, cut]) for way in DIRECTIONS]


def is_recall(measure: str) -> bool:
    """True for a recall such as ir.r1, unseen.itc.tr.r5 or itm.r1, for which results hold the rank of every query."""
    *where, cut = directed(measure)[0].split(".")
    return bool(where) and where[-1] in DIRECTIONS and cut in CUTS and {*where} <= {*FIGURES}


def query_hits(result: Result, measure: str) -> Floats:
    """100 for each query whose right answer a recall counts as found, else 0: (Q,), whose mean is the recall in %.

    For a recall over both directions, their queries follow one another, weighted so that the mean is still the recall.
    """
    names = directed(measure)
    if len(names) > 1:
        each = [query_hits(result, name) for name in names]
        queries = sum(map(len, each))
        return np.concatenate([hits * queries / (len(names) * len(hits)) for hits in each])
    *where, cut = measure.split(".")
    ranks = result["ranks"]
    kind = "itc" if "itc" in where else "itm_alone" if "itm" in where else "itm"
    found = np.where(np.array(ranks[where[-1]][kind]) < int(cut[1:]), 100.0, 0.0)
    if "unseen" in where:
        found = found[np.array(ranks["unseen"], bool)[image_of_query(result, where[-1] + "." + cut)]]
    return found


def image_of_query(result: Result, measure: str) -> NDArray[np.int64]:
    """Index of the image that each query of a recall is, or is a caption of: int64 (Q,)."""
    names = directed(measure)
    if len(names) > 1:
        return np.concatenate([image_of_query(result, name) for name in names])
    *where, _ = measure.split(".")
    ranks = result["ranks"]
    images = np.arange(len(ranks["tr"]["itm"])) if where[-1] == "tr" else np.array(ranks["owner"])
    return images[np.array(ranks["unseen"], bool)[images]] if "unseen" in where else images


def _deviation(values: Floats) -> float:
    return float(values.std(ddof=1)) if len(values) > 1 else 0.0


COLUMNS = (
    "study", "data", "arm", "against", "measure", "seeds", "mean", "sd", "difference", "low_over_seeds",
    "high_over_seeds", "low_over_seeds_and_images", "high_over_seeds_and_images", "sd_paired", "sd_unpaired", "steps",
    "flops", "fingerprint", "commit", "machine",
)  # fmt: skip


def comparisons(study: Study, results: Sequence[Result]) -> dict[str, dict[str, Comparison]]:
    """Compare each arm of a study with its partner: measure -> arm -> comparison.

    Arms that share no seed with their partner are left out.
    """
    arms = by_arm(study, results)
    partners = {name: arms[study.partner(name)] for name in arms}
    shared = [n for n, found in arms.items() if {r["seed"] for r in found} & {r["seed"] for r in partners[n]}]
    found = {}
    for measure in study.measures:
        others = pooled(((arms[name], partners[name]) for name in shared), measure)
        found[measure] = {name: compare(arms[name], partners[name], measure, others) for name in shared}
    return found


def by_arm(study: Study, results: Sequence[Result]) -> dict[str, list[Result]]:
    """Group results of trials by arm, in the order of the study's arms."""
    return {name: [r for r in results if r["arm"] == name] for name in study.arms}


def write_csv(study: Study, results: Sequence[Result], file: Path) -> None:
    """Write one row for each arm and measure. The file holds no times, so an interrupted study writes the same."""
    arms = by_arm(study, results)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for measure, rows in comparisons(study, results).items():
        for arm, c in rows.items():
            first = arms[arm][0]
            images = c.over_images or ("", "")
            numbers = (c.mean, c.spread, c.difference, *c.over_seeds, *images, c.paired, c.unpaired)
            writer.writerow(
                [study.name, first["data"]["name"], arm, study.partner(arm), measure, c.seeds]
                + [n if n == "" else f"{n:.6g}" for n in numbers]
                + [first["steps"], _flops(first, ".4g"), first["data"]["train"]]
                + [" ".join(sorted({r["made_by"][key] for r in arms[arm]})) for key in ("commit", "machine")]
            )
    file.parent.mkdir(parents=True, exist_ok=True)
    write_file(file, text.getvalue())


def write_study_page(study: Study, results: Sequence[Result], file: Path) -> Path:
    """Write the page of a study. Returns the file."""
    arms = {name: trials for name, trials in by_arm(study, results).items() if trials}
    found = comparisons(study, results)
    return write_page(
        file,
        "study.html",
        title=study.question,
        study=study,
        answers=[answer(study, measure, rows) for measure, rows in found.items()],
        evidence=table(*evidence(study, arms)) if study.preset else None,
        power=power(study, arms),
        tables=[(m, differences_chart(study, rows), comparison_table(study, rows)) for m, rows in found.items()],
        settings=settings_table(study),
        cost=cost_table(arms),
        paper=paper_table(study),
        charts=charts(arms),
        limits=limits(study, arms),
    )


def answer(study: Study, measure: str, rows: dict[str, Comparison]) -> str:
    """One sentence on a measure: the arms whose difference to their partner has an interval without 0.

    The interval is that over seeds and images, for a recall, else that over seeds. An arm of one seed with an interval
    of no width is left out.
    """
    apart = []
    for arm, c in rows.items():
        low, high = c.over_images or c.over_seeds
        if study.partner(arm) == arm or (c.seeds == 1 and low == high):
            continue
        if low > 0 or high < 0:
            against = "" if study.partner(arm) == study.base else f" against {study.partner(arm)}"
            apart.append(f"{arm}{against} {c.difference:+.3g} [{low:.3g}, {high:.3g}]")
    return f"{measure}: {'; '.join(apart) or 'no arm differs beyond its interval'}"


def power(study: Study, arms: dict[str, list[Result]]) -> str:
    """Number of seeds that each arm needs for the study's effect to be found, as text; empty if it names no effect."""
    if not study.effect:
        return ""
    needed = {}
    for arm, results in arms.items():
        first = sorted(results, key=lambda result: study.seeds.index(result["seed"]))[:PILOT]
        partners = arms.get(study.partner(arm), [])
        if study.partner(arm) != arm and {r["seed"] for r in first} <= {r["seed"] for r in partners}:
            deviation = compare(first, partners, study.primary).paired
            if len(first) == PILOT:
                needed[arm] = f"{arm}: {seeds_needed(deviation, study.effect)} (differences of sd {deviation:.2g})"
    return "; ".join(needed.values())


def differences_chart(study: Study, rows: dict[str, Comparison]) -> Markup | None:
    """SVG of one measure: each arm's difference to its partner, with the interval that `answer` reads.

    None if no arm has a partner.
    """
    found = {}
    for arm, c in rows.items():
        partner = study.partner(arm)
        if partner != arm:
            name = arm if partner == study.base else f"{arm} against {partner}"
            found[f"{name}, {c.seeds} seed{'s' * (c.seeds > 1)}"] = (c.difference, *(c.over_images or c.over_seeds))
    return interval_chart(f"difference to {study.base}, 95 % interval", found) if found else None


def comparison_table(study: Study, rows: dict[str, Comparison]) -> Markup:
    """HTML table of one measure with a row for each arm: mean, deviations, difference to its partner, and intervals."""
    header = ["arm", "seeds", "mean", "sd", "against", "difference", "over seeds", "over seeds and images",
              "sd paired", "sd unpaired"]  # fmt: skip
    cells = []
    for arm, c in rows.items():
        partner = study.partner(arm)
        row = [arm, str(c.seeds), f"{c.mean:.4g}", f"{c.spread:.2g}"]
        if partner != arm:
            row += [partner, f"{c.difference:+.3g}", _format(c.over_seeds), _format(c.over_images)]
            row += [f"{c.paired:.2g}", f"{c.unpaired:.2g}"]
        cells.append(row + [""] * (len(header) - len(row)))
    return table(header, cells)


def _format(interval: Interval | None) -> str:
    return "" if interval is None else f"[{interval.low:+.3g}, {interval.high:+.3g}]"


def settings_table(study: Study) -> Markup:
    """HTML table of the settings in which each arm differs from the study's."""
    return table(["arm", "settings"], [[name, _flat(arm) or "those of the study"] for name, arm in study.arms.items()])


def _flat(settings: dict[str, Any], prefix: str = "") -> str:
    parts = []
    for name, value in settings.items():
        parts.append(_flat(value, f"{prefix}{name}.") if isinstance(value, dict) else f"{prefix}{name} = {value}")
    return ", ".join(parts)


def cost_table(arms: dict[str, list[Result]]) -> Markup:
    """A table of each arm's steps, FLOPs and time."""
    rows = [
        [name, str(found[0]["steps"]), _flops(found[0], ".3g"), f"{fmean(r['seconds'] for r in found):.0f}"]
        for name, found in arms.items()
    ]
    return table(["arm", "steps", "FLOPs", "seconds with evaluation, mean"], rows)


def paper_table(study: Study) -> Markup | None:
    """A table of the paper's figures; None without any."""
    if not study.paper:
        return None
    names = list(dict.fromkeys(name for row in study.paper.values() for name in row))
    rows = [[arm, *(f"{row[n]:g}" if n in row else "" for n in names)] for arm, row in study.paper.items()]
    return table(["arm", *names], rows)


def _flops(result: Result, form: str) -> str:
    """FLOPs of a trial's training as text; empty for a task."""
    return "" if result["flops"] is None else format(result["flops"], form)


def charts(arms: dict[str, list[Result]]) -> list[Markup]:
    """Charts of losses and evaluations in training, against steps and FLOPs; a line is an arm's mean over seeds."""
    found = []
    known = RUN_CURVES | TASK_CURVES | EVALUATION_CURVES
    of_tasks = {name for results in arms.values() for r in results for name in r["curves"]} - set(known)
    titles = known | {name: f"validation {name[4:]}" for name in sorted(of_tasks)}
    for name, title in titles.items():
        series = {arm: mean_curve([r["curves"].get(name, []) for r in results]) for arm, results in arms.items()}
        if not any(xs for xs, _ in series.values()):
            continue
        found.append(line_chart(f"{title}; x: steps", series))
        if any(results[0]["flops"] is None for results in arms.values()):
            continue
        per_step = {arm: results[0]["flops"] / results[0]["steps"] / 1e12 for arm, results in arms.items()}
        by_flops = {arm: ([x * per_step[arm] for x in xs], ys) for arm, (xs, ys) in series.items()}
        found.append(line_chart(f"{title}; x: training TFLOPs", by_flops))
    return found


def mean_curve(curves: Sequence[Sequence[tuple[float, float]]]) -> tuple[list[float], list[float]]:
    """Average curves of (step, value): the steps that all of them have, and the mean value at each."""
    tables = [dict(curve) for curve in curves]
    steps = sorted(set.intersection(*(set(t) for t in tables))) if tables else []
    return [float(x) for x in steps], [fmean(t[x] for t in tables) for x in steps]


def limits(study: Study, arms: dict[str, list[Result]]) -> str:
    """Sentences for a study's page on what it can and cannot show, from its numbers of seeds, steps and splits."""
    any_result = next(iter(arms.values()))[0]
    seeds = min(len(found) for found in arms.values())
    few = f" {seeds} seeds are too few: their intervals are wide, so take 5." if seeds < FEW_SEEDS else ""
    what = f"Preset {study.preset}" if study.preset else f"Task {study.task}"
    numbers = sorted({found[0]["steps"] for found in arms.values()})  # of a budget of FLOPs, each arm has its own
    steps = f"{numbers[0]:,}" if len(numbers) == 1 else f"{numbers[0]:,} to {numbers[-1]:,}"
    tested = f"splits {', '.join(study.splits)}"
    if study.preset:
        tested = f"{len(any_result['ranks']['tr']['itm'])} images of the split {study.split}"
    return (
        f"{what}, {steps} steps, data {any_result['data']['name']}, {seeds} seeds an arm, "
        f"{tested}.{few} Intervals over seeds are Student's, so they allow for the few runs; no interval allows for "
        f"the number of comparisons. A difference that its interval separates from zero holds for this model, data and "
        f"budget; larger ones may differ. {study.limits}"
    ).strip()
