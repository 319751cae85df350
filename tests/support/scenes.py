"""A small data set of coloured squares, on disk, and damage done to it."""

import io
import os
from pathlib import Path

import numpy as np
from PIL import Image

from mvlm_dataloading import Dataset, ShardWriter

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 60, 220), "yellow": (230, 220, 40)}
PLACES = ("top left", "top right", "bottom left", "bottom right")
GROUNDS = {"white": (255, 255, 255), "black": (0, 0, 0)}
COUNTS = {"train": 32, "validation": 8, "test": 8}


def png(pixels: np.ndarray) -> bytes:
    """uint8 (H, W, 3) or (H, W, 4) as a PNG file."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def scene(number: int, side: int = 32) -> tuple[np.ndarray, str]:
    """Scene 0 to 31: a square of one of four colours in one of four corners on white or black, and its caption."""
    colour = list(COLOURS)[number % 4]
    place = PLACES[number // 4 % 4]
    ground = list(GROUNDS)[number // 16 % 2]
    pixels = np.empty((side, side, 3), np.uint8)
    pixels[:] = GROUNDS[ground]
    half = side // 2
    top, left = (0 if "top" in place else half), (0 if "left" in place else half)
    pixels[top : top + half, left : left + half] = COLOURS[colour]
    return pixels, f"{colour} {place} on {ground}"


def write_scenes(folder: Path, counts: dict[str, int] | None = None, captions=None) -> Path:
    """Shards of scenes; every second picture has a further caption. `base` is the colour."""
    with ShardWriter(
        folder, name="scenes", source="made up for tests", licence="CC0", attribution="drawn by <nobody>", recipe={}
    ) as writer:
        for split, count in (counts or COUNTS).items():
            for i in range(count):
                pixels, caption = scene(i if split == "train" else 3 * i + 1)
                texts = captions(i) if captions else [caption, f"a square, {caption}"][: 1 + i % 2]
                reason = writer.add(f"{split}{i:03d}", png(pixels), texts, {"base": caption.split()[0]}, split=split)
                assert reason is None
    return folder


def overwrite(dataset: Dataset, part: str, ids, content: bytes | None = None) -> None:
    """Damage the "image" or "text" of samples in place: fill them with zeros after 20 bytes, or with `content`."""
    for i in ids:
        where = getattr(dataset, part)
        with dataset.tars[dataset.shard[i]].open("r+b") as tar:
            size = int(where.size[i])
            tar.seek(where.offset[i] + (20 if content is None else 0))
            tar.write(bytes(size - 20) if content is None else content * size)
    for tar in dataset.tars:
        os.utime(tar.with_suffix(".idx"))
