"""The perceptual hash."""

import io

import numpy as np
import pytest
from PIL import Image

from mvlm_dataloading.build.duplicates import MAX_DISTANCE
from mvlm_dataloading.build.image_check import perceptual_hash
from support import published


@pytest.mark.slow
def test_perceptual_hash_survives_scaling_and_compression():
    distances, strangers = [], []
    hashes = []
    for i in range(60):
        image = published.make_image(i, (300, 225))
        own = perceptual_hash(np.asarray(image))
        assert own is not None
        hashes.append(own)
        for changed in (
            image.resize((100, 75)),
            Image.open(io.BytesIO(published.encoded(image))),
            Image.fromarray(np.minimum(np.asarray(image).astype(int) + 10, 255).astype(np.uint8)),
            image.convert("L").convert("RGB"),
        ):
            other = perceptual_hash(np.asarray(changed))
            assert other is not None
            distances.append((own ^ other).bit_count())
    for i in range(60):
        strangers += [(hashes[i] ^ hashes[j]).bit_count() for j in range(i)]
    assert np.mean(np.array(distances) <= MAX_DISTANCE) > 0.97
    assert min(strangers) > 2 * MAX_DISTANCE
    assert perceptual_hash(np.full((50, 50, 3), 7, np.uint8)) is None
