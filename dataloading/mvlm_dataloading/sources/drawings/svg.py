"""Rendering of SVG drawings, and pieces of drawings that are rendered as they are read."""

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from xml.etree import ElementTree

from mvlm_dataloading.errors import need
from mvlm_dataloading.images.decode import check_image
from mvlm_dataloading.images.limits import ImageLimits
from mvlm_dataloading.sources.record import Piece, Record

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
    png = io.BytesIO()
    image.save(png, "PNG")
    return png.getvalue()


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
    """Render an SVG as a PNG with transparency, without margins, its longer side `size` pixels."""
    resvg = need("resvg_py", "demo")
    refuse_files(svg)
    return cut_out(resvg.svg_to_bytes(svg_string=svg, width=2 * size, height=2 * size, skip_system_fonts=True), size)


def cut_out(image: bytes, size: int) -> bytes:
    """The part of an image that is not transparent, its longer side at most `size` pixels, as a PNG.

    Raises:
        ValueError: all of it is transparent, or it is no image within the limits.
    """
    pil = need("PIL.Image")
    header = check_image(image, ImageLimits())
    opened = pil.open(io.BytesIO(image), formats=(header.kind,)).convert("RGBA")
    box = opened.getchannel("A").point(lambda alpha: 255 * (alpha >= _FAINT)).getbbox()
    if box is None:
        raise ValueError("the image is blank")
    cropped = opened.crop(box)
    scale = min(1.0, size / max(cropped.size))
    cropped = cropped.resize([max(1, round(side * scale)) for side in cropped.size], pil.Resampling.LANCZOS)
    png = io.BytesIO()
    cropped.save(png, "PNG")
    return png.getvalue()


PIECE_DRAWINGS = 256


@dataclass(frozen=True, slots=True)
class RenderedPiece:
    """A piece whose records hold drawings. Reading renders them."""

    split: str
    listed: Sequence[Record]
    size: int
    """Side of the square images in pixels."""
    render: Callable[[bytes, int], bytes]
    """Renders a drawing at a size as a PNG. ValueError or OSError for one that is blank or cannot be read."""

    @property
    def label(self) -> str:
        return f"{self.split} {len(self.listed)} from {self.listed[0].key} to {self.listed[-1].key}"

    def records(self, max_bytes: int) -> Iterator[Record]:
        for record in self.listed:
            assert isinstance(record.image, bytes)
            try:
                yield replace(record, image=self.render(record.image, self.size))
            except (ValueError, OSError):
                yield replace(record, image=None, fault="drawing is blank or cannot be rendered")


def rendered_pieces(
    records: dict[str, list[Record]], size: int, render: Callable[[bytes, int], bytes], number: int = PIECE_DRAWINGS
) -> list[Piece]:
    """Pieces of `number` drawings, from the drawings of each split."""
    return [
        RenderedPiece(split, listed[begin : begin + number], size, render)
        for split, listed in records.items()
        for begin in range(0, len(listed), number)
    ]
