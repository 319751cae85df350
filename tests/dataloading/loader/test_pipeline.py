"""The DALI graph against numpy and Pillow."""

import io

import numpy as np
import pytest
from PIL import Image

from mvlm_dataloading import ShardWriter, open_dataset
from mvlm_dataloading.loader.crop import CropGeometry
from mvlm_dataloading.loader.pipeline import Decoding, build_pipeline
from mvlm_dataloading.loader.sampler import write_index_views
from support.data import make_image


def run(dataset, ids, draws, geometry, tmp_path, *, batch_size=6, decoding=Decoding.CPU):
    """Images (n, 3, S, S), corners (n, 2) and sizes (n, 2) of the samples, from the graph."""
    assert len(ids) % batch_size == 0
    pipeline = build_pipeline(
        *write_index_views(tmp_path, dataset, ids),
        lambda batch: draws[(int(batch) * batch_size + np.arange(batch_size)) % len(ids)],
        geometry,
        batch_size=batch_size,
        num_threads=1,
        decoding=decoding,
    )
    # Copied before the next run, which fills the same buffers.
    outputs = [[np.array(part.as_tensor()) for part in _images_and_windows(pipeline)] for _ in ids[::batch_size]]
    return [np.concatenate(parts) for parts in zip(*outputs, strict=True)]


def _images_and_windows(pipeline):
    images, *_, corner, size = pipeline.run()
    return images, corner, size


def window_oracle(height: int, width: int, u: np.ndarray, scale, ratio) -> tuple[int, int, int, int]:
    """The documented formula for one image, in Python floats: y, x, h, w."""
    area = height * width * (scale[0] + (scale[1] - scale[0]) * float(u[0]))
    aspect = ratio[0] * (ratio[1] / ratio[0]) ** float(u[1])
    h = min(max(int(np.floor(np.sqrt(area / aspect) + 0.5)), 1), height)
    w = min(max(int(np.floor(np.sqrt(area * aspect) + 0.5)), 1), width)
    return int(float(u[2]) * (height - h + 1)), int(float(u[3]) * (width - w + 1)), h, w


@pytest.mark.parametrize(
    "scale, ratio", [((0.2, 1.0), (3 / 4, 4 / 3)), ((0.01, 0.02), (0.1, 10.0)), ((1.0, 1.0), (1.0, 1.0))]
)
def test_crops_follow_the_formula_and_pixels_match_pillow(train_split, tmp_path, scale, ratio):
    ids = np.arange(60)
    draws = np.random.default_rng(1).random((60, 4))
    draws[:4] = [[0, 0, 0, 0], [1 - 2**-53] * 4, [0, 1 - 2**-53, 0, 1 - 2**-53], [1 - 2**-53, 0, 1 - 2**-53, 0]]
    images, corners, sizes = run(
        train_split, ids, draws, CropGeometry(image_size=32, crop_scale=scale, crop_ratio=ratio), tmp_path
    )
    assert images.dtype == np.uint8
    assert images.shape == (60, 3, 32, 32)
    worst = 0.0
    for i in ids:
        pillow_image = Image.open(io.BytesIO(train_split.image_bytes(i)))
        y, x, h, w = window_oracle(pillow_image.height, pillow_image.width, draws[i], scale, ratio)
        assert (corners[i].tolist(), sizes[i].tolist()) == ([y, x], [h, w])
        assert 0 <= y <= pillow_image.height - h
        assert 0 <= x <= pillow_image.width - w
        wanted = pillow_image.crop((x, y, x + w, y + h)).resize((32, 32), Image.Resampling.BILINEAR)
        worst = max(worst, np.abs(np.array(wanted).transpose(2, 0, 1) - images[i].astype(float)).mean())
    # Rounding in two resizers, and for JPEG and WebP in two decoders: well under a level on average.
    assert worst < 1.0


def test_without_randomness_the_whole_image_is_resized(train_split, tmp_path):
    ids = np.arange(12)
    images, corners, sizes = run(
        train_split, ids, np.full((12, 4), 0.5), CropGeometry(image_size=48, random=False), tmp_path
    )
    for i in ids:
        pillow_image = Image.open(io.BytesIO(train_split.image_bytes(i)))
        assert (corners[i].tolist(), sizes[i].tolist()) == ([0, 0], [pillow_image.height, pillow_image.width])
        wanted = pillow_image.resize((48, 48), Image.Resampling.BILINEAR)
        assert np.abs(np.array(wanted).transpose(2, 0, 1) - images[i].astype(float)).mean() < 1.0


def test_grey_transparent_and_cmyk_images_become_rgb(tmp_path):
    kinds = [("L", "PNG"), ("L", "JPEG"), ("LA", "PNG"), ("RGBA", "PNG"), ("P", "PNG"), ("CMYK", "JPEG"), ("1", "PNG")]
    with ShardWriter(tmp_path / "d", name="", source="", licence="", attribution="", recipe={}) as writer:
        for mode, kind in kinds:
            file = io.BytesIO()
            Image.open(io.BytesIO(make_image(4))).convert(mode).save(file, kind)
            assert writer.add(f"{mode}-{kind}", file.getvalue(), ["x"]) is None
    dataset = open_dataset(tmp_path / "d", "train")
    ids = np.arange(len(kinds))
    images, *_ = run(
        dataset, ids, np.zeros((len(ids), 4)), CropGeometry(image_size=32, random=False), tmp_path, batch_size=7
    )
    plain = np.array(Image.open(io.BytesIO(make_image(4))).resize((32, 32), Image.Resampling.BILINEAR)).transpose(
        2, 0, 1
    )
    for (mode, kind), image in zip(kinds, images, strict=True):
        expected = plain if mode not in ("L", "LA", "1") else np.broadcast_to(image[:1], image.shape)
        assert np.abs(image.astype(float) - expected).mean() < 12, (mode, kind)
