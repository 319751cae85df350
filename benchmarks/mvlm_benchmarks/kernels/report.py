"""Report of `mvlm bench kernels`: tables on the console, CSV, plot and JSON."""

from itertools import groupby
from pathlib import Path
from typing import Any

from mvlm_benchmarks import gpu_state
from mvlm_benchmarks.intervals import NO_DIFFERENCE
from mvlm_benchmarks.kernels.reference import PASSES
from mvlm_benchmarks.results import MACHINE_COLUMNS, device_name, file_stem, heading, save_figure
from mvlm_dataloading.files import write_json

Row = dict[str, Any]
COLUMNS = (
    "op", "pass", "shape", "dtype", "contender", "status", "note", "us", "us_p20", "us_p80", "cpu_us", "graph_us",
    "gb_per_s", "roofline_pct", "copy_pct", "read_pct", "triad_pct", "gemm_us", "peak_mb", "vs_ours", "vs_ours_low",
    "vs_ours_high", "verdict", "bytes_minimum", "repeats", "kernels", *gpu_state.COLUMNS,
    *MACHINE_COLUMNS,
)  # fmt: skip
JSON_KEYS = tuple(
    name for name in COLUMNS if name not in ("status", "note", "bytes_minimum", "kernels", *MACHINE_COLUMNS)
)

# Statuses of a contender that cannot run any case of an op.
ABSENT = ("missing", "not applicable")


def table(rows: list[Row]) -> str:
    """Table of one case: a line per contender, then the reasons for missing figures."""
    first, on_cpu = rows[0], any(row.get("cpu_us") is not None for row in rows)
    last = ("cpu_us", "cpu us", 9) if on_cpu else ("roofline_pct", "roof %", 6)
    group = f"{'us':>9} {'x ours':>7}  {'GB/s':>7} {last[1]:>{last[2]}}"
    lines = ["", f"{first['op']}  {first['shape']}  {first['dtype']}"]
    lines.append(f"{'':16}" + "".join(f"  {name:^{len(group)}}" for name in PASSES) + f"  {'peak':>8}  {'equal to':>8}")
    lines.append(f"{'contender':16}" + f"  {group}" * len(PASSES) + f"  {'MB':>8}  {'float64':>8}  repeats")
    reasons, absent = [], []
    for contender, passes in groupby(rows, key=lambda row: row["contender"]):
        by_pass = {row["pass"]: row for row in passes}
        if all(row["status"] in ABSENT for row in by_pass.values()):
            absent.append(contender)
            continue
        reasons += _reasons(contender, by_pass)
        if any(row["us"] is not None for row in by_pass.values()):
            cells = "".join(f"  {_cells(by_pass.get(name), last[0], last[2])}" for name in PASSES)
            peak = by_pass.get("both", by_pass["forward"])["peak_mb"]
            equal = "NO" if any(row["status"] == "WRONG" for row in by_pass.values()) else "yes"
            lines.append(f"{contender:16}{cells}  {_number(peak, 8)}  {equal:>8}  {by_pass['forward']['repeats']}")
    if any(row["verdict"] == NO_DIFFERENCE for row in rows):
        reasons.append("  ~ no difference: the 95 % interval of the ratio contains 1")
    if absent:
        reasons.append(f"  not available, reasons at the end: {', '.join(absent)}")
    return "\n".join(lines + reasons)


def _cells(row: Row | None, last: str, width: int) -> str:
    row = row or {}
    us, ratio, rate, further = (
        _number(row.get(key), width) for key, width in (("us", 9), ("vs_ours", 7), ("gb_per_s", 7), (last, width))
    )
    mark = "~" if row.get("verdict") == NO_DIFFERENCE else " "
    return f"{us} {ratio}{mark} {rate} {further}"


def _number(value: float | None, width: int) -> str:
    return f"{'-':>{width}}" if value is None else f"{value:>{width}.{2 if value < 100 else 0}f}"


def _reasons(contender: str, by_pass: dict[str, Row]) -> list[str]:
    """Reasons of a contender: one line if all passes have the same reason, else one line per pass with a reason."""
    texts = {
        name: f"{row['status']}: {row['note']}" for name, row in by_pass.items() if row["note"] or row["us"] is None
    }
    if len(texts) == len(by_pass) and len(set(texts.values())) == 1:
        return [f"  {contender} {next(iter(texts.values()))}"]
    return [f"  {contender} {name} {text}" for name, text in texts.items()]


