"""The image decoder of builds, and the perceptual hash."""

import io

import numpy as np
import pytest
from PIL import Image

from mvlm_dataloading.build.duplicates import MAX_DISTANCE
from mvlm_dataloading.build.image_check import TOO_MANY_PIXELS, UNDECODABLE, ImageDecoder, perceptual_hash
from support import published


def test_decoder_keeps_the_high_byte_of_16_bit_images():
    levels = np.tile(np.arange(0, 65536, 1024, dtype=np.uint16)[:, None], (1, 64))
    (pixels,) = ImageDecoder(1 << 20)([published.encoded(Image.fromarray(levels), "PNG")])
    assert not isinstance(pixels, str)
    assert np.abs(pixels.astype(int) - (levels / 257)[..., None]).max() <= 1


def test_decoder_checks_sizes_by_itself():
    """Its parser may read a header differently from Pillow."""
    kinds = [((40, 30), "PNG"), ((41, 30), "PNG"), ((40, 30), "JPEG"), ((60, 30), "WEBP"), ((30, 40), "WEBP")]
    images = [published.encoded(published.make_image(i, size), kind) for i, (size, kind) in enumerate(kinds)]
    found = list(ImageDecoder(1200)([*images, b"", b"noise"]))
    shapes = [one if isinstance(one, str) else one.shape for one in found]
    large = TOO_MANY_PIXELS
    assert shapes == [(30, 40, 3), large, (30, 40, 3), large, (40, 30, 3), UNDECODABLE, UNDECODABLE]


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
