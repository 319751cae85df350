"""Rendering of SVG drawings, and pieces of drawings that are rendered as they are read."""

import io
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any
from xml.etree import ElementTree

from mvlm_dataloading.errors import need

from .record import ListedPiece, Record

_FAINT = 16
"""Alpha (of 255) from which a pixel belongs to a cut-out."""


def render_svg(svg: str, size: int) -> bytes:
    """Render an SVG as a square PNG of `size` pixels: the drawing as large as fits, centred on white.

    Raises:
        ValueError: resvg cannot read it, it refers to a file, or it is blank.
        ImportError: a package of the extra `demo` is missing.
    """
    resvg, pil = need("resvg_py", "demo"), need("PIL.Image")
    refuse_files(svg)
    rendered = resvg.svg_to_bytes(
        svg_string=svg,
        width=size,
        height=size,
        background="#ffffff",
        skip_system_fonts=True,
        dpi=96,  # without it, sizes in pt and mm are errors
    )
    image = pil.open(io.BytesIO(rendered)).convert("RGB")
    if need("PIL.ImageChops").invert(image).getbbox() is None:
        raise ValueError("the drawing is blank")
    if image.size != (size, size):
        canvas = pil.new("RGB", (size, size), "white")
        canvas.paste(image, ((size - image.width) // 2, (size - image.height) // 2))
        image = canvas
    return _png(image)


def refuse_files(svg: str) -> None:
    """ValueError for a drawing that shows an image from a file: resvg would read any file that the drawing names."""
    try:
        root = ElementTree.fromstring(svg)
    except ElementTree.ParseError as error:
        raise ValueError(f"wanted an SVG, got {error}") from None
    for element in root.iter():
        if isinstance(element.tag, str) and element.tag.rpartition("}")[2] in ("image", "feImage"):
            for name, target in element.attrib.items():
                if name.rpartition("}")[2] == "href" and not target.lstrip().startswith(("data:", "#")):
                    raise ValueError(f"the drawing shows an image from a file, {target!r}, which is not read")


def render_cutout(svg: str, size: int) -> bytes:
    """Render an SVG as a PNG with transparency, without margins, its longer side at most `size` pixels.

    Raises:
        ValueError: it refers to a file, or it is blank.
    """
    resvg, pil = need("resvg_py", "demo"), need("PIL.Image")
    refuse_files(svg)
    png = resvg.svg_to_bytes(svg_string=svg, width=2 * size, height=2 * size, skip_system_fonts=True)
    image = pil.open(io.BytesIO(png)).convert("RGBA")
    box = image.getchannel("A").point(lambda alpha: 255 * (alpha >= _FAINT)).getbbox()
    if box is None:
        raise ValueError("the drawing is blank")
    cropped = image.crop(box)
    scale = min(1.0, size / max(cropped.size))
    return _png(cropped.resize([max(1, round(side * scale)) for side in cropped.size], pil.Resampling.LANCZOS))


def _png(image: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


@dataclass(frozen=True, slots=True)
class RenderedPiece(ListedPiece):
    """A piece whose records hold drawings. Reading renders them as square images of `size` pixels."""

    size: int

    def records(self, max_bytes: int) -> Iterator[Record]:
        for record in self.listed:
            assert isinstance(record.image, bytes)
            try:
                yield replace(record, image=render_svg(record.image.decode(), self.size))
            except (ValueError, OSError):
                yield replace(record, image=None, fault="drawing is blank or cannot be rendered")
