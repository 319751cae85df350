"""Captions as they go into a shard: one line each, without signs that no reader shows."""

import re
import unicodedata
from collections.abc import Sequence

# They reorder or hide what is written, and belong to layout: marks, embeddings, overrides and isolates of direction.
_BIDI = re.compile("[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")
_CONTROL = re.compile("[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\ufeff]")
_SURROGATE = re.compile("[\ud800-\udfff]")


def clean_captions(captions: Sequence[str], max_bytes: int, max_captions: int | None = None) -> list[str] | str:
    """The usable captions, the main one first, or the reason why there is none.

    White space becomes single blanks; control signs become blanks and controls of direction vanish; repetitions, blank
    captions, halves of surrogate pairs and captions of more than `max_bytes` of UTF-8 are left out.
    """
    found: dict[str, None] = {}
    reason = "no caption"
    for caption in captions:
        if len(caption) > max_bytes:  # a character is at least a byte: no need to clean megabytes
            reason = "caption is too long"
            continue
        if _SURROGATE.search(caption):
            reason = "caption is not valid Unicode"
            continue
        line = " ".join(_CONTROL.sub(" ", _BIDI.sub("", caption)).split())
        if len(line.encode()) > max_bytes:
            reason = "caption is too long"
        elif line:
            found[line] = None
    return list(found)[:max_captions] if found else reason


def decode_text(text: bytes) -> str | None:
    """A text file's content, with or without a byte-order mark; None if it is not UTF-8."""
    try:
        return text.decode("utf-8-sig")
    except UnicodeDecodeError:
        return None


def script_of(text: str) -> str:
    """The script that most letters of a text are in, such as LATIN, CJK or CYRILLIC; NONE if it has no letter.

    The first word of a letter's Unicode name; the standard library has no script property.
    """
    counts: dict[str, int] = {}
    for sign in text:
        if sign.isascii():
            name = "LATIN" if sign.isalpha() else ""
        else:
            name = unicodedata.name(sign, "").split(" ")[0] if sign.isalpha() else ""
        if name:
            counts[name] = counts.get(name, 0) + 1
    return max(counts, key=lambda name: (counts[name], name)) if counts else "NONE"
