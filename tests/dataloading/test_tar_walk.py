"""The walk over a tar, compared with one that reads headers by hand, and with damage at every header."""

import bz2
import gzip
import io
import lzma
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mvlm_dataloading import DataError
from mvlm_dataloading.sources.tar_samples import read_samples
from mvlm_dataloading.tar_walk import DamagedTar, TarWalk
from mvlm_dataloading.tools.reindex import index_tar
from support import published

BLOCK = 512
IMAGES = [published.encoded(published.make_image(i, (20 + i, 18))) for i in range(4)]
LONG = "folder/" * 20 + "x" * 60


def header(name: bytes, size: int, kind: bytes = b"0", link: bytes = b"", tail: bytes = b"") -> bytes:
    """A header of a tar, packed by hand. `tail` is what follows the field `prefix` begins at."""
    fields = [name, b"0000644\0", b"0000000\0", b"0000000\0", b"%011o\0" % size, b"00000000000\0", b" " * 8, kind, link]
    packed = struct.pack("100s8s8s8s12s12s8s1s100s", *fields) + b"ustar\x0000".ljust(88, b"\0") + tail
    packed = packed.ljust(BLOCK, b"\0")
    return packed[:148] + b"%06o\0 " % sum(packed) + packed[156:]


def padded(content: bytes) -> bytes:
    return content + bytes(-len(content) % BLOCK)


def pax(records: dict[str, str], kind: bytes = b"x") -> bytes:
    text = b""
    for name, value in records.items():
        body = f" {name}={value}\n".encode()
        length = len(body) + len(str(len(body) + len(str(len(body)))))
        text += str(length).encode() + body
    return header(b"pax", len(text), kind) + padded(text)


def sparse() -> bytes:
    """An old GNU sparse file of 100,000 bytes with 3 + 2 in places, the second in an extended block."""
    places = struct.pack("12s12s", b"%011o\0" % 0, b"%011o\0" % 3).ljust(96, b"\0")
    tail = places + b"\1" + b"%011o\0" % 100_000
    extended = struct.pack("12s12s", b"%011o\0" % 50_000, b"%011o\0" % 2).ljust(504, b"\0") + bytes(8)
    packed = header(b"holes.npy", 5, b"S")[:386] + tail
    packed = packed.ljust(BLOCK, b"\0")
    packed = packed[:148] + b" " * 8 + packed[156:]
    return packed[:148] + b"%06o\0 " % sum(packed) + packed[156:] + extended + padded(b"abcde")


def sample(name: bytes, i: int) -> bytes:
    parts = {b".jpg": IMAGES[i], b".txt": b"words of %d" % i}
    return b"".join(header(name + suffix, len(part)) + padded(part) for suffix, part in parts.items())


def long_name(name: bytes, content: bytes) -> bytes:
    long = header(b"././@LongLink", len(name) + 1, b"L") + padded(name + b"\0")
    return long + header(name[:100], len(content)) + padded(content)


END = bytes(2 * BLOCK)
BY_HAND = {
    "plain": sample(b"a", 0) + sample(b"b", 1) + END,
    "one block at the end": sample(b"a", 0) + bytes(BLOCK),
    "record of 10 KiB": (sample(b"a", 0) + END).ljust(10_240, b"\0"),
    "record of 1 MiB": (sample(b"a", 0) + END).ljust(1 << 20, b"\0"),
    "part of a block": sample(b"a", 0) + END + bytes(100),
    "GNU long names": long_name(LONG.encode() + b".jpg", IMAGES[0]) + long_name(LONG.encode() + b".txt", b"long") + END,
    "pax": pax({"path": "é.jpg"}) + header(b"e.jpg", len(IMAGES[2])) + padded(IMAGES[2])
    + pax({"path": "é.txt", "comment": "x" * 3000}) + header(b"e.txt", 4) + padded(b"text") + END,
    "pax times": b"".join(
        pax({"mtime": "1700000000.25"}) + header(name, len(IMAGES[i])) + padded(IMAGES[i])
        for i, name in enumerate((b"a.jpg", b"a.png", b"b.jpg"))
    ) + pax({"mtime": "1.5", "path": "c.txt"}) + header(b"x", 1) + padded(b"c") + END,
    "pax for all": pax({"comment": "by git"}, b"g") + sample(b"a", 0) + END,
    "pax size": pax({"size": str(len(IMAGES[1]))}) + header(b"a.jpg", 0) + padded(IMAGES[1])
    + header(b"a.txt", 3) + padded(b"abc") + END,
    "links": sample(b"a", 0) + header(b"b.jpg", 0, b"1", b"a.jpg") + header(b"b.txt", 1) + padded(b"b")
    + header(b"c.jpg", 0, b"2", b"/etc/passwd") + header(b"d", 0, b"5") + header(b"e", 0, b"6") + END,
    "sparse": sample(b"a", 0) + sparse() + sample(b"b", 1) + END,
    "no members": END,
}  # fmt: skip


