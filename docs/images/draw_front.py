"""Draw docs/images/front.png: a hidden object, painted with the caption of its image and with an edited one.

    make reading
    python docs/images/draw_front.py

The first command trains the model. The rule: the first pairs of the held-out split `edits`, in its order, whatever came
out. Of each pair the first image is shown.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

import matplotlib as mpl

mpl.use("agg")
import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

import mvlm
from mvlm.evaluation.two_way import SPLIT, patches_in
from mvlm_dataloading import Dataset, open_dataset

HERE = Path(__file__).parent
SIDE = 192
Panel = tuple[np.ndarray, str]


def main() -> None:
    """Write the drawing."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--run", type=Path, default=Path("runs/reading"))
    parser.add_argument("--data", type=Path, default=Path("data/scenes/placed"))
    parser.add_argument("--out", type=Path, default=HERE / "front.png")
    parser.add_argument("--rows", type=int, default=6)
    options = parser.parse_args()
    model = mvlm.load_model(options.run, device="cpu", precision="fp32")
    edits = open_dataset(options.data, SPLIT)
    draw([panels_of(model, edits, pair) for pair in range(options.rows)], options.out)


def panels_of(model: mvlm.TrainedModel, edits: Dataset, pair: int) -> list[Panel]:
    """The image with a hidden cell; painted with each caption, and each true image beside it."""
    own, other = (edits.captions(2 * pair + n)[0] for n in (0, 1))
    images = [edits.image_bytes(2 * pair + n) for n in (0, 1)]
    config = model.network.config
    side = config.image_size // config.patch_size
    hidden = np.zeros(side * side, bool)
    hidden[patches_in([edits.metadata(2 * pair)["edit"]], side)[0].numpy()] = True
    rebuilt = [model.reconstruct(images[0], caption, hidden.reshape(side, side)) for caption in (own, other)]
    truth = [model.reconstruct(image, own, hidden.reshape(side, side)).image for image in images]
    return [
        (rebuilt[0].masked, "the model sees"),
        (rebuilt[0].rebuilt, own),
        (truth[0], "true"),
        (rebuilt[1].rebuilt, differing(other, own)),
        (truth[1], "true"),
    ]


def differing(caption: str, other: str) -> str:
    """The parts of a caption, between its commas and "and", that another one lacks."""
    parts, known = ([part for piece in text.split(", ") for part in piece.split(" and ")] for text in (caption, other))
    return "… " + " and ".join(part for part in parts if part not in known) + " …"


def draw(rows: Sequence[Sequence[Panel]], out: Path) -> None:
    """Write the rows, two beside each other."""
    lines, panels = (len(rows) + 1) // 2, len(rows[0])
    widths = [*[1] * panels, 0.15, *[1] * panels]
    figure, axes = plt.subplots(lines, len(widths), figsize=(17, 2.9 * lines), squeeze=False, width_ratios=widths)
    for axis in axes.flat:
        axis.axis("off")
    for number, row in enumerate(rows):
        first = (panels + 1) * (number % 2)
        for axis, (panel, title) in zip(axes[number // 2, first : first + panels], row, strict=True):
            show(axis, panel, title)
    figure.tight_layout(w_pad=0.4, h_pad=0.8)
    figure.savefig(out, dpi=80, bbox_inches="tight", pad_inches=0.05, metadata={"Software": None})


def show(axis: Any, panel: np.ndarray, title: str) -> None:
    """Draw an image uint8 (S, S, 3) with its title."""
    axis.axis("on")
    axis.imshow(Image.fromarray(panel).resize((SIDE, SIDE), Image.Resampling.NEAREST))
    axis.set_title(fill(title, 28), fontsize=8)
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_color("#cccccc")


if __name__ == "__main__":
    main()
