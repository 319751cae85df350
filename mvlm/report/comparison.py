"""Several runs side by side: one HTML file with their curves in the same charts, readable offline."""

import json
from pathlib import Path
from statistics import fmean, median
from typing import Any

from markupsafe import Markup

from mvlm.config.json_files import read_config
from mvlm.errors import RunError
from mvlm.evaluation.evaluate import figures_of
from mvlm.report.figures import EVALUATION_CURVES, RECALLS, RUN_CURVES
from mvlm.report.html import line_chart, series, table, write_page
from mvlm.runs.folder import RunFolder, check_run_folder, read_metrics

LAST_ROWS = 20  # the final losses are means over this many rows
MOST_RUNS = 6  # style.css has six colours
CURVES = {
    "loss": "loss",
    **RUN_CURVES,
    "grad_norm": "gradient norm before clipping",
    "temperature": "ITC temperature",
    "pairs_per_s": "pairs/s",
    **EVALUATION_CURVES,
}

ALIKE = {
    "data": ("fingerprint", "n_images"),  # those of an earlier version have no fingerprint
    "number of re-ranked candidates": ("reranked",),
}
"""Conditions that must be equal for two evaluations of a split to be comparable: name -> keys of the figures."""


def write_comparison(runs: list[Path], out: Path | None = None) -> Path:
    """Write the comparison of two to six run folders, from their metrics and evaluations. Returns the file.

    Args:
        out: File to write. Default: `compare.html` in the first run folder.

    Raises:
        RunError: too few or too many runs, the same run twice, or a folder without metrics.
    """
    if not 2 <= len(runs) <= MOST_RUNS:
        raise RunError(f"report: wanted 2 to {MOST_RUNS} runs to compare, got {len(runs)}")
    folders = dict(zip(run_labels(runs), map(RunFolder, runs), strict=True))
    metrics = {name: metrics_of(folder) for name, folder in folders.items()}
    configs = {name: flat_settings(read_config(folder.config)) for name, folder in folders.items()}
    evaluated, notes = evaluations(folders)
    first = RunFolder(runs[0])
    return write_page(
        out or first.comparison,
        "comparison.html",
        within=first.path if out is None else None,
        title=" · ".join(folders),
        last_rows=LAST_ROWS,
        final_metrics=final_metrics(metrics),
        evaluations=evaluated,
        evaluation_notes=notes,
        differences=differences(configs),
        charts=charts(metrics),
    )


def run_labels(runs: list[Path]) -> list[str]:
    """Names of the run folders; their paths if two names are equal. RunError for a run that is given twice."""
    if len({run.resolve() for run in runs}) < len(runs):
        raise RunError(f"report: wanted different runs, got one twice among {', '.join(map(str, runs))}")
    names = [run.resolve().name for run in runs]
    return names if len(set(names)) == len(names) else [str(run) for run in runs]


def metrics_of(folder: RunFolder) -> list[dict[str, Any]]:
    """The rows of a run's metrics. RunError if there is none."""
    check_run_folder(folder.path)
    rows = read_metrics(folder.metrics) if folder.metrics.exists() else []
    if not rows:
        raise RunError(f"{folder.metrics}: wanted the metrics of a run, found none; check the path")
    return rows


def flat_settings(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration as one level of names; those of the model begin with `model.`."""
    model = {f"model.{name}": value for name, value in config.get("model", {}).items()}
    return {name: value for name, value in config.items() if name != "model"} | model


def values_of(rows: list[dict[str, Any]], name: str) -> list[float]:
    return [row[name] for row in rows if row.get(name) is not None]


def final_metrics(metrics: dict[str, list[dict[str, Any]]]) -> Markup:
    """A table with a row for each run: its length, last losses and speed."""
    known = {name for rows in metrics.values() for row in rows for name in row}
    names = ("loss", *(name for name in RUN_CURVES if name in known), "grad_norm", "memory_mb")
    cells = []
    for run, rows in metrics.items():
        last = [values_of(rows, name)[-LAST_ROWS:] for name in names]
        speed = values_of(rows, "pairs_per_s")
        counts = [str(rows[-1].get(name, "")) for name in ("step", "skipped", "bad_steps")]
        means = [f"{fmean(values):.4g}" if values else "" for values in last]
        cells.append([run, *counts, *means, f"{median(speed):.3g}" if speed else ""])
    return table(["run", "steps", "undecodable images", "skipped updates", *names, "pairs/s"], cells)


def evaluations(folders: dict[str, RunFolder]) -> tuple[Markup | None, list[str]]:
    """HTML table of the runs' retrieval and cross-modal gain, None if no run has been evaluated; and notes.

    A note says that evaluations of a split differ in their data or in the number of re-ranked candidates.
    """
    cells, splits = [], {}
    for name, folder in folders.items():
        if not folder.evaluation.exists():
            continue
        with figures_of(folder.evaluation) as figures:
            if "task" in figures and "tr" not in figures:  # `mvlm report RUN` has a page for the task's figures
                continue
            recalls = [f"{figures[way][k]:.1f}" for way in ("tr", "ir") for k in ("r1", "r5", "r10")]
            gains = [f"{figures[gain]:.4g}" for gain in ("gain_text_nats", "gain_pixels_pct")]
            ranked_by = "ITC" if figures.get("reranked") == 0 else "ITC + ITM"
            counts = [str(figures.get(count, "")) for count in ("n_images", "reranked")]
            checkpoint = Path(figures.get("checkpoint", "")).name
            cells.append([name, checkpoint, figures["split"], counts[0], ranked_by, counts[1], *recalls, *gains])
            splits.setdefault(figures["split"], []).append(figures)
    if not cells:
        return None, []
    header = ["run", "checkpoint", "split", "images", "ranked by", "re-ranked", *RECALLS]
    found = table([*header, "gain, text, nats", "gain, pixels, %"], cells)
    notes = []
    for split, rows in splits.items():
        given = {what: [{str(row[key]) for row in rows if key in row} for key in keys] for what, keys in ALIKE.items()}
        if differing := [what for what, values in given.items() if any(len(each) > 1 for each in values)]:
            notes.append(
                f"Rows of the split {split} differ in more than the model: in their {' and '.join(differing)}."
            )
    return found, notes


def differences(configs: dict[str, dict[str, Any]]) -> Markup | None:
    """A table of the settings that are not the same in all runs; None if all are."""
    names = sorted({name for config in configs.values() for name in config})
    rows = []
    for name in names:
        values = [json.dumps(config.get(name)) for config in configs.values()]
        if len(set(values)) > 1:
            rows.append([name, *values])
    return table(["setting", *configs], rows) if rows else None


def charts(metrics: dict[str, list[dict[str, Any]]]) -> list[Markup]:
    """A chart for each metric that at least one run has, with a line for each run."""
    found = []
    for name, title in CURVES.items():
        # A run without the metric keeps an empty line, so that a run has the same colour in all charts.
        lines = {run: series(rows, name, max(1, len(values_of(rows, name)) // 60)) for run, rows in metrics.items()}
        if any(xs for xs, _ in lines.values()):
            found.append(line_chart(title, lines))
    return found
