"""Answers of a query of `mvlm search` as a page of thumbnails."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from mvlm.inference.images import decode_image
from mvlm.report.html import data_uri, write_page
from mvlm.search.index import Hit

THUMBNAIL = 160  # pixels


class Answer(NamedTuple):
    """A hit with its thumbnail."""

    hit: Hit
    image: str
    """Data URI."""


def write_answers(out: Path, title: str, query_image: str | None, answers: Sequence[Answer]) -> None:
    """Write the answers to an HTML file.

    Args:
        title: the query's text, or a word for it.
        query_image: data URI of the query's image, if it has one.
    """
    write_page(out, "answers.html", title=title, query_image=query_image, answers=answers)


def thumbnail(image: Path | bytes) -> str:
    """An image as a data URI of a small PNG."""
    small = Image.fromarray(decode_image(image))
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    return data_uri(small)
