"""Several runs side by side: one HTML file with their curves in the same charts, readable offline."""

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from statistics import fmean, median
from typing import Any

from mvlm.config.json_files import read_config
from mvlm.errors import RunError
from mvlm.files import check_folder
from mvlm.report.charts import line_chart, smooth
from mvlm.report.page import STYLE, figures_of, table
from mvlm.runs.folder import RunFolder, read_metrics

LAST = 20  # lines that the figures at the end are means over
MOST = 6  # runs; there are as many colours
CURVES = {
    "loss": "loss",
    "mlm": "MLM, nats a masked token",
    "mim": "MIM, L1 of masked pixels",
    "itc": "ITC, nats",
    "itm": "ITM, nats",
    "grad_norm": "gradient norm before clipping",
    "temperature": "ITC temperature",
    "pairs_per_s": "pairs/s",
    "tr_r1": "validation image to text R@1 by ITC, %",
    "ir_r1": "validation text to image R@1 by ITC, %",
    "gain_text_nats": "validation gain, text, nats a token",
    "gain_pixels_pct": "validation gain, pixels, %",
}


def write_comparison(runs: list[Path], out: Path) -> Path:
    """Write the comparison of two to six run folders, from their metrics alone; returns the file, or RunError."""
    if not 2 <= len(runs) <= MOST:
        raise RunError(f"report: wanted 2 to {MOST} runs to compare, got {len(runs)}")
    names = labels(runs)
    metrics = {name: rows_of(run) for name, run in zip(names, runs, strict=True)}
    configs = {name: flat(read_config(RunFolder(run).config)) for name, run in zip(names, runs, strict=True)}
    parts = [
        f"<h1>{escape(' · '.join(names))}</h1>",
        f"<section><h2>At the end</h2>{ends(metrics)}<p class='note'>Losses: means over the last {LAST} lines; "
        f"pairs/s: the median of all.</p></section>",
        evaluations(dict(zip(names, runs, strict=True))),
        f"<section><h2>What differs</h2>{differences(configs)}</section>",
        f"<section><h2>Training</h2><div class='charts'>{''.join(charts(metrics))}</div></section>",
    ]
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(" · ".join(names))} · mvlm</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>'
        f"<body><main>{''.join(parts)}</main></body></html>"
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page)
    return out


def labels(runs: list[Path]) -> list[str]:
    """The folders' names, or their paths where two names are equal; RunError for a run that is named twice."""
    if len({run.resolve() for run in runs}) < len(runs):
        raise RunError(f"report: wanted different runs, got one twice among {', '.join(map(str, runs))}")
    names = [run.resolve().name for run in runs]
    return names if len(set(names)) == len(names) else [str(run) for run in runs]


def rows_of(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics, at least one."""
    check_folder(run, "a run folder")
    file = RunFolder(run).metrics
    rows = read_metrics(file) if file.is_file() else []
    if not rows:
        raise RunError(f"{file}: wanted the metrics of a run, found none; check the path")
    return rows


def flat(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration as one level of names."""
    model = {f"model.{name}": value for name, value in config.get("model", {}).items()}
    return {name: value for name, value in config.items() if name != "model"} | model


def number(value: float | None, digits: int = 4) -> str:
    return "" if value is None else f"{value:.{digits}g}"


def values_of(rows: list[dict[str, Any]], name: str) -> list[float]:
    return [row[name] for row in rows if row.get(name) is not None]


def ends(metrics: dict[str, list[dict[str, Any]]]) -> str:
    """A row for each run: how far it came, its last losses, its speed."""
    names = ("loss", "mlm", "mim", "itc", "itm", "grad_norm", "memory_mb")
    cells = []
    for run, rows in metrics.items():
        last = [values_of(rows, name)[-LAST:] for name in names]
        speed = values_of(rows, "pairs_per_s")
        counts = [str(rows[-1].get(name, "")) for name in ("step", "skipped", "bad_steps")]
        means = [number(fmean(values)) if values else "" for values in last]
        cells.append([run, *counts, *means, number(median(speed), 3) if speed else ""])
    return table(["run", "steps", "skipped", "bad steps", *names, "pairs/s"], cells)


def evaluations(runs: dict[str, Path]) -> str:
    """Retrieval and cross-modal gain of the runs that have been evaluated."""
    cells = []
    for name, run in runs.items():
        file = RunFolder(run).evaluation
        if not file.is_file():
            continue
        with figures_of(file) as figures:
            found = [f"{figures[way][k]:.1f}" for way in ("tr", "ir") for k in ("r1", "r5", "r10")]
            gains = [number(figures[name]) for name in ("gain_text_nats", "gain_pixels_pct")]
            cells.append([name, figures["split"], *found, *gains])
    if not cells:
        return ""
    ranks = [f"{way} R@{k}" for way in ("image to text", "text to image") for k in (1, 5, 10)]
    head = ["run", "split", *ranks, "gain, text, nats", "gain, pixels, %"]
    return f"<section><h2>Evaluation, re-ranked</h2>{table(head, cells)}</section>"


def differences(configs: dict[str, dict[str, Any]]) -> str:
    """The settings that are not the same in all runs."""
    names = sorted({name for config in configs.values() for name in config})
    rows = []
    for name in names:
        values = [json.dumps(config.get(name)) for config in configs.values()]
        if len(set(values)) > 1:
            rows.append([name, *values])
    return table(["setting", *configs], rows) if rows else "<p>No setting.</p>"


def charts(metrics: dict[str, list[dict[str, Any]]]) -> list[str]:
    """A chart for each figure that at least one run has, with a line for each run that has it."""
    found = []
    for name, title in CURVES.items():
        # A run without the figure keeps its place, so that a run has one colour in all charts.
        series: dict[str, tuple[Sequence[float], Sequence[float]]] = {}
        for run, rows in metrics.items():
            kept = [row for row in rows if row.get(name) is not None]
            series[run] = ([row["step"] for row in kept], smooth([row[name] for row in kept], max(1, len(kept) // 60)))
        if any(xs for xs, _ in series.values()):
            found.append(line_chart(title, series))
    return found
