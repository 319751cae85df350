"""What the step benchmark shows and writes: tables, JSON, CSV, a plot."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from mvlm.parts import PARTS
from mvlm_benchmarks import report
from mvlm_benchmarks.contenders import BASELINES, COMPILED, eager_name
from mvlm_kernels.hardware import Gpu

Row = dict[str, Any]
Counts = dict[str, tuple[dict[str, float], float]]
"""Contender -> forward GFLOP a pair by part, backward GFLOP a pair."""
COLUMNS = (
    "contender", "pairs_per_s", "pairs_per_s_p20", "pairs_per_s_p80", "cpu_s", "peak_mb", "loss", "vs_eager",
    "vs_compiled", "peak_vs_eager", "mfu_pct", "mfu_baseline_pct", "largest_batch", "note",
)  # fmt: skip
BASELINE = next(iter(BASELINES))
"""Both baselines are the same products; this one is counted."""


def heading(about: dict[str, Any], setup: Row) -> str:
    """The machine and what was measured on it."""
    return "\n".join(
        [
            report.heading(about).splitlines()[0],
            f"{setup['preset']}, batch {setup['batch']}, {setup['caption_tokens']} tokens (the longest caption "
            f"{setup['longest']}), {setup['precision']}, {setup['threads']} threads, "
            f"{'with AdamW' if setup['optimizer'] else 'forward and backward only'}, {setup['rounds']} rounds",
        ]
    )


def compare(rows: list[Row], counts: Counts, batch: int, gpu: Gpu | None) -> None:
    """Make figures of each row's seconds a round, and ratios to the fastest eager and the fastest compiled baseline.

    A ratio of times is the median of the rounds' own; above 1 is faster. Memory's is ours over theirs; below 1 is less.
    """
    timed = [row for row in rows if "seconds" in row]
    eager = _fastest([row for row in timed if row["contender"] in BASELINES])
    compiled = _fastest(
        [row for row in timed if row["contender"] in COMPILED and eager_name(row["contender"]) in BASELINES]
    )  # ours may be compiled as well, and is not what ours is held against
    for row in timed:
        seconds = np.array(row["seconds"])
        row["pairs_per_s_p20"], row["pairs_per_s"], row["pairs_per_s_p80"] = (
            float(x) for x in np.percentile(batch / seconds, [20, 50, 80])
        )
        row["cpu_s"] = float(np.median(row["cpu_seconds"]))
        row["vs_eager"], row["vs_compiled"] = (
            None if other is None else float(np.median(np.array(other["seconds"]) / seconds))
            for other in (eager, compiled)
        )
        row["peak_vs_eager"] = None if eager is None else row["peak_mb"] / eager["peak_mb"]
        if gpu is not None:
            own = counts.get(eager_name(row["contender"]), counts[BASELINE])
            for name, found in (("mfu_pct", own), ("mfu_baseline_pct", counts[BASELINE])):
                row[name] = 100 * 1e9 * total(found) * row["pairs_per_s"] / gpu.flops


def _fastest(rows: list[Row]) -> Row | None:
    return min(rows, key=lambda row: float(np.median(row["seconds"])), default=None)


def total(count: tuple[dict[str, float], float]) -> float:
    """Forward and backward."""
    return sum(count[0].values()) + count[1]


def parts_table(counts: Counts) -> str:
    """GFLOP a pair: forward by part, then the sums and their ratio to the baseline's."""
    names = [part for part in (*PARTS, "other") if any(parts.get(part, 0) >= 5e-4 for parts, _ in counts.values())]
    lines = [f"{'GFLOP a pair':16}" + "".join(f"{name:>16}" for name in counts)]
    lines += [f"{name:16}" + "".join(f"{parts.get(name, 0.0):16.3f}" for parts, _ in counts.values()) for name in names]
    lines.append(f"{'forward':16}" + "".join(f"{sum(parts.values()):16.3f}" for parts, _ in counts.values()))
    lines.append(f"{'and backward':16}" + "".join(f"{total(found):16.3f}" for found in counts.values()))
    lines.append(
        f"{'over baseline':16}"
        + "".join(f"{total(found) / total(counts[BASELINE]):16.3f}" for found in counts.values())
    )
    return "\n".join(["", *lines])


