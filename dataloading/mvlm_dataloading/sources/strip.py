"""Strips: several images side by side as one image, for questions about a pair or a row of images.

Shape legend: S side of an image in a strip, n images.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mvlm_dataloading.errors import need

Box = tuple[int, int, int, int]


@dataclass(frozen=True, slots=True)
class ImageStrip:
    """Images that become one image of height S and width n S. It is composed when the sample is written."""

    files: tuple[Path, ...]
    """File of each image. The same file may be named several times, with other boxes."""
    side: int
    """S in pixels. Each image, or its part in the box, is resized to S x S, whatever its shape."""
    boxes: tuple[Box, ...] = ()
    """Part of each image to take, (left, top, right, bottom) in pixels. Default: the whole images."""
    kind: str = "JPEG"
    """Format of the strip: JPEG, at quality 90, or PNG."""

    def compose(self, contents: Sequence[bytes]) -> bytes:
        """Encode the strip from the contents of its files. Images are turned as their EXIF data say.

        Raises:
            Exception: whatever Pillow raises on damaged images.
        """
        pil = need("PIL.Image")
        strip = pil.new("RGB", (self.side * len(contents), self.side))
        for place, content in enumerate(contents):
            with pil.open(io.BytesIO(content)) as opened:
                image = to_rgb(turn(opened))
            if self.boxes:
                right, lower = self.boxes[place][2:]
                if right > image.width or lower > image.height:  # Pillow would fill the rest with black
                    raise ValueError(f"an image of {image.width} x {image.height} has no part {self.boxes[place]}")
                image = image.crop(self.boxes[place])
            if image.size != (self.side, self.side):
                image = image.resize((self.side, self.side), pil.Resampling.BICUBIC, reducing_gap=3.0)
            strip.paste(image, (place * self.side, 0))
        file = io.BytesIO()
        strip.save(file, self.kind, quality=90)
        return file.getvalue()


def turn(image: Any) -> Any:
    """A PIL image, turned as its EXIF data say, if they can be read.

    Pillow's own function also writes the other EXIF data again, and fails on those that are malformed.
    """
    method = need("PIL.Image").Transpose
    turns = {
        2: method.FLIP_LEFT_RIGHT, 3: method.ROTATE_180, 4: method.FLIP_TOP_BOTTOM, 5: method.TRANSPOSE,
        6: method.ROTATE_270, 7: method.TRANSVERSE, 8: method.ROTATE_90,
    }  # fmt: skip
    image.load()  # a damaged image is an error here; after one below, Pillow would take it for black
    try:
        wanted = turns.get(image.getexif().get(0x0112))  # the tag Orientation
    except Exception:  # Pillow raises errors of many kinds
        wanted = None
    return image if wanted is None else image.transpose(wanted)


def to_rgb(image: Any) -> Any:
    """A PIL image in RGB. Transparent areas become white.

    Of 16 bits a value keeps the upper eight, as DALI decodes it, and floats from 0 to 1 are scaled. ValueError for
    other values beyond 255.
    """
    if not image.has_transparency_data:
        return _eight_bits(image).convert("RGB")
    rgba = _with_alpha(image)
    white = need("PIL.Image").new("RGBA", rgba.size, "white")
    return need("PIL.Image").alpha_composite(white, rgba).convert("RGB")


def is_transparent(image: Any) -> bool:
    """True for a PIL image with a pixel that is not opaque."""
    return image.has_transparency_data and _with_alpha(image).getchannel("A").getextrema()[0] < 255


def _with_alpha(image: Any) -> Any:
    if not image.mode.startswith("I;16"):
        return image.convert("RGBA")
    np = need("numpy")
    clear = np.asarray(image) == image.info["transparency"]  # one grey value
    rgba = _eight_bits(image).convert("RGBA")
    rgba.putalpha(need("PIL.Image").fromarray(np.where(clear, 0, 255).astype(np.uint8)))
    return rgba


def _eight_bits(image: Any) -> Any:
    """An image of 8 bits a value. Pillow would clip wider ones at 255.

    ValueError for integers beyond 16 bits and floats beyond 255.
    """
    if not image.mode.startswith(("I", "F")):
        return image
    np = need("numpy")
    values = np.asarray(image)
    low, high = float(values.min()), float(values.max())
    if image.mode == "F" and low >= 0 and high <= 1:
        values = np.rint(values * 255)
    elif image.mode.startswith("I;16") or (image.mode == "I" and low >= 0 and 255 < high < 2**16):
        values = values >> 8
    elif not (low >= 0 and high <= 255):
        raise ValueError(f"wanted values of 8 or 16 bits, or floats from 0 to 1, found {low:g} to {high:g}")
    return need("PIL.Image").fromarray(values.astype(np.uint8))
