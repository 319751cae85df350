"""Opening a split from its index, and from the DALI indices of its shards."""

import json
import os
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from mvlm_dataloading import DataError, open_dataset
from mvlm_dataloading.dataset.open import write_index
from support.data import make_captions, make_image, refuse_to_open, write_dataset, write_shard_by_hand

TAR, IDX = "train-000000.tar", "train-000000.idx"


@pytest.fixture
def folder(tmp_path):
    """Two splits of 8 images in a few shards, to be damaged."""
    return write_dataset(tmp_path / "data", 8, max_shard_bytes=50_000, splits=("train", "validation"))


@pytest.fixture
def unindexed(folder):
    """Copy of a data folder without a `<split>.index`."""
    for path in folder.glob("*.index"):
        path.unlink()
    return folder


def other_hash(folder: Path) -> None:
    description = json.loads((folder / "dataset.json").read_text())
    description["splits"]["train"]["shards"][1]["sha256"] = "0" * 64
    (folder / "dataset.json").write_text(json.dumps(description))


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda at: (at / TAR).unlink(), [TAR, "found no such file"]),
        (lambda at: (at / TAR).write_bytes(b""), [TAR, "found an empty file"]),
        (lambda at: (at / TAR).write_bytes((at / TAR).read_bytes() + b"x"), [TAR, "bytes as in dataset.json"]),
        (lambda at: shutil.copy(at / "validation.index", at / "train.index"), ["train.index", "--without-tars"]),
        (other_hash, ["train.index", "--without-tars"]),
        (lambda at: shutil.rmtree(at), ["data: wanted a data folder"]),
        (lambda at: (at / "dataset.json").unlink(), ["dataset.json"]),
    ],
)
def test_damage_beside_an_index_is_refused(folder, damage, words):
    damage(folder)
    refuse_to_open(folder, *words)


def test_the_command_that_an_error_names_can_be_pasted(unindexed):
    spaced = unindexed.rename(unindexed.with_name("my data"))
    (spaced / IDX).write_text("v1.2 0\n")
    os.utime(spaced / IDX, ns=(4 * 10**18, 4 * 10**18))
    with pytest.raises(DataError) as refused:
        open_dataset(spaced, "train")
    assert shlex.split(str(refused.value).split("`")[1]) == ["wds2idx", str(spaced / TAR), str(spaced / IDX)]
    write_index(write_dataset(spaced.with_name("other data"), 8), "train")
    shutil.copy(spaced.with_name("other data") / "train.index", spaced / "train.index")
    with pytest.raises(DataError) as refused:
        open_dataset(spaced, "train")
    assert shlex.split(str(refused.value).split("`")[1]) == ["mvlm", "data", "index", str(spaced), "--without-tars"]


def test_an_unknown_split_is_refused(folder):
    refuse_to_open(folder, "the split testing, found train, validation", split="testing")


def changed(change: Callable[[str], str]) -> Callable[[Path], object]:
    return lambda at: (at / IDX).write_text(change((at / IDX).read_text()))


def replaced(old: str, new: str) -> Callable[[Path], object]:
    return changed(lambda text: text.replace(old, new))


def no_tar(at: Path) -> None:
    (at / TAR).write_bytes(b"z" * (at / TAR).stat().st_size)
    os.utime(at / IDX)


def index_of_the_last(at: Path) -> None:
    shutil.copy(sorted(at.glob("train-*.idx"))[-1], at / IDX)


