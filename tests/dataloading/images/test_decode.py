"""Limits of images, whole images with the pixels of Pillow, and what is not whole."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from mvlm_dataloading.images.colours import BAND
from mvlm_dataloading.images.decode import check_image, decode
from mvlm_dataloading.images.headers import read_image_header
from mvlm_dataloading.images.limits import MAX_BLOCKS, MAX_SCANS, ImageLimits, ImageRefusedError
from support.hostile_images import animated_gif, chunk, directory, encoded, jpeg, peak_memory, png, reset_peak, segment

LIMITS = ImageLimits()


def noise(width: int, height: int, channels: int = 3) -> Image.Image:
    shape = (height, width) if channels == 1 else (height, width, channels)
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, shape, np.uint8))


def kind_of(content: bytes | Image.Image, limits: ImageLimits = LIMITS) -> str:
    """The kind of the refusal."""
    with pytest.raises(ImageRefusedError) as refused:
        decode(content, limits)
    return refused.value.kind


SAMPLES = {
    "png": lambda image: encoded(image, "PNG"),
    "jpeg": lambda image: encoded(image, "JPEG"),
    "progressive": lambda image: encoded(image, "JPEG", progressive=True),
    "webp": lambda image: encoded(image, "WEBP"),
    "lossless webp": lambda image: encoded(image, "WEBP", lossless=True),
    "webp with alpha": lambda image: encoded(image.convert("RGBA"), "WEBP", exact=True),
    "gif": lambda image: encoded(image, "GIF"),
    "bmp": lambda image: encoded(image, "BMP"),
    "tiff": lambda image: encoded(image, "TIFF"),
    "big tiff": lambda image: encoded(image, "TIFF", big_tiff=True),
    "lzw tiff": lambda image: encoded(image, "TIFF", compression="tiff_lzw"),
}


@pytest.mark.parametrize("name", SAMPLES)
def test_a_header_states_the_size_that_pillow_reads(name: str) -> None:
    for size in ((40, 30), (1, 1), (1, 33), (300, 7)):
        content = SAMPLES[name](noise(*size))
        header = read_image_header(content)
        with Image.open(io.BytesIO(content)) as opened:
            assert (header.kind, header.width, header.height) == (opened.format, *opened.size)
        for end in range(0, min(60, len(content) // 2), 5):  # no error but ours
            with pytest.raises(ImageRefusedError):
                decode(content[:end], LIMITS)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_bands_have_the_pixels_of_a_whole_image(mode: str, orientation: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against Pillow's transposition, and its alpha composition of the whole image."""
    monkeypatch.setattr("mvlm_dataloading.images.colours.BAND", 200)  # of 7 or 10 rows
    image = noise(29, 20, 4)
    if mode == "I;16":
        image = Image.fromarray(np.random.default_rng(0).integers(0, 65536, (20, 29), np.uint16))
    image = image.convert("RGB").quantize(9) if mode == "P" else image.convert(mode)
    exif = Image.Exif()
    exif[0x0112] = orientation
    rows = decode(encoded(image, "TIFF" if mode == "CMYK" else "PNG", exif=exif), LIMITS)
    turned = (
        ImageOps.exif_transpose(Image.open(io.BytesIO(encoded(image, "PNG", exif=exif)))) if mode != "CMYK" else None
    )
    if turned is None:
        image.info["exif"] = exif.tobytes()
        turned = ImageOps.exif_transpose(image)
    if mode == "I;16":
        wanted = np.repeat((np.asarray(turned) >> 8).astype(np.uint8)[..., None], 3, 2)
    elif mode in ("LA", "RGBA"):
        whole = turned.convert("RGBA")
        wanted = np.asarray(Image.alpha_composite(Image.new("RGBA", whole.size, "white"), whole).convert("RGB"))
    else:
        wanted = np.asarray(turned.convert("RGB"))
    assert len(list(rows.bands())) > 1
    assert np.array_equal(rows.pixels(), wanted)
    assert np.array_equal(np.asarray(rows.image()), wanted)


