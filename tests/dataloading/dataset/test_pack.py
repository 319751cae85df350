"""Opening a split from the DALI indices of its shards."""

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile

import pytest

from mvlm_dataloading import DataError, open_dataset
from mvlm_dataloading.build.shard_writer import format_index
from support.data import make_image, write_dataset


@pytest.fixture
def folder(tmp_path):
    """Two splits of 8 images in a few shards, without a `<split>.index`, for tests that damage them."""
    folder = write_dataset(tmp_path / "data", 8, max_shard_bytes=50_000, splits=("train", "validation"))
    for path in folder.glob("*.index"):
        path.unlink()
    return folder


def refuse(folder, *words: str, split: str = "train") -> None:
    """Check that opening fails with a one-line message that contains all `words`."""
    with pytest.raises(DataError) as caught:
        open_dataset(folder, split)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def rewrite_index(folder, change) -> None:
    path = folder / "train-000000.idx"
    path.write_text(change(path.read_text()))


def test_an_unreadable_tar_is_refused(folder):
    tar = folder / "train-000000.tar"
    tar.write_bytes(b"z" * tar.stat().st_size)
    os.utime(tar.with_suffix(".idx"))
    refuse(folder, "train-000000.tar: wanted a tar file, found something unreadable")


def test_a_missing_index_is_refused(folder):
    (folder / "train-000000.idx").unlink()
    refuse(folder, "train-000000.idx: wanted the index of train-000000.tar, found no such file", "wds2idx")


def test_an_index_older_than_its_tar_is_refused(folder):
    tar, index = folder / "train-000000.tar", folder / "train-000000.idx"
    os.utime(tar, ns=(10**18, 10**18))
    os.utime(index, ns=(10**18, 10**18))
    open_dataset(folder, "train")  # equal times are what a copy leaves
    os.utime(index, ns=(10**18, 10**18 - 1))
    refuse(
        folder,
        "train-000000.idx: wanted an index at least as new as train-000000.tar, found an older one",
        f"mvlm data index {folder}",
    )


def test_the_command_suggested_for_a_missing_index_works(folder):
    index = folder / "train-000000.idx"
    index.unlink()
    command = [sys.executable, "-m", "wds2idx", str(index.with_suffix(".tar")), str(index)]
    subprocess.run(command, check=True, capture_output=True)
    open_dataset(folder, "train")


def test_the_index_of_another_tar_is_refused(folder):
    sizes = [
        shard["samples"] for shard in json.loads((folder / "dataset.json").read_text())["splits"]["train"]["shards"]
    ]
    assert sizes[0] != sizes[-1]
    shutil.copy(folder / f"train-{len(sizes) - 1:06d}.idx", folder / "train-000000.idx")
    refuse(folder, f"train-000000.idx: wanted a v1.2 index of {sizes[0]} samples, found")


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace("png 512 ", "png 1024 "),  # another offset
        lambda text: text.replace("png 512 ", "png 99999744 "),  # past the end
        lambda text: text.replace(" 512 ", " 512 1"),  # another size
        lambda text: text.replace("train0000.png", "train0001.png"),  # another name
    ],
)
def test_an_index_of_another_tar_with_the_right_count_is_refused(folder, change):
    rewrite_index(folder, change)
    refuse(
        folder, "train-000000.idx: wanted the index of train-000000.tar, found that", "is not where it says", "wds2idx"
    )


@pytest.mark.parametrize(
    "change", [lambda t: t.replace("v1.2", "v1.1"), lambda t: "", lambda t: t + "\n", lambda t: t[: len(t) // 2]]
)
def test_an_index_that_is_truncated_or_of_another_version_is_refused(folder, change):
    rewrite_index(folder, change)
    refuse(folder, "train-000000.idx: wanted", "wds2idx")


def test_an_offset_that_no_tar_has_is_refused(folder):
    rewrite_index(folder, lambda text: text.replace("png 512 ", "png 513 "))
    refuse(
        folder,
        "train-000000.idx: wanted the index of train-000000.tar, found the image of a sample at an offset",
        "wds2idx",
    )


def test_an_index_with_a_damaged_line_is_refused(folder):
    rewrite_index(folder, lambda text: text.replace(" train0000.txt", ""))
    refuse(folder, "wanted `extension offset size name` of each component, found 11 words in a line")
    rewrite_index(folder, lambda text: text.replace("png 512", "png five"))
    refuse(folder, "wanted `extension offset size name` of each component")


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
