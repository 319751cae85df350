"""Checks of the images of a build, re-encoding, and the perceptual hash.

Shape legend: H and W of the image after its EXIF orientation is applied, as the loader applies it.
"""

import functools
import io
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mvlm_dataloading.errors import MissingPackageError, need
from mvlm_dataloading.images.decode import check_image, decode, read_image_file
from mvlm_dataloading.images.limits import (
    EMPTY,
    TOO_LARGE,
    UNDECODABLE,
    ImageLimits,
    ImageRefusedError,
    limits_of_build,
)
from mvlm_dataloading.options import BuildOptions, ViewOptions

# MPO, written by cameras, is a JPEG followed by further images. Decoders take the first one.
EXTENSIONS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
_FLAT = 2.0  # standard deviation in levels of 255 below which an image is too flat for a hash


@dataclass(frozen=True, slots=True)
class StoredHeader:
    """Format and size of an image that a build can store. Width and height are as stored, before EXIF rotation."""

    extension: str
    width: int
    height: int
    has_alpha: bool
    """True if pixels may be transparent."""


def read_image(image: Path | bytes, max_bytes: int) -> bytes | str:
    """The encoded image in bytes or in a regular file, or the reason for which it cannot be used."""
    try:
        content = image if isinstance(image, bytes) else read_image_file(image, max_bytes)
    except ImageRefusedError as refused:
        return refused.reason
    return TOO_LARGE if len(content) > max_bytes else content or EMPTY


def read_header(image: bytes, limits: ImageLimits | None = None) -> StoredHeader | str:
    """Read the header of an image, without decoding. Returns the reason as text if the image cannot be used."""
    try:
        header = check_image(image, limits or limits_of_build())
    except ImageRefusedError as refused:
        return UNDECODABLE if refused.kind == "empty" else refused.reason
    if header.kind not in EXTENSIONS:
        return f"image format is {header.kind}, not JPEG, PNG or WebP"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of bombs, which the limits judge, and of damaged metadata
            with need("PIL.Image").open(io.BytesIO(image), formats=(header.kind,)) as opened:
                width, height = opened.size
                return StoredHeader(EXTENSIONS[header.kind], width, height, opened.has_transparency_data)
    except MissingPackageError:
        raise
    except Exception:  # Pillow's parsers raise nearly anything on damaged input
        return UNDECODABLE


def check_header(image: bytes, options: BuildOptions) -> StoredHeader | str:
    """Read the header of an image, or return the reason for which the build's options exclude the image."""
    header = read_header(image, limits_of_build(options.max_pixels, options.max_image_bytes))
    return header if isinstance(header, str) else size_fault(header.width, header.height, options) or header


def size_fault(width: int, height: int, options: BuildOptions | ViewOptions) -> str | None:
    """Reason to reject an image of these sides in pixels, in any order; None if the options allow them."""
    short, long = sorted((width, height))
    if short < options.min_side:
        return "image is too small"
    if long > options.max_aspect * short:
        return "image is too long and thin"
    return UNDECODABLE if short < 1 else None


def prepare_image(image: bytes) -> tuple[bytes, str] | str:
    """Decode an image completely with Pillow.

    Returns the file to store and its extension, or the reason for its rejection. A transparent image is stored on
    white, as a PNG. Any other file is stored unchanged, except that the EXIF data of a WebP are moved to its front
    (`exif_first`).
    """
    header = read_header(image)
    if not isinstance(header, StoredHeader):
        return header
    white = on_white(image)
    if isinstance(white, str):
        return white
    return (exif_first(image), header.extension) if white is None else (encode_png(white), "png")


def exif_first(image: bytes) -> bytes:
    """A WebP with its EXIF data before the image, where DALI can read them. Any other image as it is.

    A chunk of odd length is followed by a byte that DALI's parser does not skip when it looks for the EXIF data behind
    it. Then it refuses the file. The format allows EXIF data anywhere behind the first chunk.
    """
    if image[:4] != b"RIFF" or image[8:20] != b"WEBPVP8X\x0a\0\0\0":  # only such a WebP has EXIF data
        return image
    at = first = 30
    odd = False
    while at + 8 <= len(image):
        size = int.from_bytes(image[at + 4 : at + 8], "little")
        end = at + 8 + size + size % 2
        if image[at : at + 4] == b"EXIF":
            movable = odd and end <= len(image)
            return image[:first] + image[at:end] + image[first:at] + image[end:] if movable else image
        odd = odd or size % 2 == 1
        at = end
    return image


def on_white(image: bytes) -> NDArray[np.uint8] | str | None:
    """Pixels of a transparent image on white, uint8 (H, W, 3). None for an opaque one, or the reason as text.

    DALI takes the colours that a file has below its transparent areas, which are often black or noise. Inference puts
    such images on white too.
    """
    try:
        rows = decode(image, limits_of_build())
        return rows.pixels() if rows.is_transparent() else None
    except ImageRefusedError:
        return UNDECODABLE


MAX_JPEG_SIDE = 65_500
"""Longest side in pixels that libjpeg encodes."""


def is_too_long_for_jpeg(pixels: NDArray[np.uint8], options: BuildOptions) -> bool:
    """True for an image that is to be stored as a JPEG and has a longer side than a JPEG can have."""
    sides = pixels.shape[:2]
    short = min(sides) if options.short_side is None else min(min(sides), options.short_side)
    encoded = options.quality is not None or short < min(sides)
    return encoded and max(sides) * short / min(sides) > MAX_JPEG_SIDE


def encode_jpeg(pixels: NDArray[np.uint8], short_side: int | None, quality: int) -> bytes:
    """Encode uint8 (H, W, 3) as a JPEG, downscaled to `short_side` if its short side is longer."""
    pil = need("PIL.Image")
    image = pil.fromarray(pixels)
    if short_side is not None and min(image.size) > short_side:
        scale = short_side / min(image.size)
        size = tuple(max(short_side, round(side * scale)) for side in image.size)
        image = image.resize(size, pil.Resampling.BICUBIC, reducing_gap=3.0)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return file.getvalue()


def encode_png(pixels: NDArray[np.uint8]) -> bytes:
    """Encode uint8 (H, W, 3) as a PNG."""
    file = io.BytesIO()
    need("PIL.Image").fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def perceptual_hash(pixels: NDArray[np.uint8]) -> int | None:
    """Perceptual hash of an image, uint8 (H, W, 3): 64 bits that hardly change under scaling and compression.

    The image is reduced to grey, 32 x 32, and transformed by a DCT-II. Each of the 64 lowest frequencies, without the
    constant, gives a bit: 1 if its coefficient is above their median (after Zauner, Implementation and Benchmarking of
    Perceptual Image Hash Functions, 2010). None for a flat image, because all flat images would have similar hashes.
    """
    pil = need("PIL.Image")
    grey = pil.fromarray(pixels).convert("L").resize((32, 32), pil.Resampling.BOX, reducing_gap=3.0)
    levels = np.asarray(grey, np.float64)
    if levels.std() < _FLAT:
        return None
    cosines, rows, columns = _frequencies()
    low = (cosines @ levels @ cosines.T)[rows, columns]  # (64,)
    bits = low > np.median(low)
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


@functools.cache
def _frequencies() -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.int64]]:
    k = np.arange(32)
    cosines = np.cos(np.pi * k[:, None] * (2 * k[None, :] + 1) / 64)
    order = sorted(((u, v) for u in k.tolist() for v in k.tolist()), key=lambda uv: (sum(uv), uv[0]))[1:65]
    rows, columns = np.array(order).T
    return cosines, rows, columns