def table(rows: list[Row]) -> str:
    """A line for each contender, then a line for each that has no figures."""
    columns = [
        ("pairs/s", "pairs_per_s", 10), ("p20", "pairs_per_s_p20", 9), ("p80", "pairs_per_s_p80", 9),
        ("CPU s", "cpu_s", 8), ("x eager", "vs_eager", 8), ("x compiled", "vs_compiled", 11), ("peak MB", "peak_mb", 9),
        ("x eager", "peak_vs_eager", 8), ("loss", "loss", 9),
    ]  # fmt: skip
    gpu_only = [("MFU %", "mfu_pct", 7), ("baseline's %", "mfu_baseline_pct", 13), ("batch", "largest_batch", 7)]
    columns += [column for column in gpu_only if any(row.get(column[1]) is not None for row in rows)]
    lines = ["", f"{'contender':28}" + "".join(f"{title:>{width}}" for title, _, width in columns)]
    for row in rows:
        if "seconds" in row:
            lines.append(f"{row['contender']:28}" + "".join(_cell(row.get(key), width) for _, key, width in columns))
    lines += [f"{row['contender']}: {row['note']}" for row in rows if row["note"]]
    return "\n".join(lines)


def _cell(value: float | None, width: int) -> str:
    if value is None:
        return f"{'-':>{width}}"
    return f"{value:>{width}.{3 if value < 10 else 1 if value < 1000 else 0}f}"


def as_json(rows: list[Row], about: dict[str, Any], setup: Row, counts: Counts) -> dict[str, Any]:
    """The contract of `mvlm bench step --json`: rows without a figure are under `not_timed`."""
    names = {BASELINE: "baseline"}
    return {
        "machine": about,
        "setup": setup,
        "gflop_per_pair": {names.get(name, name): total(found) for name, found in counts.items()},
        "gflop_by_part": {
            names.get(name, name): {**found[0], "backward": found[1]} for name, found in counts.items()
        },
        "rows": [{key: row.get(key) for key in COLUMNS} for row in rows if "seconds" in row],
        "not_timed": [{key: row[key] for key in ("contender", "note")} for row in rows if "seconds" not in row],
    }  # fmt: skip


def write(result: dict[str, Any], json_file: Path | None, csv_file: Path | None, plot_file: Path | None) -> None:
    """Write the files asked for and print their names."""
    files = [path for path in (json_file, csv_file, plot_file) if path is not None]
    for path in files:
        path.parent.mkdir(parents=True, exist_ok=True)
    if json_file is not None:
        json_file.write_text(json.dumps(result, indent=1) + "\n")
    if csv_file is not None:
        report.write_csv(result["rows"], result["machine"], csv_file, COLUMNS)
    if plot_file is not None:
        plot(result, plot_file)
    for path in files:
        print(path)


def plot(result: dict[str, Any], path: Path) -> None:
    """Pairs a second and the peak of activation memory, a bar for each contender."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    rows = result["rows"]
    figure = Figure(figsize=(11, 0.45 * len(rows) + 1.8), layout="constrained")
    figure.suptitle(heading(result["machine"], result["setup"]), fontsize=8)
    panels = (
        ("pairs_per_s", "pairs a second (more is better)"),
        ("peak_mb", "peak of activations, MB (less is better)"),
    )
    for axes, (key, title) in zip(figure.subplots(1, 2, sharey=True), panels, strict=True):
        colors = ["#999999" if eager_name(row["contender"]) in BASELINES else "#4477aa" for row in rows]
        bars = axes.barh(range(len(rows)), [row[key] for row in rows], color=colors)
        axes.bar_label(bars, fmt="{:.4g}", fontsize=7, padding=2)
        axes.set_title(title, fontsize=8)
        axes.set_yticks(range(len(rows)), [row["contender"] for row in rows], fontsize=8)
        axes.margins(x=0.15)
    figure.axes[0].invert_yaxis()
    # Text as text and no date or random ids: small files whose differences are differences of figures.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "mvlm"}):
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
