"""Draw docs/images/front.png, one masked image rebuilt with captions that differ in a word.

    mvlm pretrain tiny --data data/emoji --out runs/front --model.image-size 64 --max-steps 2000 \\
        --itc-weight 0 --itm-weight 0 --mlm-weight 0 --eval-every-steps 0
    python docs/images/draw_front.py --run runs/front

trains the model for it, by MIM alone, and draws. The rule: of the test images whose captions differ from others in one
word, those that the other captions change most, beyond the error with their own; no two rows with the same word.
"""

import argparse
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from textwrap import fill
from typing import NamedTuple

import matplotlib as mpl

mpl.use("agg")
import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

import mvlm
from mvlm.inference.masked import Reconstruction
from mvlm_dataloading import Dataset, open_dataset

HERE = Path(__file__).parent
SIDE = 192
CAPTIONS = 3
"""Captions of a row: the image's own, and two of others."""


class Row(NamedTuple):
    """One image with its captions, the own one first."""

    score: float
    word: str
    image: int
    captions: tuple[str, ...]
    rebuilt: tuple[Reconstruction, ...]


def main() -> None:
    """Write the drawing."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--run", type=Path, default=Path("runs/front"))
    parser.add_argument("--data", type=Path, default=Path("data/emoji"))
    parser.add_argument("--out", type=Path, default=HERE / "front.png")
    parser.add_argument("--rows", type=int, default=6)
    options = parser.parse_args()
    model = mvlm.load_model(options.run, device="cpu", precision="fp32")
    split = open_dataset(options.data, "test")
    found = [row for group in groups_of(split) for row in rows_of(model, split, group)]
    rows: list[Row] = []
    for row in sorted(found, key=lambda row: -row.score):
        if all(row.word != other.word and not set(row.captions) & set(other.captions) for other in rows):
            rows.append(row)
        if len(rows) == options.rows:
            break
    draw(rows, options.out)


def groups_of(split: Dataset) -> list[list[tuple[int, str, str]]]:
    """Groups of (image, caption, word) whose captions are equal but for the word in one place."""
    groups: dict[tuple[str, ...], list[tuple[int, str, str]]] = defaultdict(list)
    for image in range(len(split)):
        caption = split.captions(image)[0]
        words = caption.split()
        for place, word in enumerate(words if len(words) > 1 else ()):
            groups[(*words[:place], "", *words[place + 1 :])].append((image, caption, word.strip(",")))
    return [group for group in groups.values() if len({caption for _, caption, _ in group}) >= CAPTIONS]


def rows_of(model: mvlm.TrainedModel, split: Dataset, group: Sequence[tuple[int, str, str]]) -> list[Row]:
    """A row for each image of a group: its own caption, and the others of the group that change most."""
    rows = []
    for image, own, word in group:
        data = split.image_bytes(image)
        right = model.reconstruct(data, own, seed=image)
        others = {caption: model.reconstruct(data, caption, seed=image) for _, caption, _ in group if caption != own}
        chosen = sorted(others, key=lambda caption: -difference(others[caption], right))[: CAPTIONS - 1]
        changed = min(difference(others[caption], right) for caption in chosen)
        rebuilt = (right, *(others[caption] for caption in chosen))
        rows.append(Row(changed - error(right), word, image, (own, *chosen), rebuilt))
    return rows


def difference(one: Reconstruction, other: Reconstruction) -> float:
    """Mean absolute difference of two reconstructions of an image, over the masked pixels, in levels of 0 to 255."""
    return float(np.abs(one.rebuilt.astype(float) - other.rebuilt)[masked_pixels(one)].mean())


def error(found: Reconstruction) -> float:
    """Mean absolute error over the masked pixels, in levels of 0 to 255."""
    return float(np.abs(found.rebuilt.astype(float) - found.image)[masked_pixels(found)].mean())


def masked_pixels(found: Reconstruction) -> np.ndarray:
    """(height, width) bool."""
    side = found.image.shape[0] // found.hidden.shape[0]
    return found.hidden.repeat(side, 0).repeat(side, 1)


def draw(rows: Sequence[Row], out: Path) -> None:
    """Write the rows, two beside each other: what the model sees, then what it paints for each caption."""
    lines, panels = (len(rows) + 1) // 2, 1 + CAPTIONS
    figure, axes = plt.subplots(
        lines,
        2 * panels + 1,
        figsize=(15, 2.5 * lines),
        squeeze=False,
        width_ratios=[*[1] * panels, 0.15, *[1] * panels],
    )
    for axis in axes.flat:
        axis.axis("off")
    for number, row in enumerate(rows):
        first = (panels + 1) * (number % 2)
        shown = [(row.rebuilt[0].masked, "what the model sees")]
        shown += [(each.rebuilt, caption) for each, caption in zip(row.rebuilt, row.captions, strict=True)]
        for axis, (panel, title) in zip(axes[number // 2, first : first + panels], shown, strict=True):
            axis.axis("on")
            axis.imshow(Image.fromarray(panel).resize((SIDE, SIDE), Image.Resampling.NEAREST))
            axis.set_title(fill(title, 20), fontsize=11)
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_color("#cccccc")
    figure.tight_layout(w_pad=0.4, h_pad=0.8)
    figure.savefig(out, dpi=90, bbox_inches="tight", pad_inches=0.05, metadata={"Software": None})


if __name__ == "__main__":
    main()
