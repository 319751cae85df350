"""Tables of README and docs/ that are made from committed result files: `python docs/tables.py` rewrites them.

It also rewrites the parts of docs/reference/ that are made from the code (docs/generated.py).

A table stands between the lines `<!-- table: NAME -->` and `<!-- end of table -->`. A test compares every table with
its files. `python docs/tables.py --demo RUN RUN ...` first reads the evaluations of `make demo` with several seeds into
benchmarks/results/demo.json, `--reading RUN` the evaluation of `make reading`, and `--tasks runs/tasks` the results of
`make tasks` into
benchmarks/results/tasks.
"""

import argparse
import csv
import gzip
import json
import re
import sys
from collections.abc import Sequence
from math import exp
from pathlib import Path
from statistics import fmean
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # tests load this file by its path
from generated import with_generated
from recipe_tables import RECIPE_TABLES
from task_tables import TASK_TABLES, write_tasks

from mvlm.studies.page import Pooled, compare, figure, pooled

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DEMO = RESULTS / "demo.json"
READING = RESULTS / "reading.json"
"""Evaluation of the model of `make reading`."""
TUNED = "retrieval.test.mean_r1"
"""Measure of a study that fine-tunes the model of each trial."""
TABLE = re.compile(r"(<!-- table: ([a-z-]+) -->\n).*?(<!-- end of table -->)", re.DOTALL)
CONTENDERS = {
    "fast": "mvlm, fast implementation",
    "fast-compiled": "mvlm, fast, under `torch.compile`",
    "plain": "mvlm, plain implementation",
    "timm+roberta": "timm and transformers",
    "timm+roberta-compiled": "timm and transformers, under `torch.compile`",
}
SHORT = {
    "fast": "mvlm",
    "timm+roberta": "timm and transformers",
    "timm+roberta-math": "the same with attention by plain products",
}
"""Contenders of the README's table."""


def main() -> None:
    """Rewrite every table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--demo", type=Path, nargs="+", metavar="RUN", help="evaluated runs of the demo's recipe")
    parser.add_argument("--reading", type=Path, metavar="RUN", help="the run of `make reading`")
    parser.add_argument("--tasks", type=Path, metavar="FOLDER", help="folder that `make tasks` wrote to")
    options = parser.parse_args()
    if options.demo:
        write_demo(options.demo)
    if options.reading:
        READING.write_text(
            json.dumps(_without_places(json.loads((options.reading / "eval/test.json").read_text())), indent=1) + "\n"
        )
    if options.tasks:
        write_tasks(options.tasks)
    for page in pages():
        page.write_text(with_generated(with_tables(page.read_text())))


def pages() -> list[Path]:
    """Pages that may have tables."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def with_tables(text: str) -> str:
    """A page with its tables made anew."""
    return TABLE.sub(lambda found: found[1] + TABLES[found[2]]() + "\n" + found[3], text)


def write_demo(runs: Sequence[Path]) -> None:
    """Write the evaluations of runs that differ in their seeds alone to benchmarks/results/demo.json."""
    settings = [json.loads((run / "config.json").read_text()) for run in runs]
    seeds = [setting.pop("seed") for setting in settings]
    for setting in settings:
        del setting["out"]
    if any(setting != settings[0] for setting in settings) or len(set(seeds)) < len(seeds):
        raise SystemExit("wanted runs that differ in their seeds alone; `mvlm report RUN RUN` shows the differences")
    found = {
        str(seed): json.loads((run / "eval" / "test.json").read_text())
        for seed, run in sorted(zip(seeds, runs, strict=True))
    }
    DEMO.write_text(json.dumps({seed: _without_places(figures) for seed, figures in found.items()}, indent=1) + "\n")


def _without_places(figures: dict[str, Any]) -> dict[str, Any]:
    """An evaluation without paths and times."""
    return {name: value for name, value in figures.items() if name not in ("checkpoint", "data", "seconds")}


def demo() -> dict[str, dict[str, Any]]:
    """Evaluation of the demo by seed."""
    return json.loads(DEMO.read_text())