def walk_by_hand(content: bytes) -> tuple[list[tuple[str, int]], int]:
    """Name and place of the content of each member, and the place of the first block of zeros."""
    at, found, name, size = 0, [], None, None
    while (block := content[at : at + BLOCK]) != bytes(BLOCK):
        assert int(block[148:154], 8) == sum(block[:148]) + 8 * 32 + sum(block[156:])
        kind, own, data = block[156:157], int(block[124:135], 8), at + BLOCK
        if kind == b"S":
            more = block[482]
            while more:
                more, data = content[data + 504], data + BLOCK
        if kind in b"Lxg":
            stored = content[data : data + own]
            at = data + -(-own // BLOCK) * BLOCK
            if kind == b"L":
                name = stored.rstrip(b"\0").decode()
            while kind == b"x" and stored:
                length = int(stored.split(b" ")[0])
                key, _, value = stored[:length].split(b" ", 1)[1].rstrip(b"\n").partition(b"=")
                name = value.decode() if key == b"path" else name
                size = int(value) if key == b"size" else size
                stored = stored[length:]
            continue
        own = own if size is None else size
        found.append((name or block[:100].rstrip(b"\0").decode(), data))
        at = data + (0 if kind in b"12356" else -(-own // BLOCK) * BLOCK)
        name = size = None
    return found, at


def walk(content: bytes) -> list[tuple[str, int]]:
    return [(member.name, member.offset_data) for member in TarWalk(io.BytesIO(content), 1 << 20)]


@pytest.mark.parametrize("name", BY_HAND)
def test_every_member_is_found_where_headers_read_by_hand_say(name):
    assert walk(BY_HAND[name]) == walk_by_hand(BY_HAND[name])[0]


@pytest.mark.parametrize("name", BY_HAND)
def test_whatever_follows_the_end_is_named_with_its_place(name):
    """Two tars joined by `cat` are a case: readers see the first alone."""
    content = BY_HAND[name]
    for more in (BY_HAND["plain"], b"x", bytes(BLOCK - 1) + b"x", bytes(1 << 20) + b"\1"):
        with pytest.raises(DamagedTar) as caught:
            walk(content + more)
        place = len(content) + len(more) - len(more.lstrip(b"\0"))
        assert (caught.value.offset, caught.value.cut) == (place, False)


@pytest.mark.parametrize("name", [name for name in BY_HAND if name != "no members"])
def test_a_block_of_zeros_before_members_is_no_end(name):
    content = BY_HAND[name]
    places, end = walk_by_hand(content)
    starts = [place - BLOCK for member, place in places if member != "holes.npy" and content[place:].strip(b"\0")]
    for at in starts:
        with pytest.raises(DamagedTar) as caught:
            walk(content[:at] + bytes(BLOCK) + content[at + BLOCK :])
        assert not caught.value.cut
        assert caught.value.offset <= max(at + BLOCK, end)


@pytest.mark.parametrize("name", BY_HAND)
def test_a_tar_that_was_cut_anywhere_is_told_from_a_damaged_one(name):
    content = BY_HAND[name]
    _, end = walk_by_hand(content)
    for cut in range(0, end + BLOCK, 37):
        with pytest.raises(DamagedTar) as caught:
            walk(content[:cut])
        assert caught.value.cut, cut
    assert walk(content[: end + BLOCK]) or name == "no members"


def test_zeros_in_place_of_most_of_a_download_are_no_padding():
    """Aria2c leaves such zeros: it reserves the place of a file before it fetches it."""
    with pytest.raises(DamagedTar, match=r"\d+ bytes of zeros at byte \d+") as caught:
        walk(BY_HAND["plain"] + bytes(5 << 20))
    assert caught.value.cut


@pytest.mark.parametrize(
    "content",
    [
        header(b"a.jpg", 0)[:124] + b"\xff" * 10 + b"\xfe\0" + header(b"a.jpg", 0)[136:],
        pax({"size": "-1024"}) + header(b"a.jpg", 0),
        pax({"x": "y"}) * 2000 + END,
        header(b"././@LongLink", 1 << 33, b"L"),
        header(b"pax", (1 << 33) - 1, b"x"),
        header(b"pax", 8, b"x") + padded(b"0 a=b\n\n\n") + sample(b"a", 0) + END,
        header(b"pax", 40, b"x") + padded(b"20 hdrcharset=\xff\xff\n") + sample(b"a", 0) + END,
        header(b"holes.npy", 5, b"S")[:482] + b"\1" + bytes(29),
        pax({"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}) + header(b"a", 512) + padded(b"z\n") + END,
    ],
    ids=["negative", "pax negative", "nested", "long name", "long pax", "length", "bytes", "holes", "map"],
)  # fmt: skip
def test_headers_that_make_tarfile_fail_or_never_end_are_damage(content):
    content = with_checksum(content)
    with pytest.raises(DamagedTar):
        walk(content)


def test_a_sparse_file_of_a_negative_size_ends_the_walk():
    """A sparse file's size is that of its expanded content, and the walk would read its header again."""
    first = sparse()[:BLOCK]
    first = first[:124] + b"\xff" + (256**11 - 2 * BLOCK).to_bytes(11, "big") + first[136:482] + b"\0" + first[483:]
    with pytest.raises(DamagedTar, match="negative size at byte 0"):
        walk(with_checksum(first) + sample(b"a", 0) + END)


@pytest.mark.parametrize("kind", [b"L", b"K", b"x", b"g"])
def test_a_header_cannot_ask_for_more_memory_than_a_member_may_take(kind):
    asked = []

    class Counted(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            asked.append(size)
            return super().read(size)

    with pytest.raises(DamagedTar, match="no header of a tar at byte 0"):
        list(TarWalk(Counted(header(b"x", (1 << 33) - 1, kind) + sample(b"a", 0) + END), 1 << 21))
    assert max(asked) <= (1 << 21) + BLOCK


def with_checksum(content: bytes) -> bytes:
    """A tar whose first header gets its right checksum."""
    return content[:148] + b"%06o\0 " % (sum(content[:148]) + 8 * 32 + sum(content[156:BLOCK])) + content[156:]


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress])
def test_damage_of_a_compressed_tar_is_found(tmp_path, pack):
    content = (b"".join(sample(b"%d" % i, i % 4) for i in range(40)) + END).ljust(60_000, b"\0")
    packed, path = bytearray(pack(content)), tmp_path / "x.tar.gz"
    whole = [(one.key, one.parts) for one in _found(path, bytes(packed))]
    packed[len(packed) // 2] ^= 255
    found = outcome(lambda: _found(path, bytes(packed)))
    if isinstance(found, str):
        assert str(path) in found
    else:  # the checksum at the end tells, if the packing does not
        assert any(one.fault for one in found) or [(one.key, one.parts) for one in found] == whole


def outcome(read: Callable[[], list[Any]]) -> list[Any] | str:
    """Result of a call, or the line with which it refuses."""
    try:
        return read()
    except DataError as error:
        return str(error)


def _found(path: Path, content: bytes) -> list[Any]:
    path.write_bytes(content)
    return list(read_samples(path, 1 << 20))


def headers_of(content: bytes) -> list[int]:
    """Places of all headers, those of long names and pax records too."""
    _, end = walk_by_hand(content)
    places, at = [], 0
    while at < end:
        places.append(at)
        kind, size = content[at + 156 : at + 157], int(content[at + 124 : at + 135], 8)
        if kind == b"0" and places[1:] and content[places[-2] + 156 : places[-2] + 157] == b"x":
            record = content[places[-2] + BLOCK : at].split(b" size=")
            size = int(record[1].split(b"\n")[0]) if len(record) > 1 else size
        at += BLOCK + (BLOCK if kind == b"S" else 0) + (0 if kind in b"12356" else -(-size // BLOCK) * BLOCK)
    assert at == end
    return places


TARS = [name for name in BY_HAND if name != "no members"]


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(st.sampled_from(TARS), st.integers(0, 10**6), st.integers(0, BLOCK - 1), st.integers(1, 255))
@example("plain", 2, 150, 255)
@example("GNU long names", 1, 0, 1)
@example("pax", 0, 156, 1)
@example("links", 2, 157, 1)
def test_a_damaged_header_costs_no_sample_without_a_word(tmp_path_factory, name, which, place, change):
    content = BY_HAND[name]
    places = headers_of(content)
    at = places[which % len(places)] + place
    damaged = content[:at] + bytes([content[at] ^ change]) + content[at + 1 :]
    path = tmp_path_factory.getbasetemp() / "damaged.tar"
    whole = [(one.key, one.parts) for one in _found(path, content)]
    lines = index_tar(path).lines
    path.write_bytes(damaged)
    for found, wanted in (
        (outcome(lambda: [(one.key, one.parts) for one in read_samples(path, 1 << 20)]), whole),
        (outcome(lambda: index_tar(path).lines), lines),
    ):
        if isinstance(found, str):
            assert str(path) in found
            assert "\n" not in found
        else:
            assert found == wanted