@pytest.mark.parametrize(
    "damage, words",
    [
        (no_tar, [TAR, "is not where it says"]),
        (lambda at: (at / IDX).unlink(), [IDX, "found no such file", "wds2idx"]),
        (index_of_the_last, [IDX, "wanted a v1.2 index of"]),
        (changed(lambda text: text.replace("v1.2", "v1.1")), [IDX, "wds2idx"]),
        (changed(lambda text: ""), [IDX, "wds2idx"]),
        (changed(lambda text: text + "\n"), [IDX, "wds2idx"]),
        (changed(lambda text: text[: len(text) // 2]), [IDX, "wds2idx"]),
        (replaced("png 512 ", "png 1024 "), [IDX, "is not where it says"]),
        (replaced("png 512 ", "png 99999744 "), [IDX, "is not where it says"]),
        (replaced(" 512 ", " 512 1"), [IDX, "is not where it says"]),
        (replaced("train0000.png", "train0001.png"), [IDX, "is not where it says"]),
        (replaced("png 512 ", "png 513 "), [IDX, "at an offset"]),
        (replaced(" train0000.txt", ""), [IDX, "11 words in a line"]),
        (replaced("png 512", "png five"), [IDX, "wanted `extension offset size name`"]),
    ],
)
def test_damage_of_a_dali_index_is_refused(unindexed, damage, words):
    damage(unindexed)
    refuse_to_open(unindexed, *words)


@pytest.mark.parametrize("index", ["train.index", IDX])
def test_an_index_may_be_as_old_as_its_tar_and_no_older(folder, index):
    if index == IDX:
        (folder / "train.index").unlink()
    for path in (folder / TAR, folder / index):
        os.utime(path, ns=(2 * 10**18, 2 * 10**18))
    open_dataset(folder, "train")  # equal times are what a copy leaves
    os.utime(folder / index, ns=(2 * 10**18, 2 * 10**18 - 1))
    refuse_to_open(folder, f"{index}: wanted an index at least as new as {TAR}", f"mvlm data index {folder}")


def test_a_data_set_opens_the_same_from_its_index_and_from_dali_indices(folder):
    fast = open_dataset(folder, "train")
    content = (folder / "train.index").read_bytes()
    (folder / "train.index").unlink()
    slow = open_dataset(folder, "train")
    assert fast.fingerprint == slow.fingerprint
    assert fast.keys.tolist() == slow.keys.tolist()
    for i in range(8):
        assert fast.captions(i) == slow.captions(i) == make_captions(i)
        assert fast.image_bytes(i) == slow.image_bytes(i)
        assert fast.metadata(i) == slow.metadata(i)
    assert write_index(folder, "train").read_bytes() == content
    for path in folder.glob("*.idx"):
        path.unlink()
    assert open_dataset(folder, "train").captions(3) == make_captions(3)


def test_an_index_that_cannot_be_written_leaves_the_old_one(folder):
    before = (folder / "train.index").read_bytes()
    replaced("txt ", "csv ")(folder)
    with pytest.raises(DataError, match=r"train-000000\.tar key train\d+: wanted at least one caption, found none"):
        write_index(folder, "train")
    assert (folder / "train.index").read_bytes() == before
    assert not list(folder.glob(".*"))


@pytest.mark.parametrize(
    "sample, wanted",
    [
        *(([("b.jpg", make_image(0, kind="JPEG")), *more], "at least one caption")
          for more in ([], *([("b.txt", text)] for text in (b"", b"\n", b"  \n\t\n")))),
        ([("b.gif", b"x"), ("b.txt", b"b")], "an image (jpg, jpeg, png, webp)"),
    ],
)  # fmt: skip
def test_a_sample_without_a_caption_or_an_image_is_refused(tmp_path, sample, wanted):
    write_shard_by_hand(tmp_path, [("a.png", make_image(1)), ("a.txt", b"a"), *sample])
    refuse_to_open(tmp_path, TAR, "key b", f"wanted {wanted}, found none")


def test_a_sample_beyond_the_end_of_its_shard_is_refused(tmp_path):
    """Not among the samples whose headers are compared: DALI would map it, and reading it would end the process."""
    folder = write_dataset(tmp_path / "data", 8)
    (folder / "train.index").unlink()
    lines = (folder / IDX).read_text().splitlines()
    words = lines[3].split(" ")
    words[5] = str(512 * 10**6)
    (folder / IDX).write_text("\n".join([*lines[:3], " ".join(words), *lines[4:], ""]))
    refuse_to_open(folder, IDX, "the text of train0002 is not where it says", "wds2idx")
