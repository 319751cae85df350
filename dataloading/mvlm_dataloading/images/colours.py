"""PIL images turned as their EXIF data say, and in RGB on white, whole or in bands of rows.

Shape legend: H and W of an image after its turn, h rows of a band.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from mvlm_dataloading.errors import need

from .headers import check_directory
from .limits import ImageRefusedError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

BAND = 1 << 20
"""Number of pixels of a band of rows, which are converted at a time."""
_MOST_PROFILE = 1 << 17  # characters of EXIF data in a text of a PNG


def _turn_of(image: Any) -> Any:
    """Pillow's transposition that the EXIF data of a loaded image ask for, if they can be read, or None.

    Pillow's own function also writes the other EXIF data again, and fails on those that are malformed.
    """
    method = need("PIL.Image").Transpose
    turns = {
        2: method.FLIP_LEFT_RIGHT, 3: method.ROTATE_180, 4: method.FLIP_TOP_BOTTOM, 5: method.TRANSPOSE,
        6: method.ROTATE_270, 7: method.TRANSVERSE, 8: method.ROTATE_90,
    }  # fmt: skip
    try:
        profile = image.info.get("Raw profile type exif")
        if isinstance(profile, str) and len(profile) <= _MOST_PROFILE:
            check_directory(bytes.fromhex("".join(profile.split("\n")[3:])).removeprefix(b"Exif\0\0"))
        elif profile is not None:
            return None
        return turns.get(image.getexif().get(0x0112))  # the tag Orientation
    except Exception:  # Pillow raises errors of many kinds
        return None


class RgbRows:
    """Rows of a PIL image as RGB, turned as its EXIF data say, transparent areas white.

    A band is turned and converted when it is asked for, so no second image lies in memory.

    Args:
        image: any mode. It is loaded here.

    Raises:
        Exception: whatever Pillow raises on damaged images; ValueError for values of no known range.
    """

    def __init__(self, image: Any) -> None:
        image.load()  # a damaged image is an error here; later, Pillow would take it for black
        self._image, self._turn = image, _turn_of(image)
        method = need("PIL.Image").Transpose
        self._sideways = self._turn in (method.TRANSPOSE, method.ROTATE_270, method.TRANSVERSE, method.ROTATE_90)
        self._backwards = self._turn in (method.ROTATE_180, method.FLIP_TOP_BOTTOM, method.TRANSVERSE, method.ROTATE_90)
        width, height = image.size
        self.width, self.height = (height, width) if self._sideways else (width, height)
        self._range = None if image.mode not in ("I", "F") else self._extremes()

    def bands(self) -> Iterator[tuple[int, int]]:
        """Bounds of the bands of rows, from top to bottom: first row, and the row behind the last."""
        rows = max(1, BAND // self.width)
        return ((first, min(first + rows, self.height)) for first in range(0, self.height, rows))

    def rows(self, first: int, end: int) -> "NDArray[np.uint8]":
        """Rows `first` to `end` - 1, uint8 (h, W, 3)."""
        return need("numpy").asarray(to_rgb(self._band(first, end), self._range))

    def image(self) -> Any:
        """The whole image in Pillow's mode RGB."""
        if self._turn is None and self._image.mode == "RGB" and not self._image.has_transparency_data:
            return self._image
        whole = need("PIL.Image").new("RGB", (self.width, self.height))
        for first, end in self.bands():
            whole.paste(to_rgb(self._band(first, end), self._range), (0, first))
        return whole

    def pixels(self) -> "NDArray[np.uint8]":
        """The whole image, uint8 (H, W, 3)."""
        np = need("numpy")
        whole = np.empty((self.height, self.width, 3), np.uint8)
        for first, end in self.bands():
            whole[first:end] = self.rows(first, end)
        return whole

    def is_transparent(self) -> bool:
        return any(is_transparent(self._band(first, end)) for first, end in self.bands())

    def _band(self, first: int, end: int) -> Any:
        width, height = self._image.size
        along = width if self._sideways else height  # rows after the turn are columns of an image turned sideways
        low, high = (along - end, along - first) if self._backwards else (first, end)
        band = self._image.crop((low, 0, high, height) if self._sideways else (0, low, width, high))
        return band if self._turn is None else band.transpose(self._turn)

    def _extremes(self) -> tuple[float, float]:
        np = need("numpy")
        bands = (np.asarray(self._band(first, end)) for first, end in self.bands())
        found = np.array([(float(values.min()), float(values.max())) for values in bands])
        return float(found[:, 0].min()), float(found[:, 1].max())  # NaN stays NaN


def to_rgb(image: Any, extremes: tuple[float, float] | None = None) -> Any:
    """Convert a PIL image to RGB. Transparent areas become white.

    Of 16-bit values the upper eight bits are kept, as DALI does. Floats from 0 to 1 are scaled to 0 to 255. ValueError
    for other values beyond 255.

    Args:
        extremes: smallest and largest value of the whole image, if `image` is a band of it. Default: those of `image`.
    """
    if not image.has_transparency_data:
        eight = _eight_bits(image, extremes)
        return eight if eight.mode == "RGB" else eight.convert("RGB")
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


def _eight_bits(image: Any, extremes: tuple[float, float] | None = None) -> Any:
    """Convert a PIL image to 8 bits a value. Pillow's own conversion would clip wider values at 255.

    ValueError for integers beyond 16 bits and floats beyond 255. extremes: as for `to_rgb`.
    """
    if not image.mode.startswith(("I", "F")):
        return image
    np = need("numpy")
    values = np.asarray(image)
    low, high = extremes or (float(values.min()), float(values.max()))
    if image.mode == "F" and low >= 0 and high <= 1:
        values = np.rint(values * 255)
    elif image.mode.startswith("I;16") or (image.mode == "I" and low >= 0 and 255 < high < 2**16):
        values = values >> 8
    elif not (low >= 0 and high <= 255):
        raise ImageRefusedError(
            "damaged", f"wanted values of 8 or 16 bits, or floats from 0 to 1, found {low:g} to {high:g}; convert them"
        )
    return need("PIL.Image").fromarray(values.astype(np.uint8))
