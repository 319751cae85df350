"""Draw docs/images/scaling.svg, computing against the number of GPUs: `python docs/images/draw_scaling.py`.

Both curves are cluster plans of `base` on H100s with 128 pairs a GPU. `before` is the plan of version 8cb24eb, whose
ranks showed all features to all others; its formula is repeated here.
"""

from pathlib import Path

import matplotlib as mpl

mpl.use("svg")
import matplotlib.pyplot as plt

from mvlm.config.model import MaskVLMConfig
from mvlm.costs.cluster_plan import NODES, ClusterSetting, scaling
from mvlm.costs.step_cost import step_cost

HERE = Path(__file__).parent
SETTING = ClusterSetting(
    model=MaskVLMConfig.preset("base"), gpu="H100", per_node=8, nodes=16, batch_size=16384, mfu=0.4
)


def before(ranks: int, computing: float) -> float:
    """Computing part of a step in which every rank receives the fp32 features of the whole batch, and sends as much."""
    config, node = SETTING.model, NODES["H100"]
    others = 128 * (ranks - 1)
    row = (1 + config.num_patches + config.text_length) * config.width + 2 * config.itc_width
    rate = node.intra_node if ranks <= 8 else min(node.intra_node, 8 * node.inter_node)
    return computing / (computing + 2 * 4 * others * row / rate)


def main() -> None:
    """Write the drawing."""
    mpl.rcParams["svg.hashsalt"] = "scaling"
    rows = scaling(SETTING, step_cost(SETTING.model, SETTING.shape))
    gpus = [row.ranks for row, _ in rows]
    computing = rows[0][1].forward + rows[0][1].backward
    figure, axes = plt.subplots(figsize=(7, 3.2))
    axes.plot(gpus, [100 * before(n, computing) for n in gpus], "o--", color="#b5651d", label="before")
    axes.plot(gpus, [100 * step.computing for _, step in rows], "o-", color="#1d6fb5", label="now")
    axes.set_xscale("log", base=2)
    axes.set_xticks(gpus, [f"{n:,}" for n in gpus])
    axes.set_ylim(0, 102)
    axes.set_xlabel("GPUs, 128 pairs on each")
    axes.set_ylabel("computing, % of a step")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower left")
    figure.tight_layout()
    figure.savefig(HERE / "scaling.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
