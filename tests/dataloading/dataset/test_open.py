"""Opening a split from its index."""

import json
import logging
import os
import shutil

import pytest

from mvlm_dataloading import DataError, open_dataset
from mvlm_dataloading.dataset.open import write_index
from support.data import make_captions, write_dataset


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
