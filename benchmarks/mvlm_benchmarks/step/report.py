"""Report of `mvlm bench step`: tables on the console, JSON, CSV and plot."""

from pathlib import Path
from typing import Any

import numpy as np

from mvlm_benchmarks import results
from mvlm_benchmarks.intervals import NO_DIFFERENCE, ONE_CALL, ratio
from mvlm_benchmarks.step.contenders import BASELINES, COMPILED, eager_name
from mvlm_dataloading.files import write_json
from mvlm_kernels.hardware import Gpu

Row = dict[str, Any]
COLUMNS = (
    "contender", "pairs_per_s", "pairs_per_s_p20", "pairs_per_s_p80", "cpu_s", "peak_mb", "loss", "vs_eager",
    "vs_eager_low", "vs_eager_high", "verdict", "vs_compiled", "peak_vs_eager", "mfu_pct", "mfu_baseline_pct",
    "note",
)  # fmt: skip
BASELINE = next(iter(BASELINES))
"""The baseline whose FLOPs are counted. Both baselines have the same matrix products."""


def heading(about: dict[str, Any], setup: Row) -> str:
    """Two lines: the machine, and the settings of the measurement."""
    return "\n".join(
        [
            results.heading(about).splitlines()[-1],
            f"{setup['preset']}, batch {setup['batch']}, {setup['caption_tokens']} tokens (the longest caption "
            f"{setup['longest']}), {setup['precision']}, {setup['threads']} threads, "
            f"{'with AdamW' if setup['optimizer'] else 'forward and backward only'}, {setup['rounds']} rounds",
        ]
    )


def add_figures(rows: list[Row], gflop: dict[str, float], batch: int, gpu: Gpu | None) -> None:
    """Add rates and ratios to the rows of results, computed from their seconds per round.

    `vs_eager` and `vs_compiled` are speeds relative to the fastest eager and the fastest compiled baseline: medians of
    the ratios within each round, above 1 is faster. `vs_eager` has a 95 % interval and a verdict. `peak_vs_eager` is
    peak memory relative to the fastest eager baseline; below 1 is less.

    Args:
        gflop: contender -> GFLOP per pair.
        batch: pairs per step.
        gpu: peak rates, for the MFU; None on a CPU.
    """
    timed = [row for row in rows if "seconds" in row]
    eager = _fastest([row for row in timed if row["contender"] in BASELINES])
    compiled = _fastest(
        [row for row in timed if row["contender"] in COMPILED and eager_name(row["contender"]) in BASELINES]
    )  # baselines only: our own contenders may be compiled too
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
        if eager is not None:
            # Of the times: an eager baseline that is slower makes this one faster.
            found = ratio([[x] for x in eager["seconds"]], [[x] for x in row["seconds"]])
            row["vs_eager_low"], row["vs_eager_high"] = found.low, found.high
            row["verdict"] = "" if row is eager else found.speed_verdict
        row["peak_vs_eager"] = None if eager is None else row["peak_mb"] / eager["peak_mb"]
        if gpu is not None:
            own = gflop.get(eager_name(row["contender"]), gflop[BASELINE])
            for name, count in (("mfu_pct", own), ("mfu_baseline_pct", gflop[BASELINE])):
                row[name] = 100 * 1e9 * count * row["pairs_per_s"] / gpu.flops


def _fastest(rows: list[Row]) -> Row | None:
    return min(rows, key=lambda row: float(np.median(row["seconds"])), default=None)


def flops_table(gflop: dict[str, float]) -> str:
    """GFLOP per pair, forward and backward, of each contender, and its ratio to the baseline's."""
    counts = [f"{name} {count:.1f} ({count / gflop[BASELINE]:.2f})" for name, count in gflop.items()]
    return f"\nGFLOP per pair (over the baseline's): {', '.join(counts)}"


