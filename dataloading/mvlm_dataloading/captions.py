"""Cleaning of captions to single lines without invisible characters."""

import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from mvlm_dataloading.errors import need

if TYPE_CHECKING:
    from numpy.typing import ArrayLike


# Controls of writing direction (marks, embeddings, overrides, isolates) reorder or hide text.
_BIDI = re.compile("[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")
_CONTROL = re.compile("[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\ufeff]")
_SURROGATE = re.compile("[\ud800-\udfff]")


def clean_captions(captions: Sequence[str], max_bytes: int, max_captions: int | None = None) -> list[str] | str:
    """Clean captions and drop unusable ones. Returns the usable captions in order, or a reason if no caption is usable.

    Each is cleaned by `clean_line`. Drops repeated captions, captions in which nothing can be seen, captions with a
    lone surrogate, and captions above `max_bytes` bytes of UTF-8.
    """
    found: dict[str, None] = {}
    reason = "no caption"
    for caption in captions:
        if len(caption) > max_bytes:  # a character takes at least one byte; skips cleaning of megabytes
            reason = "caption is too long"
            continue
        if _SURROGATE.search(caption):
            reason = "caption is not valid Unicode"
            continue
        line = clean_line(caption)
        if len(line.encode()) > max_bytes:
            reason = "caption is too long"
        elif is_visible(line):
            found[line] = None
    return list(found)[:max_captions] if found else reason


def clean_line(text: str) -> str:
    """A text on one line.

    White space and control characters become single blanks; marks of text direction are removed.
    """
    if not (text.isascii() and text.isprintable()):
        text = _CONTROL.sub(" ", _BIDI.sub("", text))
    return " ".join(text.split())


def same_words(text: str) -> str:
    """A text for comparison: texts that differ in blanks or case alone are equal."""
    return " ".join(text.split()).casefold()


def first_captions(captions: Iterable[str]) -> list[int]:
    """For each caption, the index of the first caption that has the same words (`same_words`), possibly its own."""
    known: dict[str, int] = {}
    return [known.setdefault(same_words(caption), i) for i, caption in enumerate(captions)]


class Repeats(NamedTuple):
    """Captions that several images share, and the R@1 of a perfect model if the exact pair alone counts as right."""

    captions: int
    image_to_text: float
    """R@1 of images as queries, in per cent: the images with a caption that no other image has. A tie is no success."""
    text_to_image: float
    """R@1 of captions as queries, in per cent: the captions that belong to one image alone."""


def repeats(words: "ArrayLike", images: "ArrayLike") -> Repeats:
    """Count the captions that several images share.

    Args:
        words: int (T,), equal for captions of equal words.
        images: int (T,), number of each caption's image.
    """
    np = need("numpy")  # `mvlm --help` reads this file, and needs no numpy
    kinds, owned = np.asarray(words), np.asarray(images)
    different = np.unique(np.stack([kinds, owned], axis=1), axis=0)
    found, owners = np.unique(different[:, 0], return_counts=True)
    alone = owners[np.searchsorted(found, kinds)] == 1
    with_own = len(np.unique(owned[alone])) / max(1, len(np.unique(owned)))
    shares = (round(100 * share, 2) for share in (with_own, float(alone.mean()) if len(alone) else 0.0))
    return Repeats(int((~alone).sum()), *shares)


def is_visible(text: str) -> bool:
    """False for a text of blanks, controls, formats and combining marks alone: tokenizers may make no token of it.

    U+FFFD is not visible either: it stands for bytes that could not be read, and BERT's tokenizer drops it. A character
    that this Python's Unicode does not know, such as a newer emoji, is visible: a build must not depend on the version
    of Python.
    """
    if text[:1].isalnum():  # as nearly always
        return True
    kinds = (unicodedata.category(character) for character in text if character != "\ufffd")
    return any(kind[0] not in "MZ" and kind not in ("Cc", "Cf", "Co", "Cs") for kind in kinds)


def decode_text(text: bytes) -> str | None:
    """Content of a text file without its byte-order mark; None if it is not UTF-8."""
    try:
        return text.decode("utf-8-sig")
    except UnicodeDecodeError:
        return None


def script_of(text: str) -> str:
    """The most frequent script of a text's letters, such as LATIN, CJK or CYRILLIC; NONE for a text without letters.

    A letter's script is the first word of its Unicode name, as the standard library has no script property.
    """
    counts: dict[str, int] = {}
    for character in text:
        if character.isascii():
            name = "LATIN" if character.isalpha() else ""
        else:
            name = unicodedata.name(character, "").split(" ")[0] if character.isalpha() else ""
        if name:
            counts[name] = counts.get(name, 0) + 1
    return max(counts, key=lambda name: (counts[name], name)) if counts else "NONE"
