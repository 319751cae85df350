"""Whether a picture can be used, decided by the decoder that training uses; and what it looks like.

Shape legend: H and W of the picture as shown, that is with its EXIF orientation applied, as the loader applies it.
"""

import functools
import io
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mvlm_dataloading.errors import need

# MPO is what cameras call a JPEG with further pictures behind it; decoders take the first.
EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
UNDECODABLE = "image cannot be decoded"
TOO_MANY_PIXELS = "image has too many pixels"

_BATCH = 32
_BATCH_PIXELS = 1 << 24  # decoded together, so that a batch takes some 50 MB
_FLAT = 2.0  # standard deviation in levels of 255, below which a picture has nothing to be recognised by


@dataclass(frozen=True, slots=True)
class Header:
    """What the first bytes of a picture say. Width and height as stored, before any rotation."""

    extension: str
    width: int
    height: int


def read_header(image: bytes) -> Header | str:
    """The header of a picture, or the reason why it cannot be used. Nothing is decoded."""
    pil = need("PIL.Image")
    try:
        with warnings.catch_warnings():
            # Pillow warns of a picture with very many pixels, before it spends the memory: for us that is a refusal.
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", pil.DecompressionBombWarning)
            with pil.open(io.BytesIO(image)) as picture:
                if picture.format not in EXTENSIONS:
                    return f"image format is {picture.format}, not JPEG, PNG or WebP"
                return Header(EXTENSIONS[picture.format], *picture.size)
    except (pil.DecompressionBombWarning, pil.DecompressionBombError):
        return TOO_MANY_PIXELS
    except Exception:  # Pillow's parsers raise nearly anything on damaged input
        return UNDECODABLE


class Decoder:
    """DALI's CPU decoder, called on pictures in memory: the verdict on a picture is the loader's.

    Its parser may read a header in another way than Pillow does, so the sizes that it is going to allocate are asked
    for first, and a picture of more than `max_pixels` is not decoded.
    """

    def __init__(self, max_pixels: int) -> None:
        self._max_pixels = max_pixels
        self._built: dict[bool, Any] = {}

    def __call__(self, images: Sequence[bytes]) -> Iterator[NDArray[np.uint8] | str]:
        """For each picture uint8 (H, W, 3), RGB, or the reason why it cannot be used, in order."""
        shapes = self._attempt(images, decode=False)
        begin = 0
        while begin < len(images):
            group, pixels = [], 0
            for shape in shapes[begin : begin + _BATCH]:
                area = 0 if shape is None else int(shape[0]) * int(shape[1])
                usable = shape is not None and area <= self._max_pixels
                if group and usable and pixels + area > _BATCH_PIXELS:
                    break
                pixels += area if usable else 0
                group.append(usable)
            rows = range(begin, begin + len(group))
            decoded = iter(self._attempt([images[i] for i, usable in zip(rows, group, strict=True) if usable], True))
            for i, usable in zip(rows, group, strict=True):
                result = next(decoded) if usable else None
                if result is not None:
                    yield result
                else:
                    yield UNDECODABLE if usable or shapes[i] is None else TOO_MANY_PIXELS
            begin += len(group)

    def _attempt(self, images: Sequence[bytes], decode: bool) -> list[NDArray[Any] | None]:
        """What the pipeline makes of each picture, None where it fails: by halving, as it does not say which failed."""
        if not images:
            return []
        if len(images) > _BATCH:
            half = _BATCH
        else:
            try:
                return self._run(images, decode)
            except RuntimeError:
                self._built.pop(decode, None)  # it cannot be used again
            if len(images) == 1:
                return [None]
            half = len(images) // 2
        return self._attempt(images[:half], decode) + self._attempt(images[half:], decode)

    def _run(self, images: Sequence[bytes], decode: bool) -> list[NDArray[Any] | None]:
        if not all(images):
            raise RuntimeError("an empty picture")
        if decode not in self._built:
            self._built[decode] = _pipeline(decode)
        pipeline = self._built[decode]
        pipeline.feed_input("encoded", [np.frombuffer(image, np.uint8) for image in images])
        (found,) = pipeline.run()
        return [np.array(found.at(i)) for i in range(len(images))]


def _pipeline(decode: bool) -> Any:
    fn, types = need("nvidia.dali.fn"), need("nvidia.dali.types")
    pipeline = need("nvidia.dali.pipeline").Pipeline(
        batch_size=_BATCH,
        num_threads=1,
        device_id=None,
        prefetch_queue_depth=1,
        exec_async=False,
        exec_pipelined=False,
        seed=0,
    )
    with pipeline:
        encoded = fn.external_source(name="encoded", batch=True, dtype=types.DALIDataType.UINT8, ndim=1)
        shape = fn.peek_image_shape(encoded)
        if decode:
            # As the loader does, which decodes windows: the header first, and then the window, here all of it.
            size = fn.cast(fn.slice(shape, 0, 2, axes=[0]), dtype=types.DALIDataType.INT32)
            output = fn.decoders.image_slice(
                encoded, start=size * 0, shape=size, axes=[0, 1], device="cpu", output_type=types.DALIImageType.RGB
            )
        else:
            output = shape
        pipeline.set_outputs(output)
    pipeline.build()
    return pipeline


def encode_jpeg(pixels: NDArray[np.uint8], short_side: int | None, quality: int) -> bytes:
    """A JPEG of uint8 (H, W, 3), made smaller until its short side is `short_side`, and never larger."""
    pil = need("PIL.Image")
    picture = pil.fromarray(pixels)
    if short_side is not None and min(picture.size) > short_side:
        scale = short_side / min(picture.size)
        size = tuple(max(short_side, round(side * scale)) for side in picture.size)
        picture = picture.resize(size, pil.Resampling.BICUBIC, reducing_gap=3.0)
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=quality)
    return file.getvalue()


def perceptual_hash(pixels: NDArray[np.uint8]) -> int | None:
    """64 bits that stay nearly the same when a picture uint8 (H, W, 3) is scaled or compressed again.

    The grey picture, 32 x 32, in a DCT-II: for each of the 64 lowest frequencies but the constant, whether its
    coefficient is above their median (after Zauner, Implementation and Benchmarking of Perceptual Image Hash Functions,
    2010). None for a picture that is flat: all those would be alike.
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
