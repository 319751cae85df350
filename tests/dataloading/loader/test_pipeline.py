"""The DALI graph against numpy and Pillow."""

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mvlm_dataloading.loader.pipeline import build_pipeline
from mvlm_dataloading.loader.pixels import CropGeometry
from support.data import make_captions


def run(dataset, ids, draws, geometry):
    """Images (n, 3, S, S), corners (n, 2) and sizes (n, 2) of the samples, from the graph in batches of 6."""
    pipeline = build_pipeline(
        dataset, ids, lambda batch: draws[(int(batch) * 6 + np.arange(6)) % len(ids)], geometry, batch_size=6,
        num_threads=1,
    )  # fmt: skip
    outputs = []
    for _ in ids[::6]:
        images, *_, corner, size = pipeline.run()
        # Copied before the next run, which fills the same buffers.
        outputs.append([np.array(part.as_tensor()) for part in (images, corner, size)])
    return [np.concatenate(parts)[: len(ids)] for parts in zip(*outputs, strict=True)]


def window_oracle(height: int, width: int, u: np.ndarray, scale, ratio) -> tuple[int, int, int, int]:
    """The documented formula for one image, in Python floats: y, x, h, w."""
    area = height * width * (scale[0] + (scale[1] - scale[0]) * float(u[0]))
    aspect = ratio[0] * (ratio[1] / ratio[0]) ** float(u[1])
    h = min(max(int(np.floor(np.sqrt(area / aspect) + 0.5)), 1), height)
    w = min(max(int(np.floor(np.sqrt(area * aspect) + 0.5)), 1), width)
    return int(float(u[2]) * (height - h + 1)), int(float(u[3]) * (width - w + 1)), h, w


@pytest.mark.slow
@pytest.mark.parametrize(
    "scale, ratio", [((0.2, 1.0), (3 / 4, 4 / 3)), ((0.01, 0.02), (0.1, 10.0)), ((1.0, 1.0), (1.0, 1.0)), (None, None)]
)
def test_crops_follow_the_formula_and_pixels_match_pillow(waves_train, scale, ratio):
    """Random crops, and the whole image."""
    ids = np.arange(60)
    draws = np.random.default_rng(1).random((60, 4))
    draws[:4] = [[0, 0, 0, 0], [1 - 2**-53] * 4, [0, 1 - 2**-53, 0, 1 - 2**-53], [1 - 2**-53, 0, 1 - 2**-53, 0]]
    settings: dict[str, Any] = {"random": False} if scale is None else {"crop_scale": scale, "crop_ratio": ratio}
    images, corners, sizes = run(waves_train, ids, draws, CropGeometry(image_size=32, **settings))
    assert (images.dtype, images.shape) == (np.uint8, (60, 3, 32, 32))
    worst = 0.0
    for i in ids:
        pillow_image = Image.open(io.BytesIO(waves_train.image_bytes(i)))
        height, width = pillow_image.height, pillow_image.width
        y, x, h, w = (0, 0, height, width) if scale is None else window_oracle(height, width, draws[i], scale, ratio)
        assert (corners[i].tolist(), sizes[i].tolist()) == ([y, x], [h, w])
        assert 0 <= y <= height - h
        assert 0 <= x <= width - w
        wanted = pillow_image.crop((x, y, x + w, y + h)).resize((32, 32), Image.Resampling.BILINEAR)
        worst = max(worst, np.abs(np.array(wanted).transpose(2, 0, 1) - images[i].astype(float)).mean())
    # Rounding in two resizers, and for JPEG and WebP in two decoders: well under a level on average.
    assert worst < 1.0


def test_dali_follows_indices_that_permute_select_and_repeat(waves_train):
    """The loader and views rely on this, and DALI's documentation does not promise it: checked for the installed
    version, over two epochs."""
    rng = np.random.default_rng(0)
    ids = np.concatenate([rng.permutation(len(waves_train)), rng.integers(0, len(waves_train), 37), [3, 3, 3]])
    assert np.count_nonzero(np.diff(waves_train.shard_of(ids))) > 50  # the same few tars again and again
    pipeline = build_pipeline(
        waves_train, ids, lambda batch: np.zeros((10, 4)), CropGeometry(image_size=32, random=False), batch_size=10,
        num_threads=1,
    )  # fmt: skip
    for begin in (*range(0, len(ids), 10),) * 2:
        _, _, text, metadata, *_ = pipeline.run()
        for row, i in enumerate(ids[begin : begin + 10]):
            assert text.at(row).tobytes().decode().splitlines() == make_captions(int(i))
            assert metadata.at(row).tobytes() == b'{"number":%d}' % i