def worst(found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Evaluation of the seed with the lowest mean of both R@1."""
    return min(found.values(), key=lambda figures: figures["tr"]["r1"] + figures["ir"]["r1"])


def demo_retrieval() -> str:
    """Recall of the demo: the worst seed with intervals, unseen concepts, chance."""
    found = demo()
    figures = worst(found)
    rows = [["per cent, test split", "image to text R@1", "R@5", "R@10", "text to image R@1", "R@5", "R@10"]]
    for name, part in (
        ("all images", figures),
        (f"{figures['unseen']['n_images']} of unseen concepts", figures["unseen"]),
    ):
        cells = []
        for way in ("tr", "ir"):
            for k in ("r1", "r5", "r10"):
                low, high = part[f"{way}_95"][k]
                cells.append(f"{part[way][k]:.1f} ({low:.0f} to {high:.0f})")
        rows.append([name, *cells])
    # An image has captions / images right answers among the captions, a caption one among the images.
    rows.append(["chance", *(f"{100 * k / figures['n_images']:.1f}" for k in (1, 5, 10) * 2)])
    return markdown(rows)


def demo_seeds() -> str:
    """The demo's figures by seed, and their means."""
    head = [
        "seed",
        "image to text R@1",
        "text to image R@1",
        "unseen concepts, R@10",
        "text gain, nats",
        "pixel gain, %",
    ]
    found = {
        seed: [
            *(figures[way]["r1"] for way in ("tr", "ir")),
            *(figures["unseen"][way]["r10"] for way in ("tr", "ir")),
            figures["gain_text_nats"],
            figures["gain_pixels_pct"],
        ]
        for seed, figures in demo().items()
    }
    found["mean"] = [fmean(values) for values in zip(*found.values(), strict=True)]
    rows = [
        [seed, f"{tr:.1f}", f"{ir:.1f}", f"{of_images:.1f} and {of_texts:.1f}", f"{text:.2f}", f"{pixels:.1f}"]
        for seed, (tr, ir, of_images, of_texts, text, pixels) in found.items()
    ]
    return markdown([head, *rows])


def demo_gain() -> str:
    """Cross-modal gain of the demo's worst seed by retrieval, with intervals, and the range of all seeds."""
    found = demo()
    figures = worst(found)
    rows = [["does the other modality help?", "figure", "95 % interval", f"range of {len(found)} seeds"]]
    for name, key, digits in (
        ("text: nats a masked token that the right image saves over a wrong one", "gain_text_nats", 2),
        ("pixels: per cent of masked L1 that a wrong caption adds", "gain_pixels_pct", 1),
    ):
        low, high = figures[f"{key}_95"]
        values = [each[key] for each in found.values()]
        rows.append(
            [
                name,
                f"{figures[key]:.{digits}f}",
                f"{low:.{digits}f} to {high:.{digits}f}",
                f"{min(values):.{digits}f} to {max(values):.{digits}f}",
            ]
        )
    values = [each["masked_l1"] for each in found.values()]
    white, median = figures["masked_l1_white"], figures["masked_l1_train_median"]
    blind = f"constant white {white:.3f}, the training set's median {median:.3f}"
    rows.append([f"masked L1 ({blind})", f"{figures['masked_l1']:.3f}", "", f"{min(values):.3f} to {max(values):.3f}"])
    return markdown(rows)


CLAIM = ("ITC + ITM", "ITC + ITM + MLM + MIM", "ITC + ITM, FLOPs of all four")
"""Arms of studies/scenes.toml that answer the paper's claim."""
MANY_SEEDS = (
    ("ITC + ITM + MLM + MIM", "ITC + ITM"),
    ("half of the patches, FLOPs of ITC + ITM", "ITC + ITM"),
    (
        "half of the patches, MLM, masked captions in ITC, FLOPs of ITC + ITM",
        "half of the patches, FLOPs of ITC + ITM",
    ),
)
"""Arms of studies/scenes.toml with eight seeds, each with the arm that it is compared with."""
SATURATION = "scenes-scenes_saturation"
"""The study of longer trainings with a tenth of the pairs."""


def results() -> str:
    """What was reached, for the README: one row a result, beside what it is compared with."""
    reading = json.loads(READING.read_text())["two_way"]
    seeds, vqa = demo(), json.loads((RESULTS / "easy-vqa.json").read_text())
    blind = trials_by_arm(RESULTS / "tasks" / "easy-vqa")["text alone"]
    question_alone = fmean(trial["figures"]["test"]["accuracy"] for trial in blind)
    figures = worst(seeds)
    unseen = [min(each["unseen"][way]["r10"] for each in seeds.values()) for way in ("tr", "ir")]
    text, pixels = (min(each[f"gain_{kind}"] for each in seeds.values()) for kind in ("text_nats", "pixels_pct"))
    timed = trials_by_arm(RESULTS / "studies" / "scenes-scenes_claim.csv")
    lengths = ("400 steps", "1,600 steps, a tenth")
    together = [_reached(timed[f"all four, {length}"]) for length in lengths]
    alone = [_reached(timed[f"ITC + ITM, time of all four in {length}"]) for length in lengths]
    with (RESULTS / "integrations-transformers.csv").open() as file:
        rows = list(csv.DictReader(file))
    classes = {row["class"] for row in rows if row["status"] == "equal"}
    classes -= {row["class"] for row in rows if row["status"] not in ("equal", "not run")}
    fused = {row["class"] for row in rows if int(row["fused_calls"] or 0)} & classes
    return markdown(
        [
            ["what", "reached", "beside"],
            [
                "[A hidden word](docs/evidence/studies.md#masked-images-that-read) is likelier with its image than "
                "with one whose object is another",
                f"{reading['words_pct']:.1f} %",
                "chance: 50 %",
            ],
            [
                "A hidden object, painted from its caption, is nearer to the truth than to another object",
                f"{reading['cells_pct']:.1f} %",
                "chance: 50 %",
            ],
            [
                "[All four losses](docs/evidence/studies.md#in-equal-time-with-mim-that-reads): R@1 on scenes after "
                "400 steps; with a tenth of the pairs after 1,600",
                " and ".join(f"{r1:.0f} %" for r1 in together),
                f"ITC + ITM in equal time: {' and '.join(f'{r1:.0f} %' for r1 in alone)}",
            ],
            [
                "[The demo](docs/start/demo.md): R@1, image to text and text to image",
                f"{figures['tr']['r1']:.0f} and {figures['ir']['r1']:.0f} %",
                "chance: 0.2 %",
            ],
            [
                "The demo's concepts absent from training: R@10",
                f"{unseen[0]:.0f} and {unseen[1]:.0f} %",
                "chance: 2 %",
            ],
            ["The demo's hidden words, given their image", f"{exp(text):.1f} times as likely", "given another image"],
            ["The demo's hidden patches, given another caption", f"{pixels:.0f} % more error", "given their own"],
            [
                "[easy-VQA](docs/evidence/tasks.md), fine-tuned: accuracy",
                f"{vqa['accuracy']:.0f} %",
                f"from the question alone: {question_alone:.0f} %",
            ],
            [
                "[Swapped transformers classes](docs/evidence/kernels.md) with equal outputs and gradients",
                f"{len(classes)} ({len(fused)} fused)",
                "different: 0",
            ],
        ]
    )


def speed() -> str:
    """Speed and memory of a whole step for the README, and how many times as fast ours is."""
    rows = [["a whole step", "`tiny`, pairs/s", "mvlm is", "memory, MB", "`base`: mvlm is"]]
    tiny, base = read_steps("tiny", "xeon"), read_steps("base", "xeon")
    for contender, label in SHORT.items():
        row = tiny[contender]
        times = [
            ""
            if contender == "fast"
            else f"**{float(of['fast']['pairs_per_s']) / float(of[contender]['pairs_per_s']):.1f}x**"
            for of in (tiny, base)
        ]
        rows.append([label, f"{float(row['pairs_per_s']):.0f}", times[0], f"{float(row['peak_mb']):.0f}", times[1]])
    return markdown(rows)


def step_speed() -> str:
    """Speed and peak memory of a whole step, relative to the fastest eager peer."""
    head = ["a whole step, two cores of an EPYC (Zen 5), bf16"]
    found = {name: read_steps(name) for name in ("tiny", "base")}
    for preset in found:
        head += [f"`{preset}`, pairs/s", "to the best eager peer (95 %)", "peak MB"]
    rows = [head]
    for contender, label in CONTENDERS.items():
        cells: list[str] = []
        for preset in found.values():
            row = preset.get(contender)
            if row is None:
                cells += ["", "", ""]
                continue
            ratio, low, high = (float(row[f"vs_eager{end}"]) for end in ("", "_low", "_high"))
            interval = f"{ratio:.2f}x ({low:.2f} to {high:.2f})" if ratio != 1 else "1"
            cells += [f"{float(row['pairs_per_s']):.3g}", interval, f"{float(row['peak_mb']):.0f}"]
        rows.append([label, *cells])
    return markdown(rows)


def read_steps(preset: str, machine: str = "amd-zen5") -> dict[str, dict[str, str]]:
    """Rows of the committed `mvlm bench step` of a preset on a machine, by contender."""
    with (RESULTS / f"step-{preset}-{machine}.csv").open() as file:
        return {row["contender"]: row for row in csv.DictReader(file)}


def run_speed() -> str:
    """Speed of the training loop relative to the bare step, and processor time of loading."""
    rows = [["contender", "pairs/s", "over step (95 %)", "by cpu", "loader, ms"]]
    with (RESULTS / "run-tiny-amd-zen5.csv").open() as file:
        for row in csv.DictReader(file):
            ratio, low, high = (float(row[f"over_step{end}"]) for end in ("", "_low", "_high"))
            interval = f"{ratio:.2f} ({low:.2f} to {high:.2f})" if row["contender"] != "step" else "1"
            speed, share = float(row["pairs_per_s"]), float(row["cpu_over_step"])
            loader = 1000 * float(row["cpu_loader_s"])
            rows.append([f"`{row['contender']}`", f"{speed:.0f}", interval, f"{share:.2f}", f"{loader:.0f}"])
    return markdown(rows)


def trials_by_arm(table: Path) -> dict[str, list[dict[str, Any]]]:
    """The committed trials beside a study's CSV table, by their arm."""
    packed, trials = table.with_suffix(".jsonl.gz"), {}
    text = gzip.decompress(packed.read_bytes()).decode() if packed.exists() else table.with_suffix(".jsonl").read_text()
    for trial in map(json.loads, text.splitlines()):
        trials.setdefault(trial["arm"], []).append(trial)
    return trials


def study(name: str, arms: str) -> str:
    """The committed results of a study on emoji: R@1 in both directions, by ITC and by ITM alone, and gains.

    R@1 by ITM alone, where the study has it, else R@1 carries the difference from the base arm.

    Args:
        name: of the study's file.
        arms: head of the column of arms.
    """
    file = RESULTS / "studies" / f"emoji-{name}.csv"
    with file.open() as lines:
        rows = {(row["arm"], row["measure"]): row for row in csv.DictReader(lines)}
    trials = trials_by_arm(file)
    head = ["seeds", "image to text R@1", "text to image R@1", "by ITC alone", "by ITM alone", "text gain, nats"]
    table = [[arms, *head, "pixel gain, %", "masked L1 over the constant's"]]
    for arm in dict.fromkeys(arm for arm, _ in rows):
        cells = []
        primary = rows.get((arm, "itm.r1"))
        for measure in ("tr.r1", "ir.r1"):
            row = rows[arm, measure]
            difference = "" if primary else _difference(row)
            cells.append(f"{float(row['mean']):.1f}" + difference)
        for kind in ("itc", "itm"):
            found = [trial["figures"][kind] for trial in trials[arm] if trial["figures"][kind]]
            r1 = [figures[way]["r1"] for figures in found for way in ("tr", "ir")]
            cells.append(f"{fmean(r1):.1f}" if r1 else "")
        if primary:
            cells[-1] += _difference(primary)
        for measure, n in (("gain_text_nats", 2), ("gain_pixels_pct", 1)):
            cells.append(f"{float(rows[arm, measure]['mean']):.{n}f}")
        rebuilding = [trial["figures"] for trial in trials[arm] if trial["settings"]["mim_weight"] > 0]
        l1 = [figures["masked_l1"] / figures["masked_l1_train_median"] for figures in rebuilding]
        cells.append(f"{fmean(l1):.2f}" if l1 else "")
        table.append([arm, rows[arm, "ir.r1"]["seeds"], *cells])
    kept = [column for column in zip(*table, strict=True) if any(column[1:])]
    return markdown(list(zip(*kept, strict=True)))


def claim() -> str:
    """The paper's claim on scenes: all four losses beside ITC + ITM, with equal steps and with equal FLOPs."""
    rows = [
        [
            "pairs",
            "steps",
            "R@1, %",
            "ITC + ITM",
            "all four losses, equal steps, add",
            "ITC + ITM, equal FLOPs, adds to it",
        ],
    ]
    base, ours, longer = CLAIM
    few = ", 10 % of the pairs"
    for pairs, steps, study_file, names in (
        ("all", "400", "scenes-scenes", CLAIM),
        ("a tenth", "400", "scenes-scenes", tuple(name + few for name in CLAIM)),
        ("a tenth", "1,600", SATURATION, (f"{base}, 1,600 steps", f"{ours}, 1,600 steps", longer)),
        ("a tenth", "3,355", SATURATION, (longer, f"{ours}, 3,355 steps", f"{longer} in 3,355 steps")),
    ):
        trials = trials_by_arm(RESULTS / "studies" / f"{study_file}.csv")
        alone, together, as_dear = (trials[name] for name in names)
        for kind, measure in (("by ITM alone", "itm.r1"), ("fine-tuned", TUNED)):
            cells = [f"{_reached(alone, measure):.1f} ({_seeds(len(alone))})", _added(together, alone, measure)]
            rows.append([pairs, steps, kind, *cells, _added(as_dear, together, measure)])
    return markdown(rows)


def claim_in_equal_time() -> str:
    """All four losses beside ITC + ITM in equal time and with equal FLOPs, of studies/scenes_claim.toml."""
    trials = trials_by_arm(RESULTS / "studies" / "scenes-scenes_claim.csv")
    rows = [["pairs", "all four losses, or another form of them", "R@1, %", "reached", "ITC + ITM in its time adds"]]
    rows[0].append("ITC + ITM with its FLOPs adds")
    forms = [("all", 400, ""), ("a tenth", 400, ""), ("a tenth", 1600, "")]
    forms += [("a tenth", 1600, "three tenths of the blocks"), ("a tenth", 1600, "half of the patches")]
    for pairs, steps, form in forms:
        spent = f"all four in {steps:,} steps" + (", a tenth" if pairs != "all" else "")
        ours = trials[f"all four, {form}, time of {spent}" if form else spent.replace(" in ", ", ")]
        timed = trials[f"ITC + ITM, time of {spent}"]
        counted = [] if form else trials[f"ITC + ITM, FLOPs of {spent}"]
        for kind, measure in (("by ITM alone", "itm.r1"), ("fine-tuned", TUNED)):
            differences = [_added(timed, ours, measure), _added(counted, ours, measure) if counted else ""]
            name = f"{steps:,} steps" + (f": {form}, in the time of these" if form else "")
            rows.append([pairs, name, kind, f"{_reached(ours, measure):.1f}", *differences])
    return markdown(rows)


def reading_study() -> str:
    """What makes MIM read, of studies/scenes_reading.toml: gains, two-way choices and retrieval of each arm."""
    file = RESULTS / "studies" / "scenes-scenes_reading.csv"
    with file.open() as lines:
        rows = {(row["arm"], row["measure"]): row for row in csv.DictReader(lines)}
    trials = trials_by_arm(file)
    head = ["target and loss of MIM", "seeds", "MIM gain, %", "pixel gain, %", "right cell, %", "right word, %"]
    table = [[*head, "R@1, image to text and back"]]
    for arm, found in trials.items():
        gains = [_reached(found, name) for name in ("gain_mim_pct", "gain_pixels_pct")]
        choices = [_reached(found, f"two_way.{name}_pct") for name in ("cells", "words")]
        spread = [
            min(trial["figures"]["gain_mim_pct"] for trial in found),
            max(t["figures"]["gain_mim_pct"] for t in found),
        ]
        own = f"{gains[0]:.1f}" + (f" ({spread[0]:.1f} to {spread[1]:.1f})" if len(found) > 1 else "")
        cells = [own, f"{gains[1]:.1f}", *(f"{value:.1f}" for value in choices)]
        cells += [" and ".join(f"{_reached(found, f'{way}.r1'):.0f}" for way in ("tr", "ir"))]
        table.append([arm, rows[arm, "gain_mim_pct"]["seeds"], *cells])
    return markdown(table)


def reading() -> str:
    """The evaluation of `make reading`."""
    found = json.loads(READING.read_text())
    rows = [["`make reading`", "reached", "95 %", "by chance, or untrained"]]
    for what, name, of, chance in (
        ("right image of a hidden word, %", "words_pct", found["two_way"], "50"),
        ("right look of a hidden cell, %", "cells_pct", found["two_way"], "50"),
        ("MIM gain, %", "gain_mim_pct", found, f"{found['gain_untrained_pct']:.2f}"),
        ("pixel gain, %", "gain_pixels_pct", found, "0"),
        ("text gain, nats", "gain_text_nats", found, "0"),
    ):
        low, high = of[f"{name}_95"]
        rows.append([what, f"{of[name]:.2f}", f"{low:.2f} to {high:.2f}", chance])
    for what, way in (("image to text R@1, %", "tr"), ("text to image R@1, %", "ir")):
        low, high = found[f"{way}_95"]["r1"]
        chance = f"{100 / found['n_images']:.1f}"
        rows.append([what, f"{found[way]['r1']:.1f}", f"{low:.1f} to {high:.1f}", chance])
    return markdown(rows)


def masking() -> str:
    """What dropping half of the patches adds to ITC + ITM, and what masked words add to that, in R@1 by ITM alone."""
    half, masked = "half of the patches", "half of the patches, MLM, masked captions in ITC"
    head = [
        "pairs",
        "FLOPs, in steps of ITC + ITM",
        "ITC + ITM: R@1 by ITM, %",
        f"{half} adds",
        "MLM and masked captions add to that",
    ]
    rows = [head]
    of_each = {name: trials_by_arm(RESULTS / "studies" / f"scenes-{name}.csv") for name in ("scenes", "scenes_twice")}
    # Of the differences of 400 steps, most of which have eight seeds.
    others = pooled(((of_each["scenes"][one], of_each["scenes"][base]) for one, base in MANY_SEEDS), "itm.r1")
    for name, steps in (("scenes", 400), ("scenes_twice", 800)):
        arms = of_each[name]
        for share in ("", ", 10 % of the pairs"):
            base, ours, theirs = (
                arms.get(arm + share, [])
                for arm in ("ITC + ITM", f"{half}, FLOPs of ITC + ITM", f"{masked}, FLOPs of ITC + ITM")
            )
            if not ours:
                continue
            added = _added(ours, base, others=others), _added(theirs, ours, others=others)
            cells = [f"{_reached(base):.1f} ({_seeds(len(base))})", *added]
            rows.append(["a tenth" if share else "all", f"{steps}", *cells])
            if share:  # three seeds had been seen when the others ran
                later = [[trial for trial in arm if trial["seed"] > 2] for arm in (theirs, ours)]
                rows.append(["a tenth, seeds 3 to 7 alone", f"{steps}", "", "", _added(*later)])
    return markdown(rows)


def _reached(trials: list[dict[str, Any]], measure: str = "itm.r1") -> float:
    """Mean over the seeds of an arm."""
    return fmean(figure(trial, measure) for trial in trials)


def _added(
    ours: list[dict[str, Any]], theirs: list[dict[str, Any]], measure: str = "itm.r1", others: Pooled | None = None
) -> str:
    """Paired difference of two arms, its interval over seeds and, where ranks are known, images, and the seeds."""
    found = compare(ours, theirs, measure, others)
    low, high = found.over_images or found.over_seeds
    interval = f"{low:+.1f} to {high:+.1f}; " if low < high else ""  # one seed without ranks has none
    return f"{found.difference:+.1f} ({interval}{_seeds(found.seeds)})"


def _seeds(count: int) -> str:
    return "one seed" if count == 1 else f"{count} seeds"


def _difference(row: dict[str, str]) -> str:
    """The difference of an arm with its interval, as a page says it; nothing for the base arm."""
    if row["arm"] == row["against"]:
        return ""
    low, high = (float(row[f"{end}_over_seeds_and_images"]) for end in ("low", "high"))
    interval = f"; {low:+.1f} to {high:+.1f}" if low < high else ""  # one seed has none
    return f" ({float(row['difference']):+.1f}{interval})"


def unseen_words() -> str:
    """R@10 of unseen concepts by the words of their captions."""
    kinds = json.loads((RESULTS / "unseen-words.json").read_text())["kinds"]
    rows = [["unseen concepts", "images", "image to text R@10, %", "captions", "text to image R@10, %"]]
    for kind, row in kinds.items():
        cells = [f"{row['tr_queries']}", f"{row['tr_r10']:.1f}", f"{row['ir_queries']}", f"{row['ir_r10']:.1f}"]
        rows.append([kind, *cells])
    return markdown(rows)


def forgetting() -> str:
    """R@1 on the data of the start and on further data, by how the encoders learned the latter: mean and range."""
    found = json.loads((RESULTS / "studies" / "forgetting.json").read_text())["seeds"].values()
    rows = [["trained further with", "R@1 on the old data, %", "R@1 on the new data, %"]]
    for arm in next(iter(found)):
        cells = []
        for data in ("old", "new"):
            values = [seed[arm][data] for seed in found]
            ends = f" ({min(values):.1f} to {max(values):.1f})" if len(values) > 1 else ""
            cells.append(f"{fmean(values):.1f}{ends}")
        rows.append([arm, *cells])
    return markdown(rows)


def another_artist() -> str:
    """Retrieval of the same emoji by the artist of the training images and by another one, for three trainings."""
    ways = [f"{way} {k}" for way in ("image to text", "text to image") for k in ("R@1", "R@10")]
    rows = [["trained on", *(f"{test}, {way}" for test in ("OpenMoji", "Twemoji") for way in ways)]]
    for run, name in (
        ("openmoji-550", "OpenMoji, 550 steps"),
        ("fluent-550", "OpenMoji and Fluent, 550 steps"),
        ("fluent-1100", "OpenMoji and Fluent, 1100 steps"),
    ):
        files = [RESULTS / "another-artist" / f"{run}-on-{test}.json" for test in ("emoji", "twemoji")]
        found = [json.loads(file.read_text()) for file in files]
        cells = [f"{each[way][k]:.1f}" for each in found for way in ("tr", "ir") for k in ("r1", "r10")]
        rows.append([name, *cells])
    return markdown(rows)


FORMS = (
    "post-norm", "gate, scale and shift", "RMSNorm", "LayerScale", "LayerNorm and rotated halves", "rotated halves",
    "rotated pairs", "InfoNCE with draws", "InfoNCE", "sigmoid",
)  # fmt: skip
"""Words of a case's shape that tell it from others of the same kernels."""


def kernel_bounds() -> str:
    """Instructions on sm_90 and bytes a value of each kernel, and the time by instructions over that by bytes."""
    found = json.loads((RESULTS / "bounds.json").read_text())["rows"]
    rows = [["kernel", "instructions, sm_90", "bytes", *found[0]["bounds"]]]
    for row in found:
        name = f"`{row['kernels'][0]}`" + next((f", {form}" for form in FORMS if form in row["shape"]), "")
        counts = [f"{row['machine']['sm_90']['of_a_value']:.1f}", f"{row['bytes_of_a_value']:.1f}"]
        shares = [bound["issue_us"] / bound["memory_us"] for bound in row["bounds"].values()]
        cells = [f"**{share:.2f}**" if share > 1 else f"{share:.2f}" for share in shares]
        rows.append([name, *counts, *cells])
    return markdown(rows)


def other_kernels() -> str:
    """Instructions and bytes a value of other libraries' kernels beside ours; what is more of ours is bold."""
    found = json.loads((RESULTS / "bounds-others.json").read_text())["rows"]
    archs = list(found[0]["machine"])
    rows = [["op", "pass", "library", *(f"instructions, {arch}" for arch in archs), "bytes"]]

    def pair(ours: float, theirs: float) -> str:
        first = f"**{ours:.1f}**" if round(ours, 1) > round(theirs, 1) else f"{ours:.1f}"
        return f"{first}, {theirs:.1f}"

    for row in found:
        counts = [pair(*(row["machine"][arch][whose]["of_a_value"] for whose in ("ours", "theirs"))) for arch in archs]
        rows.append([row["what"], row["pass"], row["whose"], *counts, pair(row["bytes_ours"], row["bytes_theirs"])])
    return markdown(rows)


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table of Markdown; the first row is its head."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


TABLES = {
    "results": results,
    "speed": speed,
    "demo-retrieval": demo_retrieval,
    "demo-seeds": demo_seeds,
    "demo-gain": demo_gain,
    "kernel-bounds": kernel_bounds,
    "other-kernels": other_kernels,
    "step-speed": step_speed,
    "run-speed": run_speed,
    "study-objectives": lambda: study("objectives", "objectives"),
    "study-own-ideas": lambda: study("own_ideas", "arm"),
    "study-scenes-claim": claim,
    "study-claim-time": claim_in_equal_time,
    "study-scenes-reading": reading_study,
    "reading": reading,
    "study-scenes-masking": masking,
    "study-optimizer": lambda: study("optimizer", "optimizer, peak rate"),
    "unseen-words": unseen_words,
    "another-artist": another_artist,
    "forgetting": forgetting,
    **{name: (lambda rows=rows: markdown(rows())) for name, rows in (TASK_TABLES | RECIPE_TABLES).items()},
}

if __name__ == "__main__":
    main()
