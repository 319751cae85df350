"""Opening a split from its index, and from the DALI indices of its shards."""

import io
import json
import logging
import os
import shutil
import subprocess
import sys
import tarfile

import pytest

from mvlm_dataloading import DataError, open_dataset
from mvlm_dataloading.build.shard_writer import format_index
from mvlm_dataloading.dataset.open import write_index
from support.data import make_captions, make_image, write_dataset


@pytest.fixture
def folder(tmp_path):
    """Two splits of 8 images in a few shards, for tests that damage them."""
    return write_dataset(tmp_path / "data", 8, max_shard_bytes=50_000, splits=("train", "validation"))


def refuse(folder, *words: str, split: str = "train") -> None:
    """Check that opening fails with a one-line message that contains all `words`."""
    with pytest.raises(DataError) as caught:
        open_dataset(folder, split)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_an_unknown_split_is_refused(folder):
    refuse(folder, "wanted the split testing, found train, validation; name one of these", split="testing")


def test_a_missing_shard_is_refused(folder):
    (folder / "train-000001.tar").unlink()
    refuse(folder, "train-000001.tar: wanted a shard that dataset.json names, found no such file")


def test_an_empty_shard_is_refused(folder):
    (folder / "train-000000.tar").write_bytes(b"")
    refuse(folder, "train-000000.tar: wanted", "found an empty file")


def test_a_shard_of_another_size_is_refused(folder):
    with (folder / "train-000000.tar").open("ab") as tar:
        tar.write(b"x")
    refuse(folder, "train-000000.tar: wanted", "bytes as in dataset.json, found")


def test_a_shard_newer_than_the_index_is_refused(folder):
    tar, index = folder / "train-000001.tar", folder / "train.index"
    os.utime(tar, ns=(2 * 10**18, 2 * 10**18))
    os.utime(index, ns=(2 * 10**18, 2 * 10**18))
    open_dataset(folder, "train")  # equal times are what a copy leaves
    os.utime(index, ns=(2 * 10**18, 2 * 10**18 - 1))
    refuse(
        folder,
        "train.index: wanted an index at least as new as train-000001.tar, found an older one",
        f"mvlm data index {folder}",
    )


def test_an_index_of_other_shards_is_refused(folder):
    shutil.copy(folder / "validation.index", folder / "train.index")
    refuse(
        folder,
        "train.index: wanted the index of the shards in dataset.json, found one of other shards",
        "--without-tars",
    )
    write_index(folder, "train")
    path = folder / "dataset.json"
    description = json.loads(path.read_text())
    description["splits"]["train"]["shards"][1]["sha256"] = "0" * 64
    path.write_text(json.dumps(description))
    refuse(folder, "found one of other shards", f"mvlm data index {folder} --without-tars")


def test_a_data_set_opens_the_same_from_its_index_and_from_dali_indices(folder, caplog):
    fast = open_dataset(folder, "train")
    assert not caplog.records
    content = (folder / "train.index").read_bytes()
    (folder / "train.index").unlink()
    with caplog.at_level(logging.INFO):
        slow = open_dataset(folder, "train")
    assert (
        f"opened from DALI indices; `mvlm data index {folder} --without-tars` writes an index that opens at once"
        in caplog.text
    )
    assert fast.fingerprint == slow.fingerprint
    assert fast.keys.tolist() == slow.keys.tolist()
    for i in range(8):
        assert fast.captions(i) == slow.captions(i) == make_captions(i)
        assert fast.image_bytes(i) == slow.image_bytes(i)
        assert fast.metadata(i) == slow.metadata(i)
    assert write_index(folder, "train").read_bytes() == content


def test_an_index_is_enough_without_dali_indices(folder):
    for path in folder.glob("*.idx"):
        path.unlink()
    assert open_dataset(folder, "train").captions(3) == make_captions(3)


def test_an_index_that_cannot_be_written_leaves_the_old_one(folder):
    before = (folder / "train.index").read_bytes()
    path = folder / "train-000001.idx"
    path.write_text(path.read_text().replace("txt ", "csv "))
    with pytest.raises(DataError, match=r"train-000001\.tar key train\d+: wanted at least one caption, found none"):
        write_index(folder, "train")
    assert (folder / "train.index").read_bytes() == before
    assert not list(folder.glob("*.tmp"))


@pytest.fixture
def unindexed(tmp_path):
    """Two splits of 8 images in a few shards, without a `<split>.index`, for tests that damage them."""
    folder = write_dataset(tmp_path / "data", 8, max_shard_bytes=50_000, splits=("train", "validation"))
    for path in folder.glob("*.index"):
        path.unlink()
    return folder


def rewrite_index(folder, change) -> None:
    path = folder / "train-000000.idx"
    path.write_text(change(path.read_text()))


def test_an_unreadable_tar_is_refused(unindexed):
    tar = unindexed / "train-000000.tar"
    tar.write_bytes(b"z" * tar.stat().st_size)
    os.utime(tar.with_suffix(".idx"))
    refuse(unindexed, "train-000000.tar: wanted a tar file, found something unreadable")


def test_a_missing_index_is_refused(unindexed):
    (unindexed / "train-000000.idx").unlink()
    refuse(unindexed, "train-000000.idx: wanted the index of train-000000.tar, found no such file", "wds2idx")


