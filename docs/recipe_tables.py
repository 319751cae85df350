"""Tables of the recipes of pretraining: their settings, and what trainings of about as many pairs reached."""

import csv
import gzip
import json
from collections.abc import Sequence
from itertools import groupby
from math import isinf
from pathlib import Path
from statistics import fmean
from typing import Any

from mvlm.config.pretrain import RECIPES, PretrainConfig

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
ALL_FOUR = "ITC + ITM + MLM + MIM"
OF_FEW = "10 % of the pairs"
SCENES = "scenes, [a smaller `tiny`](../evidence/studies.md#on-scenes), 64 pairs a step"
Rows = list[list[str]]


def recipes() -> Rows:
    """The settings of each preset."""
    head = ["preset", "for pairs", "model", "steps x pairs", "warm-up", "rate, last", "weight decay", "beta2", "crops"]
    rows, least = [head], 0.0
    for name, recipe in RECIPES.items():
        run = PretrainConfig.preset(name, data=Path(), out=Path())
        size = "" if not recipe.most_pairs else f"above {_count(least)}" if isinf(recipe.most_pairs) else ""
        size = size or (f"{_count(least)} to {_count(recipe.most_pairs)}" if recipe.most_pairs else "")
        rows.append(
            [
                f"`{name}`",
                size,
                f"`{recipe.model}`",
                f"{run.max_steps:,} x {run.batch_size:,}",
                f"{run.warmup_steps:,}",
                f"{run.lr_encoder:g}, x {run.lr_end:g}",
                f"{run.weight_decay:g}",
                f"{run.beta2:g}",
                f"{run.crop_scale[0]:g} to {run.crop_scale[1]:g}",
            ]
        )
        least = recipe.most_pairs or least
    return rows


def curves() -> Rows:
    """What trainings of ever more pairs reached: ours by R@1 of held-out images, others' by zero-shot accuracy."""
    head = ["pairs", "data and training", "nearest preset", "measure, %", "curve", "from"]
    demo = json.loads((RESULTS / "demo.json").read_text()).values()
    of_demo = fmean((found["tr"]["r1"] + found["ir"]["r1"]) / 2 for found in demo)
    reading = json.loads((RESULTS / "reading.json").read_text())
    of_reading = (reading["tr"]["r1"] + reading["ir"]["r1"]) / 2
    few = [
        _trials("scenes", f"{ALL_FOUR}, {OF_FEW}"),
        _trials("scenes_saturation", f"{ALL_FOUR}, 1,600 steps"),
        _trials("scenes_saturation", f"{ALL_FOUR}, 3,355 steps"),
    ]
    many = [_trials("scenes", ALL_FOUR), _trials("screening", "all four losses, as many steps")]
    study = "[studies](../evidence/studies.md#on-scenes)"
    rows = [
        ["1,600", SCENES, "`tiny`", "R@1 by ITM", ", ".join(map(_point, few)), study],
        [
            "3,165",
            "emoji, 64 pixels, 128 pairs a step",
            "`tiny`",
            "R@1",
            f"{of_demo:.1f} after 590 steps ({len(demo)} seeds)",
            "`make demo`",
        ],
        [
            "8,000",
            "scenes with places, a smaller `tiny`, 128 pairs a step",
            "`tiny`",
            "R@1",
            f"{of_reading:.1f} after 2,000 steps",
            "`make reading`",
        ],
        ["16,000", SCENES, "`tiny`", "R@1 by ITM", ", ".join(map(_point, many)), study],
    ]
    with (RESULTS / "published" / "clip-curves.csv").open() as lines:
        for (data, pairs), points in groupby(csv.DictReader(lines), lambda row: (row["data"], int(row["pairs"]))):
            found = list(points)
            curve = ", ".join(f"{row['imagenet_zero_shot_top1']} ({row['epoch']})" for row in found)
            source = found[0]["source"]
            rows.append(
                [
                    f"{pairs / 1e6:.0f} M",
                    f"{data}, {found[0]['what']}",
                    f"`{found[0]['preset']}`",
                    "ImageNet, zero-shot (epochs)",
                    curve,
                    f"[{source.removeprefix('https://github.com/')}]({source})",
                ]
            )
    return [head, *rows]


def _count(pairs: float) -> str:
    return f"{pairs / 1e6:g} M" if pairs >= 1e6 else f"{pairs:,.0f}"


def _trials(study: str, arm: str) -> Sequence[dict[str, Any]]:
    """The committed trials of an arm of a study on scenes."""
    packed = (RESULTS / "studies" / f"scenes-{study}.jsonl.gz").read_bytes()
    return [trial for line in gzip.decompress(packed).splitlines() if (trial := json.loads(line))["arm"] == arm]


def _point(trials: Sequence[dict[str, Any]]) -> str:
    reached = fmean((trial["figures"]["itm"]["tr"]["r1"] + trial["figures"]["itm"]["ir"]["r1"]) / 2 for trial in trials)
    seeds = f"{len(trials)} seeds" if len(trials) > 1 else "one seed"
    return f"{reached:.1f} after {trials[0]['steps']:,} steps ({seeds})"


RECIPE_TABLES = {"recipes": recipes, "recipe-curves": curves}
