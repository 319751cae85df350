"""Lines of DALI indices, and a parser that is vectorized with numpy: a million samples take about a second.

A line of a v1.2 index is `extension offset size name` for each component of a sample.

Shape legend: n lines of an index, w words, c components.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Int64 = NDArray[np.int64]
UInt8 = NDArray[np.uint8]

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
KINDS = {"image": IMAGE_EXTENSIONS, "text": ("txt",), "meta": ("json",), "tokens": ("tok",)}

LINE_BYTES = 4096
"""Most bytes that the lines of an index may have on average: one line per sample."""

_BLANK, _NEWLINE = b" \n"


def most_bytes(samples: int) -> int:
    """Bytes that the index of a shard may have. It is parsed in memory, so it never has more than 256 MiB."""
    return min(64 + LINE_BYTES * samples, 256 << 20)


@dataclass(frozen=True, slots=True, eq=False)
class Component:
    """Location of one component of every sample in its tar: arrays (n,)."""

    offset: Int64
    size: Int64
    """Bytes; -1 for a sample without the component."""


@dataclass(frozen=True, slots=True, eq=False)
class DaliIndex:
    """A DALI index, parsed: key, offset and size of each sample's components."""

    components: dict[str, Component]
    """Offsets and sizes by kind of component (a key of KINDS). If a sample has several of a kind, the last one is used.
    """
    keys: bytes
    """The samples' keys, one after another. A key is the name of the first component without its extension."""
    key_end: Int64
    """int64 (n,), end of each sample's key in `keys`, in bytes."""

    def __len__(self) -> int:
        return len(self.key_end)

    def key(self, i: int) -> str:
        begin = self.key_end[i - 1] if i else 0
        return self.keys[begin : self.key_end[i]].decode(errors="surrogateescape")


def format_index(lines: Sequence[str]) -> str:
    """Text of an index, version 1.2: a count, then a line per sample."""
    return f"v1.2 {len(lines)}\n" + "".join(line + "\n" for line in lines)


def components_of(line: str) -> tuple[str, list[tuple[str, int, int]]]:
    """Parse a line of an index: key of its sample, and (extension, offset, size in bytes) of each component."""
    words = list(zip(*[iter(line.split(" "))] * 4, strict=True))
    extension, _, _, name = words[-1]
    return name[: -len(extension) - 1], [(kind, int(offset), int(size)) for kind, offset, size, _ in words]


def read_head(text: bytes) -> tuple[str, int]:
    """Header line of an index file, whose content is `text`, and the number of lines after it."""
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
    first = np.append(0, line_ends + 1)[:-1]  # (n,) number of each line's first word
    extension = word_end[first] - word_begin[first]
    keys, key_end = _join(data, word_begin[first + 3], word_end[first + 3] - extension - 1)
    return DaliIndex(components, keys, key_end)


def _join(data: UInt8, begin: Int64, end: Int64) -> tuple[bytes, Int64]:
    """Concatenate the slices data[begin[i]:end[i]]. Returns their bytes, and the end of each slice in them, int64."""
    length = np.maximum(end - begin, 0)
    joined = np.cumsum(length)
    places = np.arange(joined[-1] if len(joined) else 0) + np.repeat(begin - (joined - length), length)
    return data[places].tobytes(), joined


def _codes(data: UInt8, begin: Int64, end: Int64) -> Int64:
    """Code of each word data[begin[i]:end[i]]: its first 7 characters in lower case, as the bytes of an int64.

    The first character is in the lowest byte.
    """
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
    """Parse each word data[begin[i]:end[i]] as a decimal number, int64.

    ValueError if one is no number or has over 18 digits.
    """
    if not len(begin):
        return np.zeros(0, np.int64)
    width = end - begin
    if width.max() > 18:
        raise ValueError(f"a number of {width.max()} digits")
    value = np.zeros(len(begin), np.int64)
    for k in range(int(width.max())):
        digit = np.where(k < width, data[np.maximum(end - 1 - k, 0)], ord("0")).astype(np.int64) - ord("0")
        wrong = (digit < 0) | (digit > 9)
        if wrong.any():
            worst = int(wrong.argmax())
            raise ValueError(f"{data[begin[worst] : end[worst]].tobytes().decode(errors='replace')!r} for a number")
        value += digit * 10**k
    return value
