"""Random access to the samples of a split."""

import hashlib
import os
import pickle
import shutil

import numpy as np
import pytest

from mvlm_dataloading import DataError, open_dataset
from mvlm_dataloading.dataset.dataset import image_identity, image_name
from mvlm_dataloading.randomness import text_hash
from support.data import make_captions, make_image, refuse_to_open, write_dataset, write_shard_by_hand


@pytest.fixture
def folder(tmp_path):
    """Two splits of 8 images in a few shards, for tests that damage them."""
    return write_dataset(tmp_path / "data", 8, max_shard_bytes=50_000, splits=("train", "validation"))


def test_dataset_gives_random_access_to_samples(waves_train):
    assert len(waves_train) == 60
    for i in (59, 0, 31, 17):
        assert waves_train.captions(i) == make_captions(i)
        assert waves_train.metadata(i) == {"number": i}
        assert waves_train.image_bytes(i) == make_image(i, kind=("PNG", "JPEG", "WEBP")[i % 3])
        assert waves_train.keys[i] == f"train{i:04d}"
        assert f"train{i:04d}" in waves_train.where(i)
        assert waves_train.image_id(i) == text_hash(waves_train.image_bytes(i))
    shards = waves_train.shard_of(np.arange(60)).tolist()
    assert shards == sorted(shards)
    assert np.bincount(shards).tolist() == waves_train.shard_sizes.tolist()


@pytest.mark.parametrize("given", [12, 0, 1.5, True, "coco 7", None, ""])
def test_image_id_comes_from_the_metadata_or_the_bytes(given):
    """By the bytes if it is empty: ITM's negatives are drawn from images of other ids."""
    hashed = b"image" if given in (None, "") else f"image_id {given}".encode()
    wanted = int.from_bytes(hashlib.blake2b(hashed, digest_size=8).digest(), "little", signed=True)
    assert image_identity({"image_id": given}, lambda: b"image") == wanted
    assert (image_name({"image_id": given}) is None) == (given in (None, ""))
    assert image_identity({}, lambda: b"image") == text_hash(b"image")


def test_a_data_set_can_be_pickled(waves_train, waves, tmp_path):
    """A mapped index is mapped again, and one in memory is copied."""
    assert pickle.loads(pickle.dumps(waves_train)).captions(5) == make_captions(5)
    assert len(pickle.dumps(waves_train)) < 5000
    shutil.copytree(waves, tmp_path / "old", ignore=shutil.ignore_patterns("*.index"))
    old = pickle.loads(pickle.dumps(open_dataset(tmp_path / "old", "train")))
    assert old.captions(5) == make_captions(5)
    assert old.fingerprint == waves_train.fingerprint


def test_a_shard_that_was_truncated_after_opening_is_refused_by_name(folder):
    dataset = open_dataset(folder, "train")
    last = len(dataset) - 1
    tar = dataset.tars[int(dataset.shard_of(last))]
    assert dataset.image_bytes(last)
    os.truncate(tar, int(dataset.locate("image", last)[0]) + 100)
    with pytest.raises(
        DataError, match=rf"{tar.name} offset .*: wanted the shard that was opened, found a shorter one"
    ):
        dataset.image_bytes(last)
    with pytest.raises(DataError, match=rf"{tar.name}: wanted \d+ bytes as in dataset\.json, found \d+ bytes; restore"):
        dataset.check_shards([int(dataset.shard_of(last))])
    dataset.check_shards([0])


def test_a_shard_is_compared_with_the_index_when_it_is_first_read(folder):
    dataset = open_dataset(folder, "train")
    tar = dataset.tars[0]
    content = tar.read_bytes()
    tar.write_bytes(bytes(len(content)))
    for read in (lambda: dataset.check_shards([0]), lambda: dataset.captions(0)):
        with pytest.raises(
            DataError, match=r"train\.index: wanted the index of train-000000\.tar, found that the image"
        ):
            read()
    tar.write_bytes(content)
    assert dataset.captions(0) == make_captions(0)


def test_captions_and_metadata_of_other_tools_are_read(tmp_path):
    write_shard_by_hand(
        tmp_path,
        [
            ("d/a.JPG", make_image(1, kind="JPEG")),
            ("d/a.txt", b"\xe7\x8c\xab\r\n\n two "),
            ("b.png", make_image(0)),
            ("b.txt", b"\xff"),
            ("b.json", b"[1]"),
            ("c.png", make_image(0)),
            ("c.txt", b"a caption longer than sixteen bytes"),
            ("c.json", b"{"),
        ],
    )
    refuse_to_open(tmp_path, "key b: wanted captions in UTF-8, found other bytes")
    with (tmp_path / "train-000000.tar").open("r+b") as tar:
        data = tar.read()
        tar.seek(data.index(b"\xff" + bytes(511)))
        tar.write(b"b")
    os.utime(tmp_path / "train-000000.idx")
    dataset = open_dataset(tmp_path, "train")
    assert dataset.keys.tolist() == ["d/a", "b", "c"]
    assert dataset.captions(0) == ["猫", "two"]
    assert dataset.metadata(0) == {}
    with pytest.raises(DataError, match="wanted metadata as a JSON object, found list"):
        dataset.metadata(1)
    with pytest.raises(DataError, match="wanted metadata as JSON, found"):
        dataset.metadata(2)


def test_rows_of_a_data_set_are_a_data_set(waves):
    whole = open_dataset(waves, "test")
    part = whole.rows(20, 45)
    assert len(part) == 25
    assert part.keys.tolist() == whole.keys.tolist()[20:45]
    for i in (0, 7, 24):
        assert part.captions(i) == whole.captions(20 + i)
        assert part.image_bytes(i) == whole.image_bytes(20 + i)
        assert part.locate("image", i) == whole.locate("image", 20 + i)
        assert part.shard_of(i) == whole.shard_of(20 + i)
        assert part.where(i) == whole.where(20 + i)
    assert part.shard_sizes.tolist() == np.bincount(part.shard_of(np.arange(25)), minlength=len(whole.tars)).tolist()
    again = part.rows(5, 10)
    assert again.keys.tolist() == whole.keys.tolist()[25:30]
    assert len({whole.fingerprint, part.fingerprint, whole.rows(20, 44).fingerprint, whole.head(45).fingerprint}) == 4