def footer(rows: list[Row]) -> str:
    """All reasons for missing figures, without repetitions."""
    reasons: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        if row["us"] is None:
            cases = reasons.setdefault((row["status"], row["contender"], row["note"]), [])
            cases.append(f"{row['op']} {row['shape']} {row['pass']}")
    lines = [""]
    for (status, contender, note), cases in sorted(reasons.items()):
        # A peer that is not available at all is listed without its cases.
        where = "" if status in ABSENT else f" ({cases[0]}{f' and {len(cases) - 1} more' if cases[1:] else ''})"
        lines.append(f"{status}: {contender}: {note}{where}")
    return "\n".join(lines)


def file_names(about: dict[str, Any], dtype: str, out: Path) -> tuple[Path, Path]:
    """CSV and plot in the folder `out`, named after device and dtype."""
    stem = file_stem("kernels", device_name(about), dtype)
    return out / f"{stem}.csv", out / f"{stem}.svg"


def write_figures(rows: list[Row], about: dict[str, Any], json_file: Path) -> None:
    """Write the JSON of all rows."""
    timed = [{key: row.get(key) for key in JSON_KEYS} for row in rows if row["us"] is not None]
    others = [{key: row[key] for key in COLUMNS[:7]} for row in rows if row["us"] is None]
    write_json(json_file, {"machine": about, "rows": timed, "not_timed": others})


def plot(rows: list[Row], about: dict[str, Any], path: Path) -> None:
    """Draw one panel per case: bars of time over our time, by contender and pass. Bars to the right are slower."""
    # Figure instead of pyplot: it needs no display and leaves no global state.
    from matplotlib.figure import Figure

    timed = [row for row in rows if row["vs_ours"] is not None]
    panels = [list(panel) for _, panel in groupby(timed, key=lambda row: (row["op"], row["shape"]))]
    columns = min(2, max(1, len(panels)))
    lines = [panels[i : i + columns] for i in range(0, len(panels), columns)]
    heights = [max(len({row["contender"] for row in panel}) for panel in line) + 1.5 for line in lines]
    figure = Figure(figsize=(7.5 * columns, 0.42 * sum(heights) + 1.2), layout="constrained")
    figure.suptitle(f"Time over ours ({about['figures']})\n{heading(about).splitlines()[-1]}", fontsize=9)
    # All panels share one scale, with room for labels next to the longest bars.
    ratios = [row["vs_ours"] for row in timed] or [1.0]
    limits = min(0.8, *ratios) / 2, max(1.5, *ratios) * 2
    if panels:
        grid = figure.add_gridspec(len(lines), columns, height_ratios=heights)
        for number, panel in enumerate(panels):
            _draw_panel(figure.add_subplot(grid[number // columns, number % columns]), panel, limits)
        figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    save_figure(figure, path)


def _draw_panel(axes: Any, panel: list[Row], limits: tuple[float, float]) -> None:
    contenders = list(dict.fromkeys(row["contender"] for row in panel))
    for number, (name, color) in enumerate(zip(PASSES, ("#4477aa", "#cc6677", "#999999"), strict=True)):
        rows = [row for row in panel if row["pass"] == name]
        heights = [contenders.index(row["contender"]) + 0.27 * (number - 1) for row in rows]
        # Bars start at 1 on a logarithmic axis, so that "2x slower" and "2x faster" have the same length.
        bars = axes.barh(heights, [row["vs_ours"] - 1 for row in rows], 0.25, left=1, color=color, label=name)
        axes.bar_label(bars, [f"{row['vs_ours']:.2f}x  {row['us']:.0f} us" for row in rows], fontsize=6, padding=2)
    axes.set_xscale("log", base=2)
    axes.set_xlim(*limits)
    axes.xaxis.set_major_formatter(lambda ratio, _: f"{ratio:g}x")
    axes.tick_params(axis="x", labelsize=7)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(range(len(contenders)), contenders, fontsize=8)
    axes.set_ylim(len(contenders) - 0.4, -0.6)
    axes.set_title(f"{panel[0]['op']}  {panel[0]['shape']}  {panel[0]['dtype']}", fontsize=8)
