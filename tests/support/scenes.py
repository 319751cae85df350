"""A small data set of coloured squares on disk, damage done to it, and a made-up run."""

import io
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from mvlm_dataloading import Dataset, ShardWriter, open_dataset

from .data import touch_indices

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
    """Shards of scenes. Every second image has a second caption. `base` in the metadata is the colour."""
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


def write_samples(folder: Path, samples: Iterable[tuple[int, list[str], dict]], split: str = "train") -> Dataset:
    """Shards of samples: the number of a scene, captions and metadata. Keys are "00", "01" and so on."""
    with ShardWriter(folder, name="samples", source="", licence="", attribution="", recipe={}) as writer:
        for i, (number, texts, metadata) in enumerate(samples):
            assert writer.add(f"{i:02}", png(scene(number)[0]), texts, metadata, split=split) is None
    return open_dataset(folder, split)


def overwrite(dataset: Dataset, part: str, ids, content: bytes | None = None) -> None:
    """Damage the "image" or "text" of samples in place: zeros after 20 bytes, or the byte `content` throughout."""
    for i in ids:
        offset, size = map(int, dataset.locate(part, i))
        with dataset.tars[int(dataset.shard_of(i))].open("r+b") as tar:
            tar.seek(offset + (20 if content is None else 0))
            tar.write(bytes(size - 20) if content is None else content * size)
    touch_indices(dataset)


def missing_shard(data: Path, split: str) -> None:
    (data / f"{split}-000000.tar").unlink()


def truncated_index(data: Path, split: str) -> None:
    os.truncate(data / f"{split}.index", 1000)


def blank_caption(data: Path, split: str) -> None:
    overwrite(open_dataset(data, split), "text", [2], b" ")


BROKEN = [  # damage to a split, and a word of the error that names it
    (missing_shard, "000000.tar"),
    (truncated_index, "mvlm data index"),
    (blank_caption, "caption"),
]


def made_up_run(run: Path) -> Path:
    """A run folder with the two files that a comparison reads."""
    run.mkdir()
    (run / "config.json").write_text('{"format_version": 2}')
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 1.5}\n')
    return run
