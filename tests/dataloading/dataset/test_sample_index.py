"""The index of a split: its layout on disk, its checks, and access to its samples."""

import json
import struct
import zlib

import numpy as np
import pytest

from mvlm_dataloading import DataError, open_dataset
from mvlm_dataloading.dataset.sample_index import SampleIndex, map_index, shards_hash
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


def test_samples_are_located_one_by_one_and_together(folder):
    index = map_index(folder / "train.index")
    wanted = [
        (number, *map(int, line[1:3]), line[3][:-4]) for number, lines in enumerate(lines_of(folder)) for line in lines
    ]
    ids = np.random.default_rng(0).permutation(np.repeat(np.arange(12), 2))
    shards, (offsets, sizes) = index.shard_of(ids), index.locate("image", ids)
    for row, i in enumerate(ids.tolist()):
        assert (shards[row], offsets[row], sizes[row], index.key(i)) == wanted[i]
        assert (index.shard_of(i), *index.locate("image", i)) == wanted[i][:3]
    assert index.locate("image", ids.reshape(4, 6))[0].tolist() == offsets.reshape(4, 6).tolist()
    index.release()
    assert index.key(11) == wanted[11][3]


def refuse(path, content: bytes, message: str) -> None:
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        map_index(path, "write it again").check_all()
    assert str(caught.value).startswith(f"{path}: wanted ")
    assert str(caught.value).endswith("; write it again")
    assert "\n" not in str(caught.value)


def test_an_index_that_is_truncated_or_too_long_is_refused(folder):
    path = folder / "train.index"
    content = path.read_bytes()
    for length in (0, 1, 111, 112, 200, len(content) - 1):
        refuse(path, content[:length], f"bytes.*, found {length}; ")
    refuse(path, content + b"x", f"wanted {len(content)} bytes as its header says, found {len(content) + 1}")


def test_an_index_of_another_version_or_kind_is_refused(folder):
    path = folder / "train.index"
    content = path.read_bytes()
    for version in (0, 2, 700):
        other = content[:8] + struct.pack("<I", version) + content[12:]
        refuse(path, other, f"wanted an index of version 1, found version {version}")
    refuse(path, b"v1.2 12\n" + content[8:], r"wanted an index that begins with b'mvlmidx\\n', found b'v1.2 12\\n'")


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


def test_an_index_in_memory_is_read_without_a_file(folder):
    content = (folder / "train.index").read_bytes()
    index = SampleIndex(content)
    mapped = map_index(folder / "train.index")
    assert [index.key(i) for i in range(12)] == [mapped.key(i) for i in range(12)]
    assert index.fingerprint == mapped.fingerprint
