"""Strips of images: each image of a strip is loaded as if it were stored alone."""

import io
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mvlm_dataloading import Augment, DataError, Loader, ShardWriter, open_dataset, tokenizer_for
from support.loaders import make_loader

SAMPLES, SIDE, IMAGES = 12, 40, 3


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def write(folder: Path, images: np.ndarray) -> Path:
    """A data set of images uint8 (samples, H, W, 3)."""
    with ShardWriter(folder, name="strips", source="", licence="", attribution="", recipe={}) as writer:
        for i, pixels in enumerate(images):
            assert writer.add(f"{i:03d}", png(pixels), [f"number {i}"], {"image_id": i}) is None
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> tuple[Path, list[Path]]:
    """A data set of strips, and a data set of the first images, of the second and of the third."""
    out = tmp_path_factory.mktemp("strips")
    tiles = np.random.default_rng(0).integers(0, 256, (SAMPLES, IMAGES, SIDE, SIDE, 3), dtype=np.uint8)
    strips = write(out / "strips", np.concatenate([tiles[:, k] for k in range(IMAGES)], axis=2))
    return strips, [write(out / f"{k}", tiles[:, k]) for k in range(IMAGES)]


def batches(folder: Path, count: int, **settings) -> list:
    dataset = open_dataset(folder, "train")
    options = {"batch_size": 5, "image_size": 32, "text_length": 12, "seed": 5, "mask_block": 16, **settings}
    return list(itertools.islice(make_loader(dataset, tokenizer_for(dataset, 300), **options), count))


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings", [{"keep_mb": 0}, {"keep_mb": 10}, {"train": False}, {"keep_mb": 10, "num_threads": 1}]
)
def test_each_image_is_loaded_as_if_it_were_alone(data, settings):
    strips, alone = data
    count = 3 if "train" in settings else 6  # two and a half epochs
    found = batches(strips, count, augment=Augment(strip=IMAGES), **settings)
    assert len(found) == count
    for k, folder in enumerate(alone):
        for (batch, masks), (other, other_masks) in zip(found, batches(folder, count, **settings), strict=True):
            assert batch.images.shape[1:] == (3, 32, IMAGES * 32)
            assert torch.equal(batch.images[..., 32 * k : 32 * (k + 1)], other.images)
            assert torch.equal(batch.tokens, other.tokens)
            assert torch.equal(masks.patch_ids, other_masks.patch_ids)


@pytest.mark.parametrize("keep_mb", [0, 10])
def test_images_that_are_no_strips_are_refused(data, keep_mb):
    strips, _ = data
    with pytest.raises(
        DataError, match="wanted a strip of 2 square images side by side, 2 times as wide as high, found"
    ):
        batches(strips, 1, augment=Augment(strip=2), keep_mb=keep_mb)


def test_strips_are_not_augmented_and_states_differ(data):
    strips, (alone, *_) = data
    with pytest.raises(ValueError, match="no augmentation"):
        batches(strips, 1, augment=Augment(strip=IMAGES, flip=0.5))
    dataset = open_dataset(alone, "train")
    states = [
        Loader(
            dataset,
            tokenizer_for(dataset, 300),
            batch_size=5,
            image_size=32,
            text_length=12,
            seed=5,
            augment=Augment(strip=n),
        ).state_dict()["pictures"]
        for n in (1, 2)
    ]
    assert states[0] != states[1]
