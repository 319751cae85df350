"""Report of `mvlm bench data`: tables on the console, CSV and JSON."""

from pathlib import Path
from typing import Any

from mvlm_benchmarks.results import MACHINE_COLUMNS, device_name, file_stem, write_csv
from mvlm_dataloading.files import write_json

Row = dict[str, Any]
COLUMNS = (
    "data", "recipe", "contender", "status", "note", "images_per_s", "images_per_s_best", "images_per_s_worst",
    "ours_over", "ours_over_low", "ours_over_high", "cpu_ms", "ours_over_cpu", "rounds", "batches", "batch", "size",
    "threads",
    *MACHINE_COLUMNS,
)  # fmt: skip


def table(rows: list[Row], recipe: str) -> str:
    """The table of one recipe's contenders, with a legend."""
    names = f"{'images/s':>9} {'best':>8} {'worst':>8}"
    lines = [f"{recipe:24} {names} {'ours over (95 %)':>21} {'CPU ms':>8} {'CPU over':>9}"]
    for row in rows:
        if row["recipe"] != recipe:
            continue
        if row["status"] != "ok":
            lines.append(f"{row['contender']:24} {row['status']}: {row['note']}")
            continue
        rates = (row["images_per_s"], row["images_per_s_best"], row["images_per_s_worst"])
        over = over_cpu = ""
        if "ours_over" in row:
            over = f"{row['ours_over']:.2f}x ({row['ours_over_low']:.2f} to {row['ours_over_high']:.2f})"
            over_cpu = f"{row['ours_over_cpu']:.2f}x"
        line = f"{row['contender']:24} {rates[0]:9.0f} {rates[1]:8.0f} {rates[2]:8.0f} {over:>21}"
        lines.append(f"{line} {row['cpu_ms']:8.2f} {over_cpu:>9}")
    lines.append("ours over: our images/s over this contender's; CPU over: this contender's CPU ms over ours.")
    return "\n".join([*lines, "Above 1, ours is faster."])


def stage_table(stages: dict[str, dict[str, float | None]]) -> str:
    """The table of our loader's stages, with the most expensive stage as the bottleneck."""
    explanation = "rate up to and including the stage; processor time that it adds per image"
    lines = [f"{'stage':10} {'images/s':>9} {'adds us':>8}   {explanation}"]
    known = {name: added for name, stage in stages.items() if (added := stage["adds_us"]) is not None}
    for name, stage in stages.items():
        lines.append(
            f"{name:10} {stage['images_per_s']:9.0f} {f'{known[name]:.0f}' if name in known else 'unknown':>8}"
        )
    worst = f"bottleneck: {max(known, key=known.__getitem__)}" if known else "bottleneck: unknown"
    return "\n".join([*lines, worst, ""])


def write(
    rows: list[Row],
    stages: dict[str, dict[str, dict[str, float | None]]],
    others: dict[str, dict[str, Any]],
    about: dict[str, Any],
    out: Path,
    data: Path,
    json_file: Path | None,
) -> list[Path]:
    """Write the CSV to `out` and the JSON to `json_file`. Returns the files.

    Args:
        stages: recipe -> stage -> figures.
        others: further measurements by name: step, start, memory. The CSV contains only the `text` of each.
    """
    files = [out / f"{file_stem('data', data.name, device_name(about))}.csv"]
    lines = list(rows)
    for recipe, by_stage in stages.items():
        for stage, figures in by_stage.items():
            added = "an unknown time" if figures["adds_us"] is None else f"{figures['adds_us']} us"
            note = f"stage, adds {added} of processor time per image"
            line = {"data": data.name, "recipe": recipe, "contender": stage, "status": "ok", "note": note}
            lines.append(line | {"images_per_s": figures["images_per_s"]})
    for name, result in others.items():
        lines.append({"data": data.name, "recipe": "", "contender": name, "status": "ok", "note": result["text"]})
    write_csv(lines, about, files[0], COLUMNS)
    if json_file is not None:
        write_json(json_file, {"machine": about, "rows": rows, "stages": stages, **others})
        files.append(json_file)
    return files
