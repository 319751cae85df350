"""Headers of image files, read without decoding: format, size, and what decoding takes.

Each reader walks the blocks of one format. It needs no decoder, so it holds where a decoder would already allocate
memory, read metadata of any size, or take a file's word for its length.
"""

import re
import struct
from collections.abc import Iterator
from typing import NamedTuple

from .limits import (
    LEAST_SCANS,
    MAX_BLOCKS,
    MAX_PARTS,
    MAX_RUN_BYTES,
    MAX_SCANNED,
    MAX_SCANS,
    ImageRefusedError,
    unreadable,
)


class ImageHeader(NamedTuple):
    """Format and size of an image, and the memory that decoding it takes."""

    kind: str
    """PNG, JPEG, WEBP, GIF, BMP or TIFF."""
    width: int
    height: int
    """Rows of pixels as stored, before the rotation that the EXIF data ask for."""
    pixel_bytes: float
    """Bytes of memory per pixel that Pillow takes to decode the image, the result included."""
    kept_bytes: float = 0.0
    """Further bytes per pixel that a JPEG of several scans takes, counted at the full size whatever `part` is."""
    raw_bytes: int = 0
    """Bytes of a PNG's rows before compression; 0 for other formats."""
    data_bytes: int = 0
    """Bytes of a PNG's rows after compression; 0 for other formats."""
    interlaced: bool = False
    part: int = 1
    """Divisor of the sides at which a JPEG is decoded: 1, 2, 4 or 8."""

    def memory(self, part: int = 1) -> float:
        """Bytes that decoding takes at 1 / `part` of the sides."""
        return self.width * self.height * (self.pixel_bytes / part**2 + self.kept_bytes)


def read_image_header(content: bytes) -> ImageHeader:
    """Format and size of an encoded image, without decoding.

    Raises:
        ImageRefusedError: the format is none of the six, or the file states no size or has too many blocks.
    """
    try:
        for magic, read in _READERS:
            if content.startswith(magic):
                header = read(content)
                break
        else:
            raise unreadable("it is of another kind", "format")
    except (struct.error, IndexError):
        raise unreadable("it ends within its header") from None
    if header.width < 1 or header.height < 1:
        raise unreadable(f"its size is {header.width} x {header.height}")
    return header


_METADATA = "blocks of metadata"


class _Blocks:
    """Counter of a file's blocks. `add` raises ImageRefusedError when there are more than the limit."""

    def __init__(self) -> None:
        self._count = 0

    def add(self, most: int = MAX_BLOCKS, what: str = _METADATA) -> None:
        self._count += 1
        if self._count > most:
            raise _too_many(most, what)


def _too_many(most: int, what: str) -> ImageRefusedError:
    return ImageRefusedError("blocks", f"wanted at most {most} {what}, found more; save the image anew")


_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
"""Passes of an interlaced PNG: first column, first row, and the steps to the next."""


def _png(content: bytes) -> ImageHeader:
    header: ImageHeader | None = None
    others, parts, at, data = _Blocks(), _Blocks(), 8, 0
    while at + 8 <= len(content):
        length, kind = struct.unpack_from(">I4s", content, at)
        if kind == b"IDAT":
            parts.add(MAX_PARTS, "chunks of pixels")
            data += max(0, min(length, len(content) - at - 8))
        elif kind == b"IEND":
            break
        else:
            others.add()
        if kind == b"IHDR":
            if header is not None:
                raise unreadable("it has two headers")
            width, height, depth, colour = struct.unpack_from(">IIBB", content, at + 8)
            interlaced = content[at + 20] != 0
            stored = 1 if colour in (0, 3) and depth <= 8 else 4
            raw_bytes = _png_bytes(width, height, depth * _CHANNELS.get(colour, 4), interlaced)
            header = ImageHeader("PNG", width, height, stored, raw_bytes=raw_bytes, interlaced=interlaced)
        elif header is None:
            raise unreadable("it has no header")
        elif kind == b"eXIf":
            check_directory(content[at + 8 : at + 8 + length])
        at += 12 + length
    if header is None:
        raise unreadable("it has no header")
    return header._replace(data_bytes=data)


def png_data(content: bytes) -> Iterator[bytes]:
    """Yield the content of each IDAT chunk of a PNG: together they are the compressed pixels."""
    at = 8
    while at + 8 <= len(content):
        length, kind = struct.unpack_from(">I4s", content, at)
        if kind == b"IEND":
            return
        if kind == b"IDAT":
            yield content[at + 8 : at + 8 + length]
        at += 12 + length


