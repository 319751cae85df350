"""A finished or unfinished data set of other input is not taken for the one to be built."""

import functools
import os
import shutil

import pytest

from mvlm_dataloading import DataError, build_shards
from mvlm_dataloading.sources.folder import folder
from mvlm_dataloading.sources.webdataset import webdataset
from support import published
from support.data import file_contents, write_tar

build = functools.partial(build_shards, workers=0)


def test_other_images_or_captions_make_another_data_set(tmp_path):
    """The changes keep the number of images and the first and last key, or add an image."""
    published.folder(tmp_path / "images")
    build(folder(tmp_path / "images"), tmp_path / "out")
    before = file_contents(tmp_path / "out")
    (tmp_path / "images").rename(tmp_path / "moved")
    moved, text = tmp_path / "moved", tmp_path / "moved/a/0.txt"
    os.utime(moved / "a/0.jpg")
    build(folder(moved), tmp_path / "out")  # moved, but the same input
    assert file_contents(tmp_path / "out") == before

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


def test_tars_of_equal_names_and_sizes_are_told_apart(tmp_path):
    """Tars are padded to 10 kB, so equal sizes say little."""
    for name, word in (("one", b"word"), ("two", b"drow")):
        (tmp_path / name).mkdir()
        write_tar(tmp_path / name / "0.tar", [word])
    assert len({(tmp_path / name / "0.tar").stat().st_size for name in ("one", "two")}) == 1
    build(webdataset([tmp_path / "one"]), tmp_path / "out")
    with pytest.raises(DataError, match="wanted a new folder or the data set webdataset"):
        build(webdataset([tmp_path / "two"]), tmp_path / "out")
