"""Open Clip Art: drawings with titles by several hundred authors, from Debian's package `openclipart-svg`.

The package file is read as it is; nothing is installed. Most drawings are in the public domain, and the others are left
out. A drawing's caption is its title, or the words of its file name where many drawings share the title: the title of
an icon collection says nothing about an icon. Drawings that no words tell apart are left out: stars with n points,
playing cards, gradients.

Splits are made by author. Authors draw series, whose members differ little, so a series is in one split.
"""

import html
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from xml.etree import ElementTree

from mvlm_dataloading.errors import DataError
from mvlm_dataloading.sources.record import (
    Record,
    Source,
    check_shares,
    file_sha256,
    require_file,
    safe_key,
    split_by_hash,
)

from .debian import package_files
from .rendered import rendered_pieces
from .svg import render_svg

LICENCE = "public domain"
_REVISION = 2  # increment when captions, images or splits change
_DRAWINGS = "usr/share/openclipart/svg/"
_MOST_BYTES = 1 << 20
"""Largest drawing that is taken. A few maps are larger, and take seconds to render."""
_SHARED = 3
"""A title or caption of more drawings than this does not tell them apart."""
_LARGE = 0.02
"""An author of more than this share of the drawings is always in the training split."""
_DC, _RDF = "{http://purl.org/dc/elements/1.1/}", "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}"
_PUBLIC_DOMAIN = re.compile(r"public ?domain", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Drawing:
    """A drawing and what its file says about it."""

    name: PurePosixPath
    """Path below the folder of drawings."""
    svg: str
    title: str
    author: str
    keywords: tuple[str, ...]


def openclipart(package: Path, *, size: int = 144, validation: float = 0.2, test: float = 0.2) -> Source:
    """Public domain drawings of Debian's package `openclipart-svg`, with their titles.

    Args:
        package: the file openclipart-svg_*.deb.
        size: side of the square images in pixels.
        validation, test: shares of the authors, large ones aside, chosen by a hash of the name.

    Raises:
        DataError: the file is missing or no such package, or the shares exceed the whole.
    """
    require_file(package)
    check_shares(validation, test)
    if size < 16:
        raise DataError(f"openclipart: wanted size >= 16, got {size}")
    drawings = list(read_drawings(package))
    captions = captions_of(drawings)
    of_author = Counter(drawing.author.lower() for drawing, found in zip(drawings, captions, strict=True) if found)
    large = {author for author, number in of_author.items() if number > _LARGE * of_author.total()}
    records: dict[str, list[Record]] = {"test": [], "train": [], "validation": []}
    for drawing, found in zip(drawings, captions, strict=True):
        if not found:
            continue
        author = drawing.author.lower()
        split = "train" if author in large else split_by_hash(author, validation, test)
        metadata = {
            "base": found[0].lower(),
            "author": drawing.author,
            "category": str(drawing.name.parent),
            "keywords": list(drawing.keywords),
            "licence": LICENCE,
        }
        key = safe_key(str(drawing.name.with_suffix("")))
        records[split].append(Record(key, drawing.svg.encode(), found, str(drawing.name), metadata))
    if not any(records.values()):
        raise DataError(f"{package}: wanted drawings with titles, found none; give Debian's openclipart-svg_*.deb")
    return Source(
        name="openclipart",
        origin=f"Open Clip Art Library, {package.name}",
        licence=LICENCE,
        attribution="Open Clip Art Library; the author of each drawing is in its metadata",
        recipe={
            "revision": _REVISION,
            "package": file_sha256(package),
            "size": size,
            "validation": validation,
            "test": test,
        },
        pieces=rendered_pieces(records, size, _render),
    )


def _render(svg: bytes, size: int) -> bytes:
    return render_svg(svg.decode(), size, crop=True)


def read_drawings(package: Path) -> Iterator[Drawing]:
    """Yield the public domain drawings of a package, by name. Unreadable and very large ones are left out."""

    def wanted(name: str, size: int) -> bool:
        return name.startswith(_DRAWINGS) and name.endswith(".svg") and size <= _MOST_BYTES

    for name, content in package_files(package, wanted, "openclipart-svg"):
        try:
            svg = content.decode()
            if "<!ENTITY" not in svg:
                drawing = _parse(PurePosixPath(name.removeprefix(_DRAWINGS)), svg)
                if drawing is not None:
                    yield drawing
        except (UnicodeDecodeError, ElementTree.ParseError):
            continue


def _parse(name: PurePosixPath, svg: str) -> Drawing | None:
    """The drawing of a file; None if it is not in the public domain."""
    root = ElementTree.fromstring(svg)
    licences = [element.get(f"{_RDF}resource") or "" for element in root.iter() if element.tag.endswith("}license")]
    if not any(_PUBLIC_DOMAIN.search(licence.replace("-", "")) for licence in licences):
        return None
    titles = [_text(element) for element in root.iter(f"{_DC}title") if _text(element)]
    authors = [_text(t) for creator in root.iter(f"{_DC}creator") for t in creator.iter(f"{_DC}title")]
    keywords = [_text(item) for subject in root.iter(f"{_DC}subject") for item in subject.iter(f"{_RDF}li")]
    return Drawing(
        name=name,
        svg=svg,
        title=titles[0] if titles else "",
        author=next((author for author in authors if author), "unknown"),
        keywords=tuple(word for word in keywords if word and word != "hash"),
    )


def _text(element: Any) -> str:
    """Text of an element. Some authors' tools escaped it twice: `&amp;#39;`."""
    return " ".join(html.unescape(element.text or "").split())


def captions_of(drawings: Sequence[Drawing]) -> list[list[str]]:
    """Captions of each drawing, the main one first: its title and the words of its file name. Empty without any.

    A title or name that more than three drawings have is none.
    """
    titles = [_words(drawing.title) for drawing in drawings]
    names = [_file_words(drawing) for drawing in drawings]
    shared = Counter(title.lower() for title in titles), Counter(name.lower() for name in names)
    found = []
    for title, name in zip(titles, names, strict=True):
        kept = [
            caption
            for caption, counts in zip((title, name), shared, strict=True)
            if counts[caption.lower()] <= _SHARED and re.search(r"[^\W\d_]{3}", caption)
        ]
        found.append(kept[:1] if len(kept) == 2 and _adds_nothing(*kept) else kept)
    return found


def _adds_nothing(title: str, name: str) -> bool:
    """True if the words of a file name are those of the title, which long names cut off."""
    letters, cut = (re.sub(r"[\W\d_]", "", text.lower()) for text in (title, name))
    return letters.startswith(cut)


def _words(text: str) -> str:
    """A text in words, without underscores and without the numbers and versions at its end."""
    words = " ".join(text.replace("_", " ").split())
    return re.sub(r"(?<=\w)[\s.,-]*\d+$", "", words).strip(" .,-")


def _file_words(drawing: Drawing) -> str:
    """The words of a drawing's file name, without numbers and without those of its author's name.

    Files of the library are named after drawing and author, both cut off: soft_blue_couch_jonadab_01.
    """
    author = [part for part in re.split(r"\W+", drawing.author.lower()) if part]
    words = [re.sub(r"\d+$", "", word) for word in re.split(r"[_\W]+", drawing.name.stem)]
    words = [word for word in words if not re.search(r"\d", word)]  # star_95pt02step tells nothing to read
    while len(words) > 1 and (not words[-1] or any(part.startswith(words[-1].lower()) for part in author)):
        words.pop()
    return " ".join(word for word in words if word)
