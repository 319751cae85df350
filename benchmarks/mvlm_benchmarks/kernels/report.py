"""What a benchmark shows and writes: a table on the console, a CSV, a plot, JSON."""

import csv
import json
import re
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from mvlm_benchmarks.kernels.measure import PASSES

Row = dict[str, Any]
MACHINE_COLUMNS = (
    "figures", "device", "driver", "cuda", "torch", "triton", "python", "commit", "dirty", "base_commit", "date",
    "versions",
)  # fmt: skip
COLUMNS = (
    "op", "pass", "shape", "dtype", "contender", "status", "note", "us", "us_p20", "us_p80", "graph_us", "gb_per_s",
    "roofline_pct", "peak_mb", "vs_ours", "base", "vs_base", "bytes_minimum", *MACHINE_COLUMNS,
)  # fmt: skip
JSON_KEYS = (
    "op", "pass", "shape", "dtype", "contender", "us", "us_p20", "us_p80", "graph_us", "gb_per_s", "roofline_pct",
    "peak_mb", "vs_ours", "base", "vs_base",
)  # fmt: skip

# A contender of these has nothing to say at any case of an op.
ABSENT = ("missing", "not applicable")


def heading(about: dict[str, Any]) -> str:
    """The machine, and on a CPU what the figures are not."""
    commit = about["commit"] + (" with changes" if about["dirty"] is True else "")
    parts = [
        about["device"], about["driver"] and f"driver {about['driver']}", f"torch {about['torch']}",
        about["triton"] and f"triton {about['triton']}", commit and f"commit {commit}", about["date"],
    ]  # fmt: skip
    lines = [", ".join(part for part in parts if part)]
    if about["figures"].startswith("CPU"):
        lines.append(
            "These are CPU figures of the torch references; no Triton kernel runs, and they say nothing of one."
        )
    return "\n".join(lines)


def table(rows: list[Row]) -> str:
    """The rows of one case: a line for each contender, with a line for each reason why a figure is not there."""
    first = rows[0]
    group = f"{'us':>9} {'x ours':>7} {'GB/s':>7} {'roof %':>6}"
    lines = ["", f"{first['op']}  {first['shape']}  {first['dtype']}"]
    lines.append(f"{'':16}" + "".join(f"  {name:^{len(group)}}" for name in PASSES) + f"  {'peak':>8}")
    lines.append(f"{'contender':16}" + f"  {group}" * len(PASSES) + f"  {'MB':>8}")
    reasons, absent = [], []
    for contender, found in groupby(rows, key=lambda row: row["contender"]):
        by_pass = {row["pass"]: row for row in found}
        if all(row["status"] in ABSENT for row in by_pass.values()):
            absent.append(contender)
            continue
        reasons += _reasons(contender, by_pass)
        if any(row["us"] is not None for row in by_pass.values()):
            cells = "".join(f"  {_cells(by_pass.get(name))}" for name in PASSES)
            peak = by_pass.get("both", by_pass["forward"])["peak_mb"]
            lines.append(f"{contender:16}{cells}  {_number(peak, 8)}")
    if absent:
        reasons.append(f"  not here, reasons at the end: {', '.join(absent)}")
    return "\n".join(lines + reasons)


def _cells(row: Row | None) -> str:
    row = row or {}
    return " ".join(
        _number(row.get(key), width) for key, width in (("us", 9), ("vs_ours", 7), ("gb_per_s", 7), ("roofline_pct", 6))
    )


def _number(value: float | None, width: int) -> str:
    return f"{'-':>{width}}" if value is None else f"{value:>{width}.{2 if value < 100 else 0}f}"


def _reasons(contender: str, by_pass: dict[str, Row]) -> list[str]:
    """A line where all passes share a reason, else one for each that has one."""
    said = {
        name: f"{row['status']}: {row['note']}" for name, row in by_pass.items() if row["note"] or row["us"] is None
    }
    if len(said) == len(by_pass) and len(set(said.values())) == 1:
        return [f"  {contender} {next(iter(said.values()))}"]
    return [f"  {contender} {name} {what}" for name, what in said.items()]


def closing(rows: list[Row], about: dict[str, Any]) -> str:
    """Every reason why a contender has no figure, once, and on a CPU the reminder again."""
    reasons: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        if row["us"] is None:
            cases = reasons.setdefault((row["status"], row["contender"], row["note"]), [])
            cases.append(f"{row['op']} {row['shape']} {row['pass']}")
    lines = [""]
    for (status, contender, note), cases in sorted(reasons.items()):
        # A peer that is not here at all needs no list of what it was not timed at.
        at = "" if status in ABSENT else f" ({cases[0]}{f' and {len(cases) - 1} more' if cases[1:] else ''})"
        lines.append(f"{status}: {contender}: {note}{at}")
    if about["figures"].startswith("CPU"):
        lines.append("CPU figures of the torch references: no Triton kernel ran.")
    return "\n".join(lines)


