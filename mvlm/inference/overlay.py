"""Attention maps drawn over their image."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor

from mvlm.inference.attention_maps import AttentionMaps, resize_map
from mvlm.inference.images import ImageLike, load_image

COLOURS = np.array([(48, 18, 59), (70, 107, 227), (40, 187, 236), (49, 242, 153), (162, 252, 60), (237, 208, 58),
                    (251, 128, 34), (208, 48, 5), (122, 4, 3)], np.float32)  # fmt: skip
"""Colours of low to high weight, evenly spaced on matplotlib's `turbo`."""
LABEL = 18  # pixels below a panel


def draw_overlay(image: ImageLike, heat: Tensor, *, side: int = 224, strength: float = 0.5) -> Image.Image:
    """One map over its image, scaled from its smallest to its largest weight.

    Args:
        heat: float (rows, columns), over the whole image.
        side: side of the square result, in pixels.
        strength: share of the colours in the result, 0 to 1.
    """
    pixels = load_image(image, side).permute(1, 2, 0).numpy()
    return Image.fromarray(_blend(pixels, heat, side, strength))


def draw_words(
    image: ImageLike, found: AttentionMaps, maps: Tensor | None = None, *, side: int = 160, columns: int = 6
) -> Image.Image:
    """The image, and beside it a panel for each word.

    Args:
        found: maps of the image, from `TrainedModel.attention`.
        maps: (words, rows, columns) to draw. Default: `found.relevance`.
    """
    maps = found.relevance if maps is None else maps
    pixels = load_image(image, side).permute(1, 2, 0).numpy()
    panels = [pixels, *(_blend(pixels, heat, side, 0.5) for heat in maps)]
    return _labelled(panels, ["image", *found.words], side, columns)


def _blend(pixels: NDArray[np.uint8], heat: Tensor, side: int, strength: float) -> NDArray[np.uint8]:
    low, high = heat.min(), heat.max()
    scaled = torch.zeros_like(heat) if high <= low else (heat - low) / (high - low)
    level = resize_map(scaled, side).clamp(0, 1).numpy() * (len(COLOURS) - 1)  # (side, side)
    lower = np.minimum(level.astype(np.int64), len(COLOURS) - 2)
    share = (level - lower)[..., None]
    colours = COLOURS[lower] * (1 - share) + COLOURS[lower + 1] * share
    return np.round((1 - strength) * pixels + strength * colours).astype(np.uint8)


def _labelled(panels: Sequence[NDArray[np.uint8]], labels: Sequence[str], side: int, columns: int) -> Image.Image:
    """A grid of square panels, each above its label."""
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    sheet = Image.new("RGB", (columns * side, rows * (side + LABEL)), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (panel, label) in enumerate(zip(panels, labels, strict=True)):
        x, y = number % columns * side, number // columns * (side + LABEL)
        sheet.paste(Image.fromarray(panel), (x, y))
        draw.text((x + 3, y + side + 2), label[: max(1, side // 7)], fill="black")
    return sheet
