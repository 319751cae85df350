"""DALI's decoder for images in memory."""

import numpy as np
from PIL import Image

from mvlm_dataloading.images.dali_decoder import ImageDecoder
from mvlm_dataloading.images.limits import TOO_MANY_PIXELS, UNDECODABLE
from support import published


def test_decoder_keeps_the_high_byte_of_16_bit_images():
    levels = np.tile(np.arange(0, 65536, 1024, dtype=np.uint16)[:, None], (1, 64))
    (pixels,) = ImageDecoder(1 << 20)([published.encoded(Image.fromarray(levels), "PNG")])
    assert not isinstance(pixels, str)
    assert np.abs(pixels.astype(int) - (levels / 257)[..., None]).max() <= 1


def test_decoder_checks_sizes_by_itself():
    """DALI's parser may read a header differently from Pillow."""
    kinds = [((40, 30), "PNG"), ((41, 30), "PNG"), ((40, 30), "JPEG"), ((60, 30), "WEBP"), ((30, 40), "WEBP")]
    images = [published.encoded(published.make_image(i, size), kind) for i, (size, kind) in enumerate(kinds)]
    found = list(ImageDecoder(1200)([*images, b"", b"noise"]))
    shapes = [one if isinstance(one, str) else one.shape for one in found]
    large = TOO_MANY_PIXELS
    assert shapes == [(30, 40, 3), large, (30, 40, 3), large, (40, 30, 3), UNDECODABLE, UNDECODABLE]
