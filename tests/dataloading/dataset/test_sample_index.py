"""The index of a split: its layout on disk, its checks, access to its samples, and writing it from any DALI index."""

import hashlib
import io
import itertools
import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest

from mvlm_dataloading import DataError, open_dataset
from mvlm_dataloading.dataset.dali_index import parse_index
from mvlm_dataloading.dataset.sample_index import (
    IndexWriter,
    SampleIndex,
    fingerprint_of,
    map_index,
    pack_records,
    shards_hash,
)
from support.data import write_dataset


@pytest.fixture
def folder(tmp_path):
    return write_dataset(tmp_path / "data", 12, max_shard_bytes=50_000, kinds=("PNG", "JPEG"))


def lines_of(folder) -> list[list[list[str]]]:
    """Lines of the DALI indices, by shard: [extension, offset, size, name, extension, ...]."""
    paths = sorted(folder.glob("train-*.idx"))
    return [[line.split(" ") for line in path.read_text().splitlines()[1:]] for path in paths]


def test_the_layout_is_the_documented_one(folder):
    """Read with `struct`, from docs/reference/files.md, and compared with the DALI indices."""
    content = (folder / "train.index").read_bytes()
    shards = lines_of(folder)
    samples, described = sum(map(len, shards)), json.loads((folder / "dataset.json").read_text())["splits"]["train"]
    head = struct.unpack_from("<8sIIQQQ32s32sII", content)
    assert head[:5] == (b"mvlmidx\n", 1, 36, samples, len(shards))
    assert head[6].decode() == open_dataset(folder, "train").fingerprint
    assert head[7] == shards_hash("train", described["shards"])
    table_end = 112 + 24 * len(shards)
    assert head[8] == zlib.crc32(content[:104] + bytes(8) + content[112:table_end])
    record_at, key_at = table_end, table_end + 36 * samples
    for number, lines in enumerate(shards):
        count, key_bytes, records_crc, keys_crc = struct.unpack_from("<QQII", content, 112 + 24 * number)
        assert count == len(lines)
        assert records_crc == zlib.crc32(content[record_at : record_at + 36 * count])
        assert keys_crc == zlib.crc32(content[key_at : key_at + key_bytes])
        key_begin = 0
        for line in lines:
            (*places, key_end) = struct.unpack_from("<9I", content, record_at)
            record_at += 36
            found: dict[str, tuple[int, int]] = dict(
                zip(("image", "txt", "json", "tok"), zip(places[::2], places[1::2], strict=True), strict=True)
            )
            assert found["tok"] == (0, 0xFFFFFFFF)
            for extension, offset, size, name in zip(*[iter(line)] * 4, strict=True):
                block, length = found["image" if extension in ("png", "jpg") else extension]
                assert (512 * block, length) == (int(offset), int(size))
                assert content[key_at + key_begin : key_at + key_end].decode() + f".{extension}" == name
            key_begin = key_end
        key_at += key_bytes
    assert key_at == len(content)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda content: b"", "at least 112 bytes"),
        (lambda content: content[:111], "at least 112 bytes"),
        (lambda content: content[:112], "as its header says"),
        (lambda content: content[:-1], "as its header says"),
        (lambda content: content + b"x", "as its header says"),
        (lambda content: content[:8] + struct.pack("<I", 2) + content[12:], "wanted an index of version 1"),
        (lambda content: b"v1.2 12\n" + content[8:], "wanted an index that begins with"),
    ],
)
def test_an_index_of_another_length_version_or_kind_is_refused(folder, change, message):
    path = folder / "train.index"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(DataError, match=f"{path}: .*{message}.*; write it again"):
        map_index(path, "write it again").check_all()


def forged(
    folder: Path, *, rows: tuple[int, int, int] = (0, 0, 0), table: tuple[int, int] = (0, 0), digits: bytes = b""
):
    """Change an index as one who computes its checksums anew: value of row and column, samples of a shard, hash."""
    path = folder / "train.index"
    content = bytearray(path.read_bytes())
    samples, shards = struct.unpack_from("<QQ", content, 16)
    row, column, value = rows
    records_at, keys_at = 112 + 24 * shards, 112 + 24 * shards + 36 * samples
    if value:
        struct.pack_into("<I", content, records_at + 36 * row + 4 * column, value)
    if digits:
        content[40:72] = digits
    counts = [list(struct.unpack_from("<QQ", content, 112 + 24 * shard)) for shard in range(shards)]
    counts[table[0]][0] += table[1]
    row = key = 0
    for shard, (count, length) in enumerate(counts):
        records = content[records_at + 36 * row : min(records_at + 36 * (row + count), keys_at)]
        keys = content[keys_at + key : keys_at + key + length]
        entry = (count, length, zlib.crc32(records), zlib.crc32(keys))
        struct.pack_into("<QQII", content, 112 + 24 * shard, *entry)
        row, key = row + count, key + length
    struct.pack_into("<I", content, 104, 0)
    struct.pack_into("<I", content, 104, zlib.crc32(content[112 : 112 + 24 * shards], zlib.crc32(content[:112])))
    path.write_bytes(content)


FAR = 1 << 20


@pytest.mark.parametrize(
    "change",
    [
        *({"rows": (1, column, value)} for column, value in itertools.product((0, 1, 2, 3, 5), (FAR, 0xFFFFFFF0))),
        {"table": (0, 1)},
        {"table": (0, 1 << 40)},
        {"digits": b"\xff" * 32},
        {"digits": b"\x1b[2J" * 8},
    ],
    ids=str,
)
def test_a_forged_index_with_good_checksums_is_refused_before_any_tar(folder, change):
    """DALI maps a tar, and reading behind its end would end the process."""
    forged(folder, **change)
    with pytest.raises(DataError, match=r"train\.index: wanted [^\x00-\x1f]*$"):
        open_dataset(folder, "train").captions(0)


