"""Answers of a query as a page of thumbnails: one HTML file that opens anywhere."""

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from mvlm.inference.images import decode_image
from mvlm.search.index import Hit

THUMBNAIL = 160  # pixels
ENVIRONMENT = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=True,  # captions, ids and metadata are other people's text
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


class Answer(NamedTuple):
    """A hit with its thumbnail."""

    hit: Hit
    image: str
    """Data URI."""


def write_page(out: Path, title: str, query_image: str | None, answers: Sequence[Answer]) -> None:
    """Write the answers to an HTML file.

    Args:
        title: the query's text, or a word for it.
        query_image: data URI of the query's image, if it has one.
    """
    page = ENVIRONMENT.get_template("results.html").render(title=title, query_image=query_image, answers=answers)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page, encoding="utf-8")


def thumbnail(image: Path | bytes) -> str:
    """An image as a data URI of a small PNG."""
    small = Image.fromarray(decode_image(image))
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    file = io.BytesIO()
    small.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
