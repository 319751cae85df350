"""Draw the committed data set again: images of one or two shapes on a plain ground, and their captions.

    python tests/promises/faults/make_data.py

The golden losses depend on its bytes: renew them too (tests/promises/test_golden.py).
"""

import io
import shutil
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from mvlm_dataloading import ShardWriter

DATA = Path(__file__).parent / "data"
COLOURS = {"red": "#d03020", "green": "#20b040", "blue": "#2050d0", "yellow": "#e0d020", "white": "#f8f8f8"}
SHAPES = ("circle", "square", "bar")


def draw(rng: np.random.Generator, side: int = 96) -> tuple[bytes, str]:
    """One image as a PNG file, and its caption."""
    ground, *inks = rng.permutation(list(COLOURS))[: 2 + int(rng.integers(2))]
    image = Image.new("RGB", (side, side), COLOURS[ground])
    pencil = ImageDraw.Draw(image)
    words = []
    for number, ink in enumerate(inks):
        shape = SHAPES[int(rng.integers(len(SHAPES)))]
        left = number * side // 2 + int(rng.integers(4, 12))
        top, size = int(rng.integers(8, 48)), int(rng.integers(20, 36))
        box = (left, top, left + size, top + (size // 3 if shape == "bar" else size))
        (pencil.ellipse if shape == "circle" else pencil.rectangle)(box, fill=COLOURS[ink])
        words.append(f"a {ink} {shape}")
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return file.getvalue(), f"{' and '.join(words)} on {ground}"


def main() -> None:
    shutil.rmtree(DATA, ignore_errors=True)
    rng = np.random.default_rng(0)
    with ShardWriter(
        DATA,
        name="shapes",
        source="drawn by tests/promises/faults/make_data.py",
        licence="CC0",
        attribution="",
        recipe={},
    ) as writer:
        for split, count in (("train", 60), ("validation", 8), ("test", 8)):
            for i in range(count):
                image, caption = draw(rng)
                writer.add(f"{split}{i:03d}", image, [caption], {"image_id": f"{split}{i}"}, split=split)


if __name__ == "__main__":
    main()
