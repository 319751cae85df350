"""What `mvlm bench data` prints and writes."""

import csv
import json
import re
from pathlib import Path
from typing import Any

from mvlm_benchmarks.kernels.report import MACHINE_COLUMNS

Row = dict[str, Any]
COLUMNS = (
    "data", "recipe", "contender", "status", "note", "images_per_s", "images_per_s_best", "images_per_s_worst",
    "ours_over", "cpu_ms", "ours_over_cpu", "rounds", "batches", "batch", "size", *MACHINE_COLUMNS,
)  # fmt: skip


def table(rows: list[Row], recipe: str) -> str:
    """The contenders of one recipe."""
    lines = [f"{recipe:24} {'images/s':>9} {'best':>8} {'worst':>8} {'ours/it':>8} {'CPU ms':>8} {'it/ours':>8}"]
    for row in rows:
        if row["recipe"] != recipe:
            continue
        if row["status"] != "ok":
            lines.append(f"{row['contender']:24} {row['status']}: {row['note']}")
            continue
        rates = (row["images_per_s"], row["images_per_s_best"], row["images_per_s_worst"])
        ratios = [f"{row[name]:.2f}x" if name in row else "" for name in ("ours_over", "ours_over_cpu")]
        line = f"{row['contender']:24} {rates[0]:9.0f} {rates[1]:8.0f} {rates[2]:8.0f} {ratios[0]:>8}"
        lines.append(f"{line} {row['cpu_ms']:8.2f} {ratios[1]:>8}")
    return "\n".join(lines)


def stage_table(stages: dict[str, dict[str, float]]) -> str:
    """The stages of our loader, and which of them takes most."""
    lines = [
        f"{'stage':10} {'images/s':>9} {'adds us':>8}   up to and with it; processor time that it adds to a picture"
    ]
    lines += [f"{name:10} {row['images_per_s']:9.0f} {row['adds_us']:8.0f}" for name, row in stages.items()]
    worst = max(stages, key=lambda name: stages[name]["adds_us"])
    return "\n".join([*lines, f"bottleneck: {worst}", ""])


def write(
    rows: list[Row],
    stages: dict[str, dict[str, dict[str, float]]],
    others: dict[str, dict[str, Any]],
    about: dict[str, Any],
    out: Path,
    data: Path,
    json_file: Path | None,
) -> list[Path]:
    """A CSV in `out`, and `json_file` where it is given; returns both.

    rows are the contenders', stages those of each recipe, others what was measured besides, by name: its `text` is what
    the CSV has of it, and its figures are in the JSON file.
    """
    out.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"[^a-z0-9]+", "-", f"data {data.name} {about['device'].split(',')[0]}".lower()).strip("-")
    files = [out / f"{name}.csv"]
    versions = "; ".join(f"{package} {found}" for package, found in about["versions"].items() if found)
    columns = {key: about[key] for key in MACHINE_COLUMNS} | {"versions": versions}
    lines = list(rows)
    for recipe, found in stages.items():
        for stage, figures in found.items():
            note = f"stage, adds {figures['adds_us']} us of processor time a picture"
            rate = {"images_per_s": figures["images_per_s"]}
            lines.append(
                {"data": data.name, "recipe": recipe, "contender": stage, "status": "ok", "note": note, **rate}
            )
    for what, found in others.items():
        lines.append({"data": data.name, "recipe": "", "contender": what, "status": "ok", "note": found["text"]})
    with files[0].open("w", newline="") as file:
        writer = csv.DictWriter(file, list[str](COLUMNS))
        writer.writeheader()
        writer.writerows({**row, **columns} for row in lines)
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps({"machine": about, "rows": rows, "stages": stages, **others}, indent=1) + "\n")
        files.append(json_file)
    return files
