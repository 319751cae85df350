"""Draw docs/images/speed.svg, a whole step against its peers: `python docs/images/draw_speed.py`.

The figures are committed results of `mvlm bench step`.
"""

import csv
from pathlib import Path

import matplotlib as mpl

mpl.use("svg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
RESULTS = HERE.parents[1] / "benchmarks" / "results"
NAMES = {
    "timm+roberta": "timm + transformers",
    "timm+decoder-layer": "timm + transformers\n+ torch decoder layer",
    "timm+roberta-compiled": "timm + transformers,\ncompiled",
    "plain": "mvlm, plain",
    "fast": "mvlm, fast",
}


def main() -> None:
    """Write the drawing."""
    mpl.rcParams["svg.hashsalt"] = "speed"
    figure, panels = plt.subplots(1, 2, figsize=(9, 2.6), layout="constrained")
    for axes, preset, batch in zip(panels, ("tiny", "base"), (64, 4), strict=True):
        with (RESULTS / f"step-{preset}-amd-zen5.csv").open() as file:
            rows = {row["contender"]: row for row in csv.DictReader(file)}
        shown = [name for name in NAMES if name in rows]
        colours = ["#1d6fb5" if name in ("plain", "fast") else "#9a9a9a" for name in shown]
        bars = axes.barh(
            [NAMES[name] for name in shown], [float(rows[name]["pairs_per_s"]) for name in shown], color=colours
        )
        labels = [f"{float(rows[name]['pairs_per_s']):.3g}  ({float(rows[name]['vs_eager']):.2f}x)" for name in shown]
        axes.bar_label(bars, labels, padding=3, fontsize=9)
        axes.set_title(f"{preset}, batch {batch}: pairs a second", fontsize=10)
        axes.margins(x=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(HERE / "speed.svg", metadata={"Date": None}, facecolor="white")


if __name__ == "__main__":
    main()
