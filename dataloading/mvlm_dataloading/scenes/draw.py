"""Drawing of scenes: a two-tone background, cut-outs on it, and cards, as a PNG."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

from mvlm_dataloading.errors import need

from .layout import GROUNDS, SIDE, Placed, Scene, boxes, card_box

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