def _png_bytes(width: int, height: int, bits: int, interlaced: bool) -> int:
    """Bytes of the uncompressed rows of a PNG, each with its filter byte. bits: per pixel."""
    total = 0
    for left, top, across, down in ADAM7 if interlaced else ((0, 0, 1, 1),):
        columns, rows = max(0, -(-(width - left) // across)), max(0, -(-(height - top) // down))
        total += rows * (1 + (columns * bits + 7) // 8) if columns else 0
    return total


_MARKER = re.compile(rb"\xff[^\x00\x01\xff\xd0-\xd7]")
_MARKERS = frozenset(range(0x02, 0xFF)) - frozenset(range(0xD0, 0xD8))  # those of the pattern
_SIZES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # SOF0 to SOF15


def _jpeg(content: bytes) -> ImageHeader:
    found, in_scans, scans, at = None, 0.0, 0, 2
    others, last = 0, len(content) - 2
    while True:
        if at <= last and content[at] == 0xFF and content[at + 1] in _MARKERS:  # as nearly always
            marker, at = content[at + 1], at + 2
        elif (match := _MARKER.search(content, at)) is not None:
            marker, at = content[match.start() + 1], match.end()
        else:
            break
        if marker == 0xD9:
            break
        if marker == 0xD8:
            continue
        length = content[at] << 8 | content[at + 1]
        if marker in _SIZES:
            if found is not None:
                raise unreadable("it has two headers")
            height, width, layers = struct.unpack_from(">HHB", content, at + 3)
            shapes = [divmod(content[at + 9 + 3 * i], 16) for i in range(layers)]
            largest = max((a * b for a, b in shapes), default=0) or 1
            in_scans = 2 * sum(a * b for a, b in shapes) / largest
            found = width, height, layers, marker
        elif marker == 0xDA:
            if found is None:
                raise unreadable("it has no header")
            scans += 1
            most = min(MAX_SCANS, max(LEAST_SCANS, MAX_SCANNED // max(1, found[0] * found[1])))
            if scans > most:
                raise _too_many(most, "scans")
            if found[3] in (0xC0, 0xC1) and scans == 1 and content[at + 2] == found[2]:
                in_scans = 0  # one scan with all of the image: decoded row by row
                break
        else:
            others += 1
            if others > MAX_BLOCKS:
                raise _too_many(MAX_BLOCKS, _METADATA)
            if marker == 0xE1 and content.startswith(b"Exif\0\0", at + 2, at + length):
                check_directory(content[at + 8 : at + length])
            elif marker == 0xE2 and content.startswith(b"MPF\0", at + 2, at + length):
                check_directory(content[at + 6 : at + length])
        at += length
    if found is None:
        raise unreadable("it has no header")
    width, height, layers, _ = found
    return ImageHeader("JPEG", width, height, 1 if layers == 1 else 4, in_scans)


def _webp(content: bytes) -> ImageHeader:
    if content[8:12] != b"WEBP":
        raise unreadable("it is of another kind", "format")
    width = height = 0
    blocks, at = _Blocks(), 12
    while at + 8 <= len(content):
        kind, length = struct.unpack_from("<4sI", content, at)
        blocks.add(what="chunks")
        data, size = at + 8, (0, 0)
        if kind == b"VP8X":
            size = 1 + _three(content, data + 4), 1 + _three(content, data + 7)
        elif kind == b"VP8 ":
            wide, high = struct.unpack_from("<HH", content, data + 6)
            size = wide & 0x3FFF, high & 0x3FFF
        elif kind == b"VP8L":
            (bits,) = struct.unpack_from("<I", content, data + 1)
            size = 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
        elif kind == b"EXIF":
            check_directory(content[data : data + length].removeprefix(b"Exif\0\0"))
        width, height = max(width, size[0]), max(height, size[1])
        at = data + length + length % 2
    return ImageHeader("WEBP", width, height, 16)  # two canvases, the decoder's planes, and two copies


def _three(content: bytes, at: int) -> int:
    return content[at] | content[at + 1] << 8 | content[at + 2] << 16


def _gif(content: bytes) -> ImageHeader:
    width, height, flags = struct.unpack_from("<HHB", content, 6)
    at = 13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
    blocks = _Blocks()
    while content[at] != 0x2C:  # up to the first image; the others are not read
        if content[at] == 0x3B:
            raise unreadable("it holds no image")
        if content[at] != 0x21:
            at += 1
            continue
        at += 2
        while content[at]:
            blocks.add()
            at += 1 + content[at]
        blocks.add()
        at += 1
    left, top, wide, high = struct.unpack_from("<HHHH", content, at + 1)
    return ImageHeader("GIF", max(width, left + wide), max(height, top + high), 3)


def _bmp(content: bytes) -> ImageHeader:
    (size,) = struct.unpack_from("<I", content, 14)
    if size == 12:
        width, height, _, bits = struct.unpack_from("<HHHH", content, 18)
    else:
        width, height, _, bits, packing = struct.unpack_from("<iiHHI", content, 18)
        if packing in (1, 2) and len(content) > MAX_RUN_BYTES:
            most = f"{MAX_RUN_BYTES / 1e6:g} MB"
            raise ImageRefusedError("bytes", f"wanted at most {most} of run lengths, found more; save it as a PNG")
    return ImageHeader("BMP", width, abs(height), 2 if bits <= 8 else 4)


_TAG_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
_OF_BYTES = (1, 2, 7)  # types that Pillow keeps as bytes; of the others it makes a number each


def _directory(content: bytes) -> dict[int, tuple[int, ...]]:
    """Tags of the first directory of a TIFF file or of EXIF data: for each, its first values, at most 8 integers.

    A tag of another type has no values. The work and the memory are bounded.
    """
    order = {b"II": "<", b"MM": ">"}.get(content[:2])
    if order is None:
        return {}
    (version,) = struct.unpack_from(f"{order}H", content, 2)
    big = version == 43
    (at,) = struct.unpack_from(f"{order}Q" if big else f"{order}I", content, 8 if big else 4)
    (count,) = struct.unpack_from(f"{order}Q" if big else f"{order}H", content, at)
    at += 8 if big else 2
    found: dict[int, tuple[int, ...]] = {}
    read = 0
    for _ in range(count):
        if at + (20 if big else 12) > len(content):
            break  # Pillow reads no further either
        tag, kind, values = struct.unpack_from(f"{order}HHQ" if big else f"{order}HHI", content, at)
        value, room = (at + 12, 8) if big else (at + 8, 4)
        size = values * _TAG_BYTES.get(kind, 0)
        if size > room:
            (value,) = struct.unpack_from(f"{order}Q" if big else f"{order}I", content, value)
            size = min(size, max(0, len(content) - value))
        if len(found) >= MAX_BLOCKS:
            raise _too_many(MAX_BLOCKS, "tags")
        read += size
        if read > 2 * len(content) + 65536:
            raise ImageRefusedError("blocks", "wanted tags of their own bytes, found shared ones; save the image anew")
        if kind not in _OF_BYTES and size > MAX_PARTS * _TAG_BYTES.get(kind, 1):
            raise _too_many(MAX_PARTS, "values of a tag")
        form = {1: "B", 3: "H", 4: "I", 16: "Q"}.get(kind)
        number = min(values, 8, size // _TAG_BYTES.get(kind, 1))
        found[tag] = struct.unpack_from(f"{order}{number}{form}", content, value) if form else ()
        at += 20 if big else 12
    return found


def check_directory(content: bytes) -> None:
    """Refuse EXIF data that take more memory than their own size. Damaged ones pass: Pillow leaves them out."""
    try:
        _directory(content)
    except (struct.error, IndexError):
        return


def _tiff(content: bytes) -> ImageHeader:
    tags = _directory(content)
    if not tags.get(256) or not tags.get(257):
        raise unreadable("it states no size")
    width, height = tags[256][0], tags[257][0]
    samples = (tags.get(277) or (1,))[0]
    raw = samples * max(tags.get(258) or (1,)) / 8
    rows = min(height, (tags.get(278) or (height,))[0])
    tile = (tags.get(322) or (0,))[0] * (tags.get(323) or (0,))[0]
    together = (tile or width * rows) / max(1, width * height)  # share of the image in the largest strip or tile
    turned = 0 if (tags.get(274) or (1,))[0] == 1 else 4  # Pillow makes a second image
    return ImageHeader("TIFF", width, height, 4 + turned + max(4, raw) * together)


_READERS = (
    (b"\x89PNG\r\n\x1a\n", _png), (b"\xff\xd8\xff", _jpeg), (b"RIFF", _webp), (b"GIF8", _gif), (b"BM", _bmp),
    (b"II*\0", _tiff), (b"MM\0*", _tiff), (b"II+\0", _tiff), (b"MM\0+", _tiff),
)  # fmt: skip
