"""Parser of DALI indices. Vectorized with numpy: a million samples take about a second.

A line of a v1.2 index is `extension offset size name` for each component of a sample.

Shape legend: n lines of an index, w words, c components.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Int64 = NDArray[np.int64]
UInt8 = NDArray[np.uint8]

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
KINDS = {"image": IMAGE_EXTENSIONS, "text": ("txt",), "meta": ("json",), "tokens": ("tok",)}

_BLANK, _NEWLINE = b" \n"


@dataclass(frozen=True, slots=True, eq=False)
class Component:
    """Location of one component of every sample in its tar: arrays (n,)."""

    offset: Int64
    size: Int64
    """Bytes; -1 for a sample without the component."""


@dataclass(frozen=True, slots=True, eq=False)
class DaliIndex:
    """A parsed index."""

    text: bytes
    begin: Int64
    """(n,) start of each line in `text`."""
    end: Int64
    """(n,) end of each line, without the newline."""
    components: dict[str, Component]
    """Keyed by the names in KINDS. If a sample has several components of a kind, the last one is used."""

    def line(self, i: int) -> bytes:
        return self.text[self.begin[i] : self.end[i]]

    def key(self, i: int) -> str:
        """Key of a sample: the name of its first component without the extension."""
        extension, _, _, name = self.line(i).split(b" ", 4)[:4]
        return name[: -len(extension) - 1].decode(errors="surrogateescape")

    def name(self, i: int, kind: str) -> str:
        """Name of a component's member in the tar."""
        words = self.line(i).decode(errors="surrogateescape").split(" ")
        return [words[k + 3] for k in range(0, len(words), 4) if words[k].lower() in KINDS[kind]][-1]


def read_head(text: bytes) -> tuple[str, int]:
    """The first line of an index, and the number of lines after it."""
    head, _, rest = text.partition(b"\n")
    lines = rest.count(b"\n") + (bool(rest) and not rest.endswith(b"\n"))
    return head.decode(errors="replace").strip(), lines


def parse_index(text: bytes) -> DaliIndex:
    """Parse an index whose first line has been checked.

    Raises:
        ValueError: a line does not consist of `extension offset size name`.
    """
    if not text.endswith(b"\n"):
        text += b"\n"
    start = text.index(b"\n") + 1
    data = np.frombuffer(text, np.uint8)[start:]
    word_end = np.flatnonzero((data == _BLANK) | (data == _NEWLINE))  # (w,)
    word_begin = np.append(0, word_end + 1)[:-1]
    if (word_end == word_begin).any():
        raise ValueError("an empty word")
    line_ends = np.flatnonzero(data[word_end] == _NEWLINE)  # (n,) number of each line's last word
    words = np.diff(line_ends, prepend=-1)
    if (words % 4).any():
        raise ValueError(f"{words[(words % 4).argmax()]} words in a line")
    kind = _codes(data, word_begin[::4], word_end[::4])  # (c,)
    offset = _numbers(data, word_begin[1::4], word_end[1::4])
    size = _numbers(data, word_begin[2::4], word_end[2::4])
    line = np.repeat(np.arange(len(words)), words // 4)
    components = {}
    for name, extensions in KINDS.items():
        chosen = np.isin(kind, [int.from_bytes(e.encode(), "little") for e in extensions])
        component = Component(np.zeros(len(words), np.int64), np.full(len(words), -1, np.int64))
        component.offset[line[chosen]], component.size[line[chosen]] = offset[chosen], size[chosen]
        components[name] = component
    end = start + word_end[line_ends]
    return DaliIndex(text, np.append(start, end + 1)[:-1], end, components)


def _codes(data: UInt8, begin: Int64, end: Int64) -> Int64:
    """The first 7 characters of each word, in lower case, as one number with the first in the lowest byte."""
    code = np.zeros(len(begin), np.int64)
    for k in range(7):
        inside = begin + k < end
        if not inside.any():
            break
        letter = np.where(inside, data[np.minimum(begin + k, len(data) - 1)], 0).astype(np.int64)
        letter += 32 * ((letter >= ord("A")) & (letter <= ord("Z")))
        code |= letter << (8 * k)
    return code


def _numbers(data: UInt8, begin: Int64, end: Int64) -> Int64:
    """The words as decimal numbers."""
    if not len(begin):
        return np.zeros(0, np.int64)
    width = end - begin
    if width.max() > 18:
        raise ValueError(f"a number of {width.max()} digits")
    value = np.zeros(len(begin), np.int64)
    for k in range(int(width.max())):
        digit = np.where(k < width, data[np.maximum(end - 1 - k, 0)], ord("0")).astype(np.int64) - ord("0")
        if ((digit < 0) | (digit > 9)).any():
            worst = int(((digit < 0) | (digit > 9)).argmax())
            raise ValueError(f"{data[begin[worst] : end[worst]].tobytes().decode(errors='replace')!r} for a number")
        value += digit * 10**k
    return value
