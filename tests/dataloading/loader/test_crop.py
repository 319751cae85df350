"""Random crops: their formula and their ranges."""

import io

import numpy as np
import pytest
from PIL import Image

from mvlm_dataloading.loader.crop import CropGeometry
from mvlm_dataloading.loader.pipeline import Decoding, build_pipeline
from mvlm_dataloading.loader.sampler import write_index_views


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


@pytest.mark.slow
def test_crop_areas_and_ratios_cover_their_ranges(train_split, tmp_path):
    ids = np.zeros(3000, np.int64)
    draws = np.random.default_rng(2).random((3000, 4))
    _, _, sizes = run(
        train_split, ids, draws, CropGeometry(image_size=32, crop_scale=(0.25, 0.5)), tmp_path, batch_size=100
    )
    image = Image.open(io.BytesIO(train_split.image_bytes(0)))
    share = sizes.prod(axis=1) / (image.height * image.width)
    # Uniform between a quarter and a half, but for rounding to pixels and for windows that the image's shape clamps.
    assert 0.2 < share.min() < 0.27
    assert 0.47 < share.max() < 0.53
    assert abs(share.mean() - 0.375) < 0.02


@pytest.mark.parametrize(
    "settings",
    [{"crop_scale": (0.0, 1.0)}, {"crop_scale": (0.5, 1.1)}, {"crop_scale": (0.9, 0.5)}, {"crop_ratio": (0, 1)}],
)
def test_crop_ranges_out_of_order_are_refused(settings):
    with pytest.raises(ValueError, match=f"wanted {next(iter(settings))} as 0 < low <= high"):
        CropGeometry(image_size=32, **settings)
