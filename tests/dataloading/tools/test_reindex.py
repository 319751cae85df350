"""Rebuilding indices, and indexing tars of other tools in place."""

import itertools
import os
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mvlm_dataloading import DataError, Loader, Masking, ViewOptions, make_view, open_dataset, rebuild_indices
from support import published
from support.data import build_scripts, keys_of, problems_of, write_tar


def test_the_indices_of_splits_are_written_from_dali_indices(tmp_path, monkeypatch):
    """A view's indices always are; those of a data folder if reading no tar is asked for."""
    out, view = build_scripts(tmp_path / "out"), tmp_path / "view"
    make_view(view, [out], ViewOptions(match="number|a"))
    for folder in (out, view):
        before = {path.name: path.read_bytes() for path in folder.glob("*.index")}
        for name in before:
            (folder / name).unlink()
        with monkeypatch.context() as patch:
            patch.delattr(tarfile, "open")
            rebuild_indices(folder, without_tars=folder == out)
        assert "train.index" in before
        assert {path.name: path.read_bytes() for path in folder.glob("*.index")} == before
    (out / "train-000000.idx").unlink()
    with pytest.raises(DataError, match=r"train-000000\.idx"):
        rebuild_indices(out, without_tars=True)
    with pytest.raises(DataError, match=r"dataset\.json"):
        rebuild_indices(tmp_path, without_tars=True)


def foreign(folder: Path) -> None:
    """Tars as other tools write them: dots, blanks and capitals in names, and samples without a caption."""
    folder.mkdir()
    jpegs = [published.encoded(published.make_image(i)) for i in range(7)]
    members = [
        ("a/v1.0.final.jpg", jpegs[0]), ("a/v1.0.final.txt", b"dots"), ("a/v1.0.final.cls", b"3"),
        ("a name.JPG", jpegs[1]), ("a name.TXT", b"blanks"),
        ("100%.jpg", jpegs[2]), ("100%.txt", b"per cent"),
        ("mute.jpg", jpegs[3]), ("late.jpg", jpegs[3]),
        ("é.jpg", jpegs[4]), ("é.txt", b"accent"),
        ("n" * 120 + ".jpg", jpegs[5]), ("n" * 120 + ".txt", b"long"),
        ("late.txt", b"late"),
        ("latin.jpg", jpegs[3]), ("latin.txt", "\xe9t\xe9".encode("latin-1")),
        ("blank.jpg", jpegs[3]), ("blank.txt", b" \n" * 9),
        ("list.jpg", jpegs[3]), ("list.txt", b"list"), ("list.json", b"[1]"),
        ("book.jpg", jpegs[3]), ("book.txt", b"x" * (1 << 22) + b"y"),
        ("two.jpg", jpegs[3]), ("two.png", jpegs[3]), ("two.txt", b"two"),
    ]  # fmt: skip
    write_tar(folder / "train-0.tar", members, format=tarfile.PAX_FORMAT)
    write_tar(folder / "val-0.tar", [("v.jpg", jpegs[6]), ("v.txt", b"one\ntwo\n")])


def test_tars_of_other_tools_are_indexed_in_place(tmp_path, waves_tokenizer):
    foreign(tmp_path / "tars")
    before = {path.name: path.read_bytes() for path in (tmp_path / "tars").glob("*.tar")}
    description = rebuild_indices(tmp_path / "tars")
    assert description["rejected"] == {
        "files of a sample do not follow one another": 1,
        "sample has two files of the same kind": 1,
        "no caption": 2,
        "caption is not UTF-8": 1,
        "caption is too long": 1,
        "metadata is not a JSON object": 1,
    }
    assert {split: (part["samples"], part["captions"]) for split, part in description["splits"].items()} == {
        "train": (5, 5),
        "validation": (1, 2),
    }
    dataset = open_dataset(tmp_path / "tars", "train")
    assert dataset.keys.tolist() == ["a/v1.0.final", "a%20name", "100%25", "é", "n" * 120]
    assert [dataset.captions(i)[0] for i in range(5)] == ["dots", "blanks", "per cent", "accent", "long"]
    loader = Loader(dataset, waves_tokenizer, batch_size=5, image_size=54, text_length=8, seed=0, train=False,
                    masking=Masking(patch_size=9, mask_block=18))  # fmt: skip
    ((batch, _),) = list(loader)
    for row, i in enumerate((0, 1, 2, 4, 5)):
        wanted = np.asarray(published.make_image(i).resize((54, 54), Image.Resampling.BILINEAR), float).transpose(
            2, 0, 1
        )
        assert np.abs(batch.images[row].numpy() - wanted).mean() < 8
    assert problems_of(tmp_path / "tars") == []
    make_view(tmp_path / "view", [tmp_path / "tars"], ViewOptions(match="blanks|accent"))
    assert keys_of(tmp_path / "view") == ["a%20name", "é"]
    assert {path.name: path.read_bytes() for path in (tmp_path / "tars").glob("*.tar")} == before