def test_an_index_older_than_its_tar_is_refused(unindexed):
    tar, index = unindexed / "train-000000.tar", unindexed / "train-000000.idx"
    os.utime(tar, ns=(10**18, 10**18))
    os.utime(index, ns=(10**18, 10**18))
    open_dataset(unindexed, "train")  # equal times are what a copy leaves
    os.utime(index, ns=(10**18, 10**18 - 1))
    refuse(
        unindexed,
        "train-000000.idx: wanted an index at least as new as train-000000.tar, found an older one",
        f"mvlm data index {unindexed}",
    )


def test_the_command_suggested_for_a_missing_index_works(unindexed):
    index = unindexed / "train-000000.idx"
    index.unlink()
    command = [sys.executable, "-m", "wds2idx", str(index.with_suffix(".tar")), str(index)]
    subprocess.run(command, check=True, capture_output=True)
    open_dataset(unindexed, "train")


def test_the_index_of_another_tar_is_refused(unindexed):
    sizes = [
        shard["samples"] for shard in json.loads((unindexed / "dataset.json").read_text())["splits"]["train"]["shards"]
    ]
    assert sizes[0] != sizes[-1]
    shutil.copy(unindexed / f"train-{len(sizes) - 1:06d}.idx", unindexed / "train-000000.idx")
    refuse(unindexed, f"train-000000.idx: wanted a v1.2 index of {sizes[0]} samples, found")


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace("png 512 ", "png 1024 "),  # another offset
        lambda text: text.replace("png 512 ", "png 99999744 "),  # past the end
        lambda text: text.replace(" 512 ", " 512 1"),  # another size
        lambda text: text.replace("train0000.png", "train0001.png"),  # another name
    ],
)
def test_an_index_of_another_tar_with_the_right_count_is_refused(unindexed, change):
    rewrite_index(unindexed, change)
    refuse(
        unindexed,
        "train-000000.idx: wanted the index of train-000000.tar, found that",
        "is not where it says",
        "wds2idx",
    )


@pytest.mark.parametrize(
    "change", [lambda t: t.replace("v1.2", "v1.1"), lambda t: "", lambda t: t + "\n", lambda t: t[: len(t) // 2]]
)
def test_an_index_that_is_truncated_or_of_another_version_is_refused(unindexed, change):
    rewrite_index(unindexed, change)
    refuse(unindexed, "train-000000.idx: wanted", "wds2idx")


def test_an_offset_that_no_tar_has_is_refused(unindexed):
    rewrite_index(unindexed, lambda text: text.replace("png 512 ", "png 513 "))
    refuse(
        unindexed,
        "train-000000.idx: wanted the index of train-000000.tar, found the image of a sample at an offset",
        "wds2idx",
    )


def test_an_index_with_a_damaged_line_is_refused(unindexed):
    rewrite_index(unindexed, lambda text: text.replace(" train0000.txt", ""))
    refuse(unindexed, "wanted `extension offset size name` of each component, found 11 words in a line")
    rewrite_index(unindexed, lambda text: text.replace("png 512", "png five"))
    refuse(unindexed, "wanted `extension offset size name` of each component")


def write_by_hand(folder, members: list[tuple[str, bytes]]) -> None:
    """Write a shard that ShardWriter would reject, with its index."""
    samples: dict[str, list[str]] = {}
    path = folder / "train-000000.tar"
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            key, extension = name.split(".", 1)
            samples.setdefault(key, []).append(f"{extension} {tar.offset + 512} {len(content)} {name}")
            tar.addfile(member, io.BytesIO(content))
    path.with_suffix(".idx").write_text(format_index([" ".join(parts) for parts in samples.values()]))
    shard = {"tar": path.name, "samples": len(samples), "bytes": path.stat().st_size, "sha256": ""}
    description = {
        "format_version": 1,
        "splits": {"train": {"samples": len(samples), "captions": 0, "shards": [shard]}},
    }
    (folder / "dataset.json").write_text(json.dumps(description))


@pytest.mark.parametrize("caption", [None, b"", b"\n", b"  \n\t\n"])
def test_a_sample_without_a_caption_is_refused(tmp_path, caption):
    sample = [("b.jpg", make_image(0, kind="JPEG"))] + ([] if caption is None else [("b.txt", caption)])
    write_by_hand(tmp_path, [("a.png", make_image(1)), ("a.txt", b"a"), *sample])
    refuse(tmp_path, "train-000000.tar", "key b", "wanted at least one caption, found none")


def test_a_sample_without_an_image_is_refused(tmp_path):
    write_by_hand(tmp_path, [("a.png", make_image(1)), ("a.txt", b"a"), ("b.gif", b"x"), ("b.txt", b"b")])
    refuse(tmp_path, "train-000000.tar key b: wanted an image (jpg, jpeg, png, webp), found none")


def test_a_sample_beyond_the_end_of_its_shard_is_refused(tmp_path):
    """Not among the samples whose headers are compared: DALI would map it, and reading it would end the process."""
    folder = write_dataset(tmp_path / "data", 8)
    (folder / "train.index").unlink()
    path = folder / "train-000000.idx"
    lines = path.read_text().splitlines()
    words = lines[3].split(" ")
    words[5] = str(512 * 10**6)
    path.write_text("\n".join([*lines[:3], " ".join(words), *lines[4:], ""]))
    refuse(folder, "train-000000.idx: wanted the index of", "the text of train0002 is not where it says", "wds2idx")