def write(rows: list[Row], about: dict[str, Any], out: Path, json_file: Path | None = None) -> list[Path]:
    """Write the CSV and the plot into out, and json_file where given; the files are named after device and dtype."""
    out.mkdir(parents=True, exist_ok=True)
    device = about["device"].split(",")[0]
    name = re.sub(r"[^a-z0-9]+", "-", f"kernels {device} {rows[0]['dtype']}".lower()).strip("-")
    files = [out / f"{name}.csv", out / f"{name}.svg"]
    write_csv(rows, about, files[0])
    plot(rows, about, files[1])
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        timed = [{key: row[key] for key in JSON_KEYS} for row in rows if row["us"] is not None]
        others = [{key: row[key] for key in COLUMNS[:7]} for row in rows if row["us"] is None]
        json_file.write_text(json.dumps({"machine": about, "rows": timed, "not_timed": others}, indent=1) + "\n")
        files.append(json_file)
    return files


def write_csv(rows: list[Row], about: dict[str, Any], path: Path, columns: Sequence[str] = COLUMNS) -> None:
    """A line for each row, the machine's columns repeated in each, so that files can be put together."""
    machine = {key: about[key] for key in MACHINE_COLUMNS}
    machine["versions"] = "; ".join(f"{name} {found}" for name, found in about["versions"].items() if found)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys([*columns, *MACHINE_COLUMNS])))
        writer.writeheader()
        writer.writerows({**row, **machine} for row in rows)


def plot(rows: list[Row], about: dict[str, Any], path: Path) -> None:
    """A panel for each case: bars of time over ours, grouped by contender, one bar a pass; to the right is slower."""
    # Not pyplot: a figure of its own needs no display and leaves no global state.
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    timed = [row for row in rows if row["vs_ours"] is not None]
    panels = [list(found) for _, found in groupby(timed, key=lambda row: (row["op"], row["shape"]))]
    columns = min(2, max(1, len(panels)))
    lines = [panels[i : i + columns] for i in range(0, len(panels), columns)]
    heights = [max(len({row["contender"] for row in panel}) for panel in line) + 1.5 for line in lines]
    figure = Figure(figsize=(7.5 * columns, 0.42 * sum(heights) + 1.2), layout="constrained")
    figure.suptitle(f"Time over ours ({about['figures']})\n{heading(about).splitlines()[0]}", fontsize=9)
    # One scale for all panels, with room beside the longest bars for their labels.
    ratios = [row["vs_ours"] for row in timed] or [1.0]
    limits = min(0.8, *ratios) / 2, max(1.5, *ratios) * 2
    if panels:
        grid = figure.add_gridspec(len(lines), columns, height_ratios=heights)
        for number, panel in enumerate(panels):
            _draw(figure.add_subplot(grid[number // columns, number % columns]), panel, limits)
        figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    # Text as text and no date or random ids: small files whose differences are differences of figures.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "mvlm"}):
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def _draw(axes: Any, panel: list[Row], limits: tuple[float, float]) -> None:
    contenders = list(dict.fromkeys(row["contender"] for row in panel))
    for place, (name, color) in enumerate(zip(PASSES, ("#4477aa", "#cc6677", "#999999"), strict=True)):
        rows = [row for row in panel if row["pass"] == name]
        where = [contenders.index(row["contender"]) + 0.27 * (place - 1) for row in rows]
        # From 1 outwards on a logarithmic axis: twice as slow and twice as fast are bars of one length.
        bars = axes.barh(where, [row["vs_ours"] - 1 for row in rows], 0.25, left=1, color=color, label=name)
        axes.bar_label(bars, [f"{row['vs_ours']:.2f}x  {row['us']:.0f} us" for row in rows], fontsize=6, padding=2)
    axes.set_xscale("log", base=2)
    axes.set_xlim(*limits)
    axes.xaxis.set_major_formatter(lambda ratio, _: f"{ratio:g}x")
    axes.tick_params(axis="x", labelsize=7)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(range(len(contenders)), contenders, fontsize=8)
    axes.set_ylim(len(contenders) - 0.4, -0.6)
    axes.set_title(f"{panel[0]['op']}  {panel[0]['shape']}  {panel[0]['dtype']}", fontsize=8)