def test_a_sample_whose_captions_cannot_be_seen_is_left_out(tmp_path):
    texts = ["a cat", "\u200b\n\x07", "\ufffd\na dog"]
    write_tar(tmp_path / "train.tar", texts)
    description = rebuild_indices(tmp_path)
    assert description["rejected"] == {"no caption": 1}
    assert keys_of(tmp_path) == ["0", "2"]
    assert rebuild_indices(tmp_path) == description  # from its dataset.json


def test_the_split_of_a_tar_is_a_word_of_its_name(tmp_path):
    names = {
        "train": ["train-000", "cc3m", "latest-0", "attest"],
        "validation": ["cc3m-validation-0000", "val2017-000", "coco_dev_1"],
        "test": ["test0", "flickr30k-test-00000"],
    }
    for name in itertools.chain(*names.values()):
        write_tar(tmp_path / f"{name}.tar", ["words"])
    splits = rebuild_indices(tmp_path)["splits"]
    assert {split: sorted(shard["tar"] for shard in part["shards"]) for split, part in splits.items()} == {
        split: sorted(f"{name}.tar" for name in of) for split, of in names.items()
    }
    with pytest.raises(DataError, match=r"wanted no split for a folder with dataset\.json, got test; remove"):
        rebuild_indices(tmp_path, "test")


@pytest.mark.parametrize("name", ["testA-000", "vqa_testdev_0", "minival2014-0"])
def test_evaluation_splits_of_other_names_do_not_become_training_data(tmp_path, name):
    write_tar(tmp_path / f"{name}.tar", ["words"])
    with pytest.raises(DataError, match=f"{name}.tar: wanted a split named .*, found '.*(test|val)"):
        rebuild_indices(tmp_path)
    assert list(rebuild_indices(tmp_path, "test")["splits"]) == ["test"]


def test_files_that_macos_adds_to_a_tar_are_left_out(tmp_path):
    image = published.encoded(published.make_image(0))
    members = [(f"{mark}{i}.{kind}", image if kind == "jpg" else b"words")
               for i in range(2) for kind in ("jpg", "txt") for mark in ("._", "")]  # fmt: skip
    write_tar(tmp_path / "train.tar", members)
    assert rebuild_indices(tmp_path)["rejected"] == {}
    assert keys_of(tmp_path) == ["0", "1"]


def test_tars_of_a_clock_that_is_ahead_open(tmp_path):
    write_tar(tmp_path / "train.tar", ["words"])
    soon = time.time() + 60
    os.utime(tmp_path / "train.tar", (soon, soon))
    rebuild_indices(tmp_path)
    assert len(open_dataset(tmp_path, "train")) == 1


def test_names_that_are_not_utf8_and_a_byte_order_mark(tmp_path):
    image = published.encoded(published.make_image(0))
    members = [
        ("café.jpg", image), ("café.txt", b"\xef\xbb\xbfa cat"), ("b.jpg", image), ("b.txt", b"\xef\xbb\xbf"),
    ]  # fmt: skip
    write_tar(tmp_path / "train.tar", members, format=tarfile.GNU_FORMAT, encoding="latin-1")
    assert rebuild_indices(tmp_path)["rejected"] == {"no caption": 1}
    dataset = open_dataset(tmp_path, "train")
    assert [dataset.captions(i) for i in range(len(dataset))] == [["a cat"]]
    assert dataset.image_bytes(0) == image


def test_tars_that_cannot_be_indexed_are_refused(tmp_path):
    with pytest.raises(DataError, match="wanted a folder of tars, found none"):
        rebuild_indices(tmp_path)
    whole = write_tar(tmp_path / "whole.part", 12 * ["words"]).read_bytes()
    damaged = whole.replace(b"ustar", b"\xff" * 5).replace(b"\xff" * 5, b"ustar", 6)  # from the fourth sample on
    for name, content in (
        ("empty", b""), ("gzip", b"\x1f\x8b" + bytes(600)), ("text", b"x" * 600), ("damaged", damaged),
    ):  # fmt: skip
        folder = tmp_path / name
        folder.mkdir()
        (folder / "a.tar").write_bytes(content)
        with pytest.raises(
            DataError, match=r"a\.tar: wanted a complete, uncompressed tar, found a file that is not one"
        ):
            rebuild_indices(folder)
        assert not list(folder.glob("*.idx")) + list(folder.glob("*.json"))