def test_only_the_six_formats_are_opened() -> None:
    assert kind_of(encoded(noise(8, 8), "PPM")) == "format"
    for content in (b"%!PS-Adobe-3.0 EPSF-3.0\n", b"<svg/>", b"RIFF\0\0\0\0WAVEfmt ", b"\0\0\1\0\1\0"):
        assert kind_of(content) == "format"
    assert kind_of(b"") == "empty"


def test_pixels_sides_and_memory_are_limited_by_the_header() -> None:
    assert kind_of(png(12_000, 12_000, 0)) == "pixels"
    assert kind_of(png(65_501, 2, 2, 1, 0)) == "side"
    assert kind_of(png(2, 65_501, 65_501, 1, 0)) == "side"
    assert kind_of(png(6300, 6300, 6300), ImageLimits(max_memory=150_000_000)) == "memory"
    assert decode(png(6300, 6300, 6300, 1, 0), LIMITS).height == 6300  # a byte a pixel
    with pytest.raises(ImageRefusedError, match="found 100 x 100 pixels that take 1 MB"):
        check_image(png(100, 100, 100), ImageLimits(max_memory=1_000_000), further=10_000)
    assert kind_of(noise(100, 100), ImageLimits(max_pixels=9_999)) == "pixels"


@pytest.mark.slow
def test_a_jpeg_beyond_the_memory_is_decoded_at_a_part_of_its_sides() -> None:
    small = noise(40, 30).resize((1601, 1200), Image.Resampling.BICUBIC)
    content = encoded(small, "JPEG", quality=95)
    whole = np.asarray(Image.open(io.BytesIO(content)), float)
    for most, part in ((8_000_000, 1), (7_000_000, 2), (1_000_000, 4), (200_000, 8)):
        limits = ImageLimits(max_memory=most)
        header = check_image(content, limits, may_shrink=True)
        assert header.part == part
        rows = decode(content, limits, may_shrink=True)
        assert (rows.width, rows.height) == (-(-1601 // part), -(-1200 // part))
        means = whole[: 1200 // part * part, : 1601 // part * part]
        means = means.reshape(1200 // part, part, 1601 // part, part, 3).mean((1, 3))
        assert np.abs(rows.pixels()[: len(means), : means.shape[1]] - means).mean() < 2
    assert kind_of(content, ImageLimits(max_memory=7_000_000)) == "memory"
    with pytest.raises(ImageRefusedError, match="memory"):
        check_image(content, ImageLimits(max_memory=100_000), may_shrink=True)
    progressive = encoded(small, "JPEG", progressive=True, subsampling=0)  # its coefficients stay: 6 bytes a pixel
    with pytest.raises(ImageRefusedError, match="memory"):
        check_image(progressive, ImageLimits(max_memory=11_000_000), may_shrink=True)


def test_blocks_and_scans_are_limited() -> None:
    def chunks(number: int) -> bytes:
        return png(8, 8, 8, more=chunk(b"prVt", b"x") * number)

    assert decode(chunks(MAX_BLOCKS - 1), LIMITS).height == 8
    assert kind_of(chunks(MAX_BLOCKS)) == "blocks"
    assert kind_of(png(8, 8, 8, more=chunk(b"IDAT", b"") * 200_000)) == "blocks"
    assert kind_of(jpeg(16, 16, segment(0xFE, b"x") * 2000)) == "blocks"
    assert kind_of(jpeg(16, 16, scans=MAX_SCANS)) == "blocks"
    assert read_image_header(jpeg(16, 16, scans=MAX_SCANS - 20)).width == 16
    with pytest.raises(ImageRefusedError, match="at most 41 scans"):
        read_image_header(jpeg(4900, 4900, scans=MAX_SCANS - 20))
    webp = encoded(noise(8, 8), "WEBP")
    assert kind_of(webp + b"prVt\2\0\0\0xx" * 2000) == "blocks"
    assert kind_of(b"GIF89a\1\0\1\0\0\0\0" + b"\x21\xfe\1a\0" * 2000 + b";") == "blocks"
    shared = directory(500, 60_000)
    assert kind_of(shared) == "blocks"
    assert kind_of(png(8, 8, 8, more=chunk(b"eXIf", shared))) == "blocks"
    assert kind_of(jpeg(16, 16, segment(0xE1, b"Exif\0\0" + directory(400, 50_000)))) == "blocks"
    assert kind_of(webp + b"EXIF" + struct.pack("<I", len(shared)) + shared) == "blocks"
    runs = encoded(noise(8, 8, 1), "BMP")
    assert kind_of(runs[:30] + b"\1" + runs[31:] + bytes(5_000_000)) == "bytes"


def test_a_png_with_missing_rows_is_refused() -> None:
    for colour in (0, 2, 4, 6):
        assert decode(png(100, 50, 50, colour=colour), LIMITS).height == 50  # all black, and whole
        assert decode(png(100, 50, 50, colour=colour, value=b"\x40"), LIMITS).height == 50
        for rows in (0, 1, 49):
            assert kind_of(png(100, 50, rows, colour=colour, value=b"\x40")) == "damaged"
    passes = ((13, 7), (12, 7), (25, 6), (25, 13), (50, 12), (50, 25), (100, 25))  # columns and rows, interlaced
    row_bytes = [rows * (1 + columns) for columns, rows in passes]
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 100, 50, 8, 0, 0, 0, 1))
    for missing in (0, 101):
        data = zlib.compress(bytes(sum(row_bytes) - missing))
        content = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", data) + chunk(b"IEND", b"")
        if missing:
            assert kind_of(content) == "damaged"
        else:
            assert decode(content, LIMITS).height == 50


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "TIFF"])
def test_truncated_data_are_refused(kind: str) -> None:
    content = encoded(noise(90, 60), kind)
    for end in (len(content) // 2, len(content) * 9 // 10):
        assert kind_of(content[:end]) == "damaged"


def test_the_first_frame_alone_is_decoded() -> None:
    frames = [Image.new("RGB", (30, 20), colour) for colour in ("red", "blue", "green")]
    for kind in ("GIF", "WEBP", "TIFF", "PNG"):
        content = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
        assert np.abs(decode(content, LIMITS).pixels().astype(int) - (255, 0, 0)).max() <= 2
    assert decode(animated_gif(5_000).replace(b"\xff" * 4, b"\1\0\1\0", 1), LIMITS).height == 1


def test_lying_headers_are_refused() -> None:
    webp = encoded(noise(64, 64), "WEBP")
    extended = webp[:12] + b"VP8X\x0a\0\0\0" + bytes(4) + b"\x10\0\0" * 2 + webp[12:]
    assert kind_of(extended) == "damaged"
    image = encoded(noise(64, 64), "JPEG")
    at = image.index(b"\xff\xc0")
    end = at + 2 + int.from_bytes(image[at + 2 : at + 4], "big")
    assert kind_of(image[:end] + image[at:]) == "damaged"  # two headers
    assert kind_of(png(0, 8, 8)) == "damaged"
    twice = png(8, 8, 8, more=chunk(b"IHDR", struct.pack(">IIBBBBB", 9, 9, 8, 2, 0, 0, 0)))
    assert kind_of(twice) == "damaged"


def test_malformed_exif_data_are_left_out() -> None:
    for data in (b"II*\0\xff\xff\xff\xff", b"II", b"nothing", b"MM\0*\0\0\0\x08\xff\xff"):
        content = png(8, 8, 8, more=chunk(b"eXIf", data))
        assert decode(content, LIMITS).height == 8


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, options",
    [
        ("PNG", {}), ("JPEG", {}), ("JPEG", {"progressive": True, "subsampling": 0}), ("WEBP", {"method": 0}),
        ("WEBP", {"lossless": True, "method": 0}), ("TIFF", {"compression": "tiff_lzw", "strip_size": 1 << 30}),
        ("TIFF", {"tiffinfo": {274: 6}}), ("GIF", {}), ("BMP", {}),
    ],
)  # fmt: skip
def test_decoding_takes_no_more_memory_than_the_header_says(kind: str, options: dict) -> None:
    side = 2500
    content = encoded(noise(side // 5, side // 5).resize((side, side), Image.Resampling.NEAREST), kind, **options)
    stated = read_image_header(content).memory()
    before = reset_peak()
    rows = decode(content, LIMITS)
    assert sum(rows.rows(*band).nbytes for band in rows.bands()) == 3 * side**2
    assert peak_memory() - before < stated + 24 * BAND