def table(rows: list[Row]) -> str:
    """Table with one line per contender, followed by notes."""
    columns = [
        ("pairs/s", "pairs_per_s", 10), ("p20", "pairs_per_s_p20", 9), ("p80", "pairs_per_s_p80", 9),
        ("CPU s", "cpu_s", 8), ("x eager", "vs_eager", 8), ("x compiled", "vs_compiled", 11), ("peak MB", "peak_mb", 9),
        ("x eager", "peak_vs_eager", 8), ("loss", "loss", 9),
    ]  # fmt: skip
    gpu_only = [("MFU %", "mfu_pct", 7), ("baseline's %", "mfu_baseline_pct", 13)]
    columns += [column for column in gpu_only if any(row.get(column[1]) is not None for row in rows)]
    lines = ["", f"{'contender':28}" + "".join(f"{title:>{width}}" for title, _, width in columns)]
    for row in rows:
        if "seconds" in row:
            lines.append(f"{row['contender']:28}" + "".join(_cell(row.get(key), width) for _, key, width in columns))
    if any(row.get("verdict") == ONE_CALL for row in rows):
        lines.append("One round says nothing about differences; give --rounds 3 or more")
    lines += [
        f"{row['contender']}: no difference from the fastest eager baseline; 95 % interval "
        f"{row['vs_eager_low']:.3f} to {row['vs_eager_high']:.3f}"
        for row in rows
        if row.get("verdict") == NO_DIFFERENCE
    ]
    lines += [f"{row['contender']}: {row['note']}" for row in rows if row["note"]]
    return "\n".join(lines)


def _cell(value: float | None, width: int) -> str:
    if value is None:
        return f"{'-':>{width}}"
    return f"{value:>{width}.{3 if value < 10 else 1 if value < 1000 else 0}f}"


def as_json(rows: list[Row], about: dict[str, Any], setup: Row, gflop: dict[str, float]) -> dict[str, Any]:
    """Content of the JSON file. Contenders without figures are in `not_timed`, each with the reason."""
    names = {BASELINE: "baseline"}
    return {
        "machine": about,
        "setup": setup,
        "gflop_per_pair": {names.get(name, name): count for name, count in gflop.items()},
        "rows": [{key: row.get(key) for key in COLUMNS} for row in rows if "seconds" in row],
        "not_timed": [{key: row[key] for key in ("contender", "note")} for row in rows if "seconds" not in row],
    }  # fmt: skip


def write(result: dict[str, Any], json_file: Path | None, csv_file: Path | None, plot_file: Path | None) -> None:
    """Write the requested files, and print their names."""
    if json_file is not None:
        write_json(json_file, result)
    if csv_file is not None:
        results.write_csv(result["rows"], result["machine"], csv_file, COLUMNS)
    if plot_file is not None:
        plot(result, plot_file)
    for path in (json_file, csv_file, plot_file):
        if path is not None:
            print(path)


def plot(result: dict[str, Any], path: Path) -> None:
    """Draw bars of pairs per second and of peak activation memory, one per contender."""
    from matplotlib.figure import Figure

    rows = result["rows"]
    figure = Figure(figsize=(11, 0.45 * len(rows) + 1.8), layout="constrained")
    figure.suptitle(heading(result["machine"], result["setup"]), fontsize=8)
    panels = (
        ("pairs_per_s", "pairs per second (more is better)"),
        ("peak_mb", "peak activation memory, MB (less is better)"),
    )
    for axes, (key, title) in zip(figure.subplots(1, 2, sharey=True), panels, strict=True):
        colors = ["#999999" if eager_name(row["contender"]) in BASELINES else "#4477aa" for row in rows]
        bars = axes.barh(range(len(rows)), [row[key] for row in rows], color=colors)
        axes.bar_label(bars, fmt="{:.4g}", fontsize=7, padding=2)
        axes.set_title(title, fontsize=8)
        axes.set_yticks(range(len(rows)), [row["contender"] for row in rows], fontsize=8)
        axes.margins(x=0.15)
    figure.axes[0].invert_yaxis()
    results.save_figure(figure, path)
