"""Draw docs/images/scaling.svg, the parts of a step against the number of GPUs: `python docs/images/draw_scaling.py`.

They are those of cluster plans of `base` on H100s with 128 pairs a GPU.
"""

from pathlib import Path

import matplotlib as mpl

mpl.use("svg")
import matplotlib.pyplot as plt

from mvlm.config.model import MaskVLMConfig
from mvlm.costs.cluster_plan import ClusterSetting, scaling
from mvlm.costs.step_cost import step_cost

HERE = Path(__file__).parent
SETTING = ClusterSetting(
    model=MaskVLMConfig.preset("base"), gpu="H100", per_node=8, nodes=16, batch_size=16384, mfu=0.4
)


def main() -> None:
    """Write the drawing."""
    mpl.rcParams["svg.hashsalt"] = "scaling"
    rows = scaling(SETTING, step_cost(SETTING.model, SETTING.shape))
    gpus = [row.ranks for row, _ in rows]
    parts = {
        "computing": [step.computing for _, step in rows],
        "logits of ITC": [step.logits / step.step for _, step in rows],
        "waiting": [sum(step.waiting.values()) / step.step for _, step in rows],
    }
    figure, axes = plt.subplots(figsize=(7, 3.2))
    for (name, values), color in zip(parts.items(), ("#1d6fb5", "#b5651d", "#777777"), strict=True):
        axes.plot(gpus, [100 * value for value in values], "o-", color=color, label=name)
    axes.set_xscale("log", base=2)
    axes.set_xticks(gpus, [f"{n:,}" for n in gpus])
    axes.set_ylim(0, 102)
    axes.set_xlabel("GPUs, 128 pairs on each")
    axes.set_ylabel("% of a step")
    axes.grid(alpha=0.3)
    axes.legend(loc="center left")
    figure.tight_layout()
    figure.savefig(HERE / "scaling.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
