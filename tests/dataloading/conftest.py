"""Small data sets made with Pillow: smooth pictures of several formats and sizes, several captions each."""

import io
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))  # published

from mvlm_dataloading import Dataset, ShardWriter, Tokenizer, open_dataset, train_tokenizer


def make_picture(i: int, *, kind: str = "PNG", size: tuple[int, int] | None = None) -> bytes:
    """Picture number i: waves of colour, of (height, width) `size`."""
    height, width = size or (40 + 13 * (i % 7), 90 - 11 * (i % 5))
    y, x = np.mgrid[0:height, 0:width]
    waves = [127.5 + 110 * np.sin(x / (6 + i % 3) + y / (9 + c) + 0.7 * i + c) for c in range(3)]
    file = io.BytesIO()
    Image.fromarray(np.stack(waves, axis=-1).astype(np.uint8)).save(file, kind, quality=95)
    return file.getvalue()


def make_captions(i: int) -> list[str]:
    """One to three captions, none equal to another picture's."""
    return [f"picture number {i} of some waves", f"the {i}th wave", f"waves, {i} in all, seen from above at noon"][
        : 1 + i % 3
    ]


def write_dataset(
    folder: Path, count: int, *, max_shard_bytes: int = 1 << 30, splits=("train",), kinds=("PNG",), size=None
) -> Path:
    """A data set of `count` pictures in each split, of (height, width) `size` or of several sizes."""
    with ShardWriter(
        folder,
        name="waves",
        source="tests",
        licence="CC0",
        attribution="nobody",
        recipe={"count": count},
        max_shard_bytes=max_shard_bytes,
    ) as writer:
        for split in splits:
            for i in range(count):
                reason = writer.add(
                    f"{split}{i:04d}",
                    make_picture(i, kind=kinds[i % len(kinds)], size=size),
                    make_captions(i),
                    {"number": i},
                    split=split,
                )
                assert reason is None
    return folder


def damage_images(dataset: Dataset, ids) -> None:
    """Make pictures undecodable without moving anything: what is left is their first 20 bytes."""
    for i in ids:
        with dataset.tars[dataset.shard[i]].open("r+b") as tar:
            tar.seek(int(dataset.image.offset[i]) + 20)
            tar.write(bytes(int(dataset.image.size[i]) - 20))
    for tar in dataset.tars:
        os.utime(tar.with_suffix(".idx"))


@pytest.fixture(scope="session")
def make() -> SimpleNamespace:
    """The functions above, for the tests."""
    return SimpleNamespace(picture=make_picture, captions=make_captions, dataset=write_dataset, damage=damage_images)


@pytest.fixture(scope="session")
def waves(tmp_path_factory) -> Path:
    """60 training pictures in several shards, in three formats. Read only."""
    folder = tmp_path_factory.mktemp("waves") / "data"
    return write_dataset(folder, 60, max_shard_bytes=150_000, splits=("train", "test"), kinds=("PNG", "JPEG", "WEBP"))


@pytest.fixture(scope="session")
def train_split(waves) -> Dataset:
    dataset = open_dataset(waves, "train")
    assert len(dataset.tars) > 2
    return dataset


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train_tokenizer([caption for i in range(100) for caption in make_captions(i)], 400)
