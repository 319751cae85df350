"""Strips: several images side by side as one image, for questions about a pair or a row of images.

Shape legend: S side of an image in a strip, n images.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mvlm_dataloading.errors import DataError, need
from mvlm_dataloading.images.decode import decode
from mvlm_dataloading.images.limits import ImageLimits

LIMITS = ImageLimits()
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

    def compose(self, contents: Sequence[bytes], limits: ImageLimits = LIMITS) -> bytes:
        """Encode the strip from the contents of its files. Images are turned as their EXIF data say.

        Raises:
            DataError: an image is beyond the limits, is damaged, or has no such part.
        """
        pil = need("PIL.Image")
        strip = pil.new("RGB", (self.side * len(contents), self.side))
        for place, content in enumerate(contents):
            image = decode(content, limits).image()
            if self.boxes:
                right, lower = self.boxes[place][2:]
                if right > image.width or lower > image.height:  # Pillow would fill the rest with black
                    size = f"{image.width} x {image.height}"
                    raise DataError(f"wanted an image with the part {self.boxes[place]}, found one of {size}")
                image = image.crop(self.boxes[place])
            if image.size != (self.side, self.side):
                image = image.resize((self.side, self.side), pil.Resampling.BICUBIC, reducing_gap=3.0)
            strip.paste(image, (place * self.side, 0))
        file = io.BytesIO()
        strip.save(file, self.kind, quality=90)
        return file.getvalue()
