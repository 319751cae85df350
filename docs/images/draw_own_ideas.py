"""Draw docs/images/own_ideas.svg, two examples of own ideas against the recipe: `python docs/images/draw_own_ideas.py`.

The figures are those of the committed study studies/own_ideas.toml.
"""

import csv
from pathlib import Path

import matplotlib as mpl

mpl.use("svg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
TABLE = HERE.parents[1] / "benchmarks" / "results" / "studies" / "emoji-own_ideas.csv"
MEASURES = {"itm.r1": "R@1 by ITM alone, points", "gain_pixels_pct": "pixel gain, points"}


def main() -> None:
    """Write the drawing: a panel for each measure, a dot and its 95 % interval for each arm."""
    mpl.rcParams["svg.hashsalt"] = "own ideas"
    with TABLE.open() as file:
        rows = [row for row in csv.DictReader(file) if row["arm"] != row["against"]]
    figure, panels = plt.subplots(1, 2, figsize=(7.2, 2.2), sharey=True, layout="constrained")
    for axes, (measure, title) in zip(panels, MEASURES.items(), strict=True):
        shown = [row for row in rows if row["measure"] == measure]
        arms = [row["arm"] for row in shown]
        differences = [float(row["difference"]) for row in shown]
        over = "over_seeds_and_images" if shown[0]["low_over_seeds_and_images"] else "over_seeds"
        below = [d - float(row[f"low_{over}"]) for d, row in zip(differences, shown, strict=True)]
        above = [float(row[f"high_{over}"]) - d for d, row in zip(differences, shown, strict=True)]
        axes.errorbar(differences, arms, xerr=[below, above], fmt="o", color="#1d6fb5", capsize=3)
        axes.axvline(0, color="#9a9a9a", linestyle="--", linewidth=1)
        axes.set_title(title, fontsize=10, loc="left")
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(left=False)
        axes.margins(y=0.2)
    panels[0].invert_yaxis()
    figure.savefig(HERE / "own_ideas.svg", metadata={"Date": None}, facecolor="white")


if __name__ == "__main__":
    main()
