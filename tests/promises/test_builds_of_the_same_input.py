"""A finished or unfinished data set of other input is not taken for the one to be built."""

import os
import shutil
import tarfile
from pathlib import Path

import pytest

from mvlm_dataloading import DataError, build_shards
from mvlm_dataloading.sources.coco import coco
from mvlm_dataloading.sources.folder import folder
from mvlm_dataloading.sources.record import Source
from mvlm_dataloading.sources.webdataset import webdataset
from support import published


def build(source: Source, out: Path) -> Path:
    return build_shards(source, out, workers=0)


def contents(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.iterdir())}


def test_other_images_or_captions_make_another_data_set(tmp_path):
    """The changes keep the number of images and the first and last key, or add an image."""
    published.folder(tmp_path / "images")
    build(folder(tmp_path / "images"), tmp_path / "out")
    before = contents(tmp_path / "out")
    (tmp_path / "images").rename(tmp_path / "moved")
    moved, text = tmp_path / "moved", tmp_path / "moved/a/0.txt"
    os.utime(moved / "a/0.jpg")
    build(folder(moved), tmp_path / "out")  # moved, but the same input
    assert contents(tmp_path / "out") == before

    def caption() -> None:
        text.write_text(text.read_text().swapcase())

    def other_image() -> None:
        published.write_image(moved / "b/3.jpg", 77)

    def one_more() -> None:
        published.write_image(moved / "a/new.jpg", 78)

    for change in (caption, other_image, one_more):
        change()
        with pytest.raises(DataError, match="wanted a new folder or the data set folder"):
            build(folder(moved), tmp_path / "out")
        shutil.rmtree(tmp_path / "out")
        build(folder(moved), tmp_path / "out")


def test_a_killed_build_does_not_resume_with_other_captions(tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    published.folder(tmp_path / "images")
    with monkeypatch.context() as patch:
        patch.setattr("mvlm_dataloading.build.build.assemble", stop)
        with pytest.raises(KeyboardInterrupt):
            build(folder(tmp_path / "images"), tmp_path / "out")
    (tmp_path / "images/a/2.txt").write_text("another\n")
    with pytest.raises(DataError, match="found another one; finish it with its own command, or remove"):
        build(folder(tmp_path / "images"), tmp_path / "out")


def test_an_image_that_was_missing_makes_another_data_set(tmp_path):
    """Images that are unpacked later make another data set of the same annotations."""
    published.coco(tmp_path / "coco")
    late = tmp_path / "coco/val2014/COCO_val2014_000000000109.jpg"
    late.rename(tmp_path / "late.jpg")
    build(coco(tmp_path / "coco"), tmp_path / "out")
    (tmp_path / "late.jpg").rename(late)
    with pytest.raises(DataError, match="wanted a new folder or the data set coco"):
        build(coco(tmp_path / "coco"), tmp_path / "out")


def test_tars_of_equal_names_and_sizes_are_told_apart(tmp_path):
    """Tars are padded to 10 kB, so equal sizes say little."""
    for name, word in (("one", b"word"), ("two", b"drow")):
        (tmp_path / name).mkdir()
        with tarfile.open(tmp_path / name / "0.tar", "w") as tar:
            image = published.encoded(published.make_image(0))
            published.add_members(tar, [("a.jpg", image), ("a.txt", word)])
    assert len({(tmp_path / name / "0.tar").stat().st_size for name in ("one", "two")}) == 1
    build(webdataset([tmp_path / "one"]), tmp_path / "out")
    with pytest.raises(DataError, match="wanted a new folder or the data set webdataset"):
        build(webdataset([tmp_path / "two"]), tmp_path / "out")
