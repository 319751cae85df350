"""Draw docs/images/speed.svg, a whole step against its peers: `python docs/images/draw_speed.py`.

It is as wide as a phone, where its letters keep their size, and white, so that dark pages can show it. The figures are
committed results of `mvlm bench step`.
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
    figure, panels = plt.subplots(2, 1, figsize=(4.2, 4.4), height_ratios=(5, 4), layout="constrained")
    for axes, preset, batch in zip(panels, ("tiny", "base"), (64, 4), strict=True):
        with (RESULTS / f"step-{preset}-amd-zen5.csv").open() as file:
            rows = {row["contender"]: row for row in csv.DictReader(file)}
        shown = [name for name in NAMES if name in rows]
        colours = ["#1d6fb5" if name in ("plain", "fast") else "#9a9a9a" for name in shown]
        bars = axes.barh(
            [NAMES[name] for name in shown], [float(rows[name]["pairs_per_s"]) for name in shown], color=colours
        )
        rates = [f"{float(rows[name]['pairs_per_s']):#.3g}".rstrip(".") for name in shown]
        labels = [f"{rate}  ({float(rows[name]['vs_eager']):.2f}x)" for rate, name in zip(rates, shown, strict=True)]
        axes.bar_label(bars, labels, padding=3, fontsize=10)
        axes.set_title(f"{preset}, batch {batch}: pairs a second", fontsize=11, loc="left")
        axes.margins(x=0.6)
        axes.spines[["top", "right", "bottom"]].set_visible(False)
        axes.tick_params(left=False, bottom=False, labelbottom=False)
    figure.savefig(HERE / "speed.svg", metadata={"Date": None}, facecolor="white")


if __name__ == "__main__":
    main()
