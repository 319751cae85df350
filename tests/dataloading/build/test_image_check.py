"""The image decoder of builds, and the perceptual hash."""

import io

import numpy as np
import pytest
from PIL import Image

from mvlm_dataloading.build.duplicates import MAX_DISTANCE
from mvlm_dataloading.build.image_check import TOO_MANY_PIXELS, UNDECODABLE, ImageDecoder, exif_first, perceptual_hash
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
def test_decoder_splits_long_batches_and_keeps_their_order():
    images = [
        published.encoded(published.make_image(i, (20 + i, 20)), "PNG")[: 200 if i % 9 == 4 else None]
        for i in range(75)
    ]
    found = list(ImageDecoder(1 << 20)(images))
    assert [one if isinstance(one, str) else one.shape[1] for one in found] == [
        UNDECODABLE if i % 9 == 4 else 20 + i for i in range(75)
    ]


def test_exif_data_of_a_webp_are_moved_only_where_it_is_whole():
    def chunk(kind: bytes, content: bytes) -> bytes:
        return kind + len(content).to_bytes(4, "little") + content + bytes(len(content) % 2)

    def webp(*chunks: bytes) -> bytes:
        body = b"WEBP" + b"".join(chunks)
        return b"RIFF" + len(body).to_bytes(4, "little") + body

    head, exif, more = chunk(b"VP8X", bytes(10)), chunk(b"EXIF", b"e"), chunk(b"XMP ", b"x")
    odd, even = chunk(b"VP8L", b"abc"), chunk(b"VP8L", b"ab")
    assert exif_first(webp(head, odd, exif, more) + b"tail") == webp(head, exif, odd, more) + b"tail"
    assert exif_first(webp(head, even, odd, even, exif)) == webp(head, exif, even, odd, even)
    whole = webp(head, odd, exif)
    for same in (
        webp(head, even, exif, more), webp(head, exif, odd), webp(head, odd), webp(odd, exif),
        webp(head, odd, chunk(b"XMP ", exif)), *(whole[:cut] for cut in range(len(whole))), b"noise",
    ):  # fmt: skip
        assert exif_first(same) == same


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