def test_a_change_of_any_byte_is_noticed(folder):
    """With all checksums, no byte of the file is unguarded."""
    path = folder / "train.index"
    content = path.read_bytes()
    rng = np.random.default_rng(0)
    for place in {*range(112), *rng.integers(112, len(content), 200).tolist()}:
        changed = bytearray(content)
        changed[place] ^= 1 << int(rng.integers(8))
        if 108 <= place < 112:
            continue  # reserved
        path.write_bytes(changed)
        with pytest.raises(DataError):
            map_index(path).check_all()
    path.write_bytes(content)
    map_index(path).check_all()


def test_damage_is_noticed_when_its_shard_is_first_read(folder):
    path = folder / "train.index"
    content = bytearray(path.read_bytes())
    index = map_index(path)
    last_shard = int(index.first[-2])
    assert last_shard > 0
    records_end = len(content) - sum(len(index.key(i)) for i in range(12))
    content[records_end - 1] ^= 1
    path.write_bytes(content)
    damaged = map_index(path, "write it again")
    assert damaged.locate("image", 0) == index.locate("image", 0)
    with pytest.raises(DataError, match=rf"the stored checksum of the records of shard {len(index.first) - 2}, found"):
        damaged.locate("image", np.array([0, last_shard]))


def index_of(shards: list[list[str]], hashes: str = "") -> SampleIndex:
    """Index in memory of shards given as lines of DALI indices, with a hash of two letters each."""
    content = io.BytesIO()
    described = [
        {"tar": f"{k}.tar", "samples": len(lines), "sha256": 2 * hashes[k : k + 1]} for k, lines in enumerate(shards)
    ]
    writer = IndexWriter(content, "train", described)
    for lines in shards:
        parsed = parse_index("\n".join([f"v1.2 {len(lines)}", *lines, ""]).encode())
        writer.add(pack_records(parsed), parsed.keys)
    writer.finish()
    return SampleIndex(content.getvalue())


def test_odd_samples_and_empty_shards_are_packed():
    large = 512 * 0xFFFFFFFE  # the last block of a tar of 2 TiB
    index = index_of(
        [
            [],
            ["TXT 512 3 d/a.b.TXT JPG 1024 4294967294 d/a.b.JPG", "webp 2048 0 ö.webp tok 4096 8 ö.tok"],
            [],
            [f"png {large} 1 c.png txt 0 2 c.txt json 512 3 c.json png 1024 4 c.png"],
            [],
        ]
    )
    assert len(index) == 3
    assert [index.key(i) for i in range(3)] == ["d/a.b", "ö", "c"]
    assert index.shard_of(np.arange(3)).tolist() == [1, 1, 3]
    found = {kind: np.stack(index.locate(kind, np.arange(3)), 1).tolist() for kind in ("image", "text", "meta")}
    assert found["image"] == [[1024, 4294967294], [2048, 0], [1024, 4]]  # the last of two images
    assert found["text"] == [[512, 3], [0, -1], [0, 2]]
    assert found["meta"] == [[0, -1], [0, -1], [512, 3]]
    assert index.locate("tokens", 1) == (4096, 8)


@pytest.mark.parametrize(
    "line, message",
    [
        ("jpg 1 2 a.jpg txt", "5 words in a line"),
        ("jpg  1 2 a.jpg", "an empty word"),
        ("jpg 1 2 a.jpg ", "an empty word"),
        ("jpg -1 2 a.jpg", "'-1' for a number"),
        ("jpg 1 0x2 a.jpg", "'0x2' for a number"),
        ("jpg 1 12345678901234567890 a.jpg", "a number of 20 digits"),
    ],
)
def test_malformed_index_lines_are_refused(line, message):
    with pytest.raises(ValueError, match=message):
        parse_index(f"v1.2 2\njpg 1 2 b.jpg\n{line}\n".encode())


@pytest.mark.parametrize("place", ["513 2", "512 4294967295", f"{512 * 0xFFFFFFFF} 1"])
def test_places_that_no_tar_has_are_refused(place):
    with pytest.raises(ValueError, match="the text of a sample at an offset or of a size that no tar has"):
        pack_records(parse_index(f"v1.2 1\njpg 0 1 a.jpg txt {place} a.txt\n".encode()))


def test_the_fingerprint_hashes_shards_and_places_of_samples():
    """The recipe, written out: checkpoints store fingerprints, so it stays. Captions count where images are shared."""
    shards = [{"samples": 2, "sha256": "aa"}, {"samples": 2, "sha256": "bb"}]
    lines = [
        ["jpg 512 3 a.jpg txt 1536 2 a.txt", "jpg 2560 3 b.jpg txt 3584 2 b.txt"],
        ["jpg 512 3 c.jpg txt 1536 2 c.txt", "jpg 512 3 d.jpg txt 3584 2 d.txt"],
    ]
    places = np.array([512, 2560, 512, 512, 1536, 3584], "<i8").tobytes()
    wanted = hashlib.sha256(b'["train", [[2, "aa"], [2, "bb"]]]' + places).hexdigest()[:32]
    index = index_of(lines, "ab")
    assert index.fingerprint == wanted
    assert fingerprint_of(index, "train", shards) == wanted
    assert fingerprint_of(index, "test", shards) != wanted
    assert fingerprint_of(index, "train", [shards[0], {"samples": 1, "sha256": "bb"}]) is None
