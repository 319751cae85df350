"""Draw docs/images/front.png, what the demo's model rebuilds and where it looks: `python docs/images/draw_front.py`.

Needs the run and the data set of `make demo`. Rows are the test images whose masked pixels their caption improves most
over another image's caption, one image of each group of emoji. The masked word is the one that the image improves most.
"""

import argparse
from pathlib import Path
from textwrap import fill

import matplotlib as mpl

mpl.use("agg")
import matplotlib.pyplot as plt
import numpy as np
from numpy.typing import NDArray
from PIL import Image

import mvlm
from mvlm.inference.attention_maps import draw_overlay
from mvlm.inference.masked import Reconstruction
from mvlm_dataloading import open_dataset

HERE = Path(__file__).parent
COLUMNS = ("image", "masked", "rebuilt with\nits caption", "rebuilt with\nanother caption", "where the\nword looks")
SIDE = 224


def main() -> None:
    """Write the drawing."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--run", type=Path, default=Path("runs/demo"))
    parser.add_argument("--data", type=Path, default=Path("data/emoji"))
    parser.add_argument("--out", type=Path, default=HERE / "front.png")
    parser.add_argument("--rows", type=int, default=4)
    options = parser.parse_args()
    model = mvlm.load_model(options.run, device="cpu", precision="fp32")
    split = open_dataset(options.data, "test")
    images = [split.image_bytes(i) for i in range(len(split))]
    captions = [split.captions(i)[0] for i in range(len(split))]
    partner = np.roll(np.random.default_rng(0).permutation(len(split)), 1)  # another image of each

    gains = [pixel_gain(model, images[i], captions[i], captions[partner[i]], i) for i in range(len(split))]
    rows: list[int] = []
    for i in np.argsort(gains)[::-1].tolist():
        if all(split.metadata(i)["group"] != split.metadata(row)["group"] for row in rows):
            rows.append(i)
        if len(rows) == options.rows:
            break

    figure, axes = plt.subplots(len(rows), 6, figsize=(10.4, 1.6 * len(rows)), width_ratios=[*[1] * 5, 2])
    for line, row in enumerate(rows):
        image, other = images[row], images[partner[row]]
        right = model.reconstruct(image, captions[row], seed=row)
        misled = model.reconstruct(image, captions[partner[row]], seed=row)
        word, text = best_word(model, image, other, captions[row])
        looks = model.attention(image, captions[row]).maps[1 + word]
        panels = right.image, right.masked, right.rebuilt, misled.rebuilt, np.asarray(draw_overlay(image, looks))
        for axis, panel in zip(axes[line], panels, strict=False):
            axis.imshow(Image.fromarray(panel).resize((SIDE, SIDE)))
        named = fill(captions[row], 46) + "\n" + fill(f"(another: {captions[partner[row]]})", 46)
        axes[line, 5].text(0.02, 0.5, f"{named}\n\n{text}", va="center", fontsize=9)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_color("#cccccc")
    for axis, name in zip(axes[0], COLUMNS, strict=False):
        axis.set_title(name, fontsize=10)
    for axis in axes[:, 5]:
        axis.axis("off")
    figure.tight_layout(w_pad=0.3, h_pad=0.3)
    figure.savefig(options.out, dpi=110, metadata={"Software": None})


def pixel_gain(model: mvlm.TrainedModel, image: bytes, caption: str, wrong: str, seed: int) -> float:
    """Mean absolute error over the masked pixels that a wrong caption adds, in levels of 0 to 255."""
    error = {text: masked_error(model.reconstruct(image, text, seed=seed)) for text in (caption, wrong)}
    return error[wrong] - error[caption]


def masked_error(found: Reconstruction) -> float:
    """Mean absolute error over the masked pixels."""
    side = found.image.shape[0] // found.hidden.shape[0]
    hidden: NDArray[np.bool_] = found.hidden.repeat(side, 0).repeat(side, 1)
    return float(np.abs(found.rebuilt[hidden].astype(float) - found.image[hidden]).mean())


def best_word(model: mvlm.TrainedModel, image: bytes, other: bytes, caption: str) -> tuple[int, str]:
    """Place of the word of a caption whose guess the image improves most, and the guesses as text."""
    words = caption.split()
    best, place, text = -1.0, 0, ""
    for i, word in enumerate(words):
        masked = " ".join("[MASK]" if i == j else each for j, each in enumerate(words))
        with_image, with_other = (model.fill(masked, given, top=50).guesses[0] for given in (image, other))
        chance = [sum(g.probability for g in found if g.token == word) for found in (with_image, with_other)]
        if chance[0] - chance[1] > best:
            best, place = chance[0] - chance[1], i
            named = [f"{found[0].token}, {100 * found[0].probability:.0f} %" for found in (with_image, with_other)]
            text = f"{masked}\nwith its image: {named[0]}\nwith another image: {named[1]}"
    return place, text


if __name__ == "__main__":
    main()
