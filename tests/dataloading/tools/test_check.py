"""Checks of a data set: statistics, damage, keys, metadata and token ids; the contact sheet."""

import hashlib
import os
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mvlm_dataloading import (
    BuildOptions,
    DataError,
    Loader,
    build_shards,
    check_shards,
    make_view,
    open_dataset,
    rebuild_indices,
)
from mvlm_dataloading.sources.record import ListedPiece, Record, Source
from mvlm_dataloading.tools.check import contact_sheet, findings_table
from support import published
from support.data import state_fingerprint

CAPTIONS = {0: ["red and green"], 1: ["красный круг", "ein roter Kreis"], 2: ["赤い丸"], 3: ["7"]}


def write(out: Path, count: int = 10, **settings) -> Path:
    records = [
        Record(
            f"k{i}",
            published.encoded(published.make_image(i, (60 + 10 * i, 50))),
            CAPTIONS.get(i, [f"number {i}"]),
            "",
        )
        for i in range(count)
    ]
    test = [Record("t", published.encoded(published.make_image(90), "PNG"), ["a", "b", "c"], "")]
    pieces = [ListedPiece("train", records[k : k + 4]) for k in range(0, count, 4)]
    pieces.append(ListedPiece("test", [*test, Record("bad", b"", ["x"], "")]))
    return build_shards(Source("set", "tests", "CC0", {}, pieces), out, BuildOptions(**settings), workers=0)


def damage(path: Path, old: bytes, new: bytes, after: bytes = b"") -> None:
    content = path.read_bytes()
    at = content.index(old, content.index(after))
    path.write_bytes(content[:at] + new + content[at + len(old) :])
    for index in (path.with_suffix(".idx"), path.parent / "train.index"):
        os.utime(index)


def problems(folder: Path) -> list[str]:
    return [problem for findings in check_shards(folder, workers=0).values() for problem in findings.problems]


def test_check_reports_statistics(tmp_path):
    out = write(tmp_path / "out")
    seen = []
    found = check_shards(out, workers=0, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (11, 11)
    train = found["train"]
    assert train.sizes == [(60 + 10 * i, 50) for i in range(10)]
    assert train.captions == [1, 2, *8 * [1]]
    assert train.words == [3, 2, 3, 1, 1, *6 * [2]]
    assert train.scripts == {"LATIN": 8, "CYRILLIC": 1, "CJK": 1, "NONE": 1} or train.scripts == {
        "LATIN": 8, "CYRILLIC": 1, "HIRAGANA": 1, "NONE": 1,
    }  # fmt: skip
    assert (train.formats, found["test"].formats) == ({"jpg": 10}, {"png": 1})
    assert problems(out) == []
    rows = {line.split("  ")[0]: line.split() for line in findings_table(out, found).splitlines()}
    assert rows["images"] == ["images", "1", "10"]
    assert rows["captions"] == ["captions", "3", "11"]
    assert rows["long side, pixels"][-5:] == ["60", "/", "105", "/", "150"]
    assert rows["width over height"][-5:] == ["1.20", "/", "2.10", "/", "3.00"]
    assert "rejected: 1 image file is empty" in findings_table(out, found)


def test_check_counts_transparent_images_of_tars_in_place(tmp_path):
    clear, opaque = (published.encoded(Image.new("RGBA", (32, 32), (9, 9, 9, a)), "PNG") for a in (0, 255))
    with tarfile.open(tmp_path / "train-0.tar", "w") as tar:
        published.add_members(tar, [("a.png", clear), ("a.txt", b"a"), ("b.png", opaque), ("b.txt", b"b")])
    rebuild_indices(tmp_path)
    found = check_shards(tmp_path, workers=0)
    assert found["train"].transparent == 1
    assert "transparent images  1" in findings_table(tmp_path, found)
    assert "transparent" not in findings_table(tmp_path, check_shards(write(tmp_path / "out"), workers=0))


def test_check_tells_a_webp_whose_exif_data_dali_does_not_find_from_a_damaged_one(tmp_path):
    webp = published.encoded(published.make_image(0), "WEBP", exif=b"Exif\0\0II*\0\x08\0\0\0\0\0", icc_profile=b"abc")
    with tarfile.open(tmp_path / "train-0.tar", "w") as tar:
        published.add_members(tar, [("a.webp", webp), ("a.txt", b"a"), ("b.webp", webp[:40]), ("b.txt", b"b")])
    rebuild_indices(tmp_path)
    assert problems(tmp_path) == [
        "train-0.tar key a: wanted an image, found that DALI cannot read a WebP with EXIF data behind a chunk of odd "
        "length; `mvlm data webdataset` moves them",
        "train-0.tar key b: wanted an image, found that image cannot be decoded",
    ]


@pytest.mark.parametrize(
    "metadata, problem",
    [
        (b"[" * 100_000, "wanted metadata as JSON, found"),
        (b'{"a":' * 100_000, "wanted metadata as JSON, found"),
        (b'{"a": ' + b"9" * 5000 + b"}", "wanted metadata as JSON, found"),
        (b'{"image_id": "\\ud800"}', None),
    ],
    ids=["lists", "objects", "a long number", "half a pair"],
)
def test_odd_metadata_are_refused_or_accepted_by_check_and_loader_alike(
    tmp_path, tokenizer, monkeypatch, metadata, problem
):
    image = published.encoded(published.make_image(0))
    with tarfile.open(tmp_path / "train-0.tar", "w") as tar:
        published.add_members(tar, [("a.jpg", image), ("a.txt", b"words"), ("a.json", metadata)])
    with monkeypatch.context() as other_tool:  # writes index lines that ours leaves out
        other_tool.setattr("mvlm_dataloading.tools.reindex.parse_metadata", lambda text, where: {})
        rebuild_indices(tmp_path)
    loader = Loader(open_dataset(tmp_path, "train"), tokenizer, batch_size=1, image_size=32, text_length=8, seed=0)
    if problem is None:
        assert problems(tmp_path) == []
        batch, _ = next(iter(loader))
        wanted = hashlib.blake2b(b"image_id \xed\xa0\x80", digest_size=8).digest()
        assert batch.image_id.tolist() == [int.from_bytes(wanted, "little", signed=True)]
    else:
        (found,) = problems(tmp_path)
        assert problem in found
        with pytest.raises(DataError, match=problem):
            next(iter(loader))
    loader.close()


@pytest.mark.slow
def test_check_finds_and_names_damage(tmp_path):
    out = write(tmp_path / "out")
    damage(out / "train-000001.tar", b"number 5", b"number\xff5")
    found = problems(out)
    # Opening the split may report it too, because short captions are read then.
    assert len(found) in (2, 3)
    assert "train-000001.tar: wanted sha256" in found[-2]
    assert found[-1].startswith("train-000001.tar key k5: wanted captions in UTF-8")
    other = write(tmp_path / "other")
    jpeg = open_dataset(other, "train").image_bytes(9)
    damage(other / "train-000002.tar", jpeg[200:], bytes(len(jpeg) - 200))
    assert "train-000002.tar key k9: wanted an image, found that image cannot be decoded" in problems(other)
    (other / "train-000000.tar").unlink()
    found = problems(other)
    assert "train-000000.tar: wanted a shard that dataset.json names, found no such file" in found[0]
    assert "train-000000.tar: wanted a shard and its index, found" in found[1]
    assert len(found) == 4  # the rest was checked anyway


@pytest.mark.slow
def test_check_finds_a_repeated_key(tmp_path):
    out = write(tmp_path / "out")
    damage(out / "train-000002.tar", b"k8.jpg", b"k1.jpg")
    damage(out / "train-000002.tar", b"k8.txt", b"k1.txt")
    damage(out / "train-000002.tar", b"k8.json", b"k1.json")
    for member in ("jpg", "txt", "json"):  # the checksums of the headers
        content = bytearray((out / "train-000002.tar").read_bytes())
        at = content.index(f"k1.{member}".encode())
        content[at + 148 : at + 156] = b" " * 8
        content[at + 148 : at + 156] = b"%06o\0 " % sum(content[at : at + 512])
        (out / "train-000002.tar").write_bytes(content)
    rebuild_indices(out)
    assert "train: wanted unique keys, found k1 more than once" in problems(out)
    make_view(tmp_path / "view", [write(tmp_path / "good")], weights=[2])
    assert problems(tmp_path / "view") == []  # a view may repeat keys


@pytest.mark.slow
def test_check_finds_token_ids_beyond_the_vocabulary(tmp_path, tokenizer):
    tokenizer.save(tmp_path / "tokenizer.json")
    out = write(tmp_path / "out", tokenizer=tmp_path / "tokenizer.json", text_length=8)
    assert problems(out) == []
    ids, _ = tokenizer.encode(["number 6"], 8)
    tokens = np.array([len(ids), *ids], "<i4")
    for wrong, message in (
        ([*tokens[:-1], 70000], "k6: wanted token ids below 400, found .* to 70000"),
        ([*tokens[:-1], -1], "k6: wanted token ids below 400, found -1 to"),
        ([99, *tokens[1:]], "k6: wanted a caption's token ids, found a count of 99 before"),
    ):
        damage(out / "train-000001.tar", tokens.tobytes(), np.array(wrong, "<i4").tobytes(), b"k6.tok")
        assert any(re.search(message, problem) for problem in problems(out))
        damage(out / "train-000001.tar", np.array(wrong, "<i4").tobytes(), tokens.tobytes(), b"k6.tok")


@pytest.mark.slow
def test_check_finds_an_index_that_differs_from_the_dali_indices(tmp_path):
    out = write(tmp_path / "out")
    path = out / "train.index"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1  # in the last key
    path.write_bytes(content)
    (found,) = problems(out)
    assert (
        "train.index: wanted the stored checksum of the keys of shard 2, found other bytes; `mvlm data index" in found
    )
    # A valid index of other samples: the first two lines of a shard are exchanged.
    dali = out / "train-000001.idx"
    lines = dali.read_text().splitlines()
    dali.write_text("\n".join([lines[0], lines[2], lines[1], *lines[3:], ""]))
    rebuild_indices(out, without_tars=True)
    dali.write_text("\n".join([*lines, ""]))
    (found,) = problems(out)
    assert found.startswith("train.index: wanted the samples of train-000001.tar as in its DALI index, found others; ")
    rebuild_indices(out, without_tars=True)
    assert problems(out) == []


def test_check_finds_a_fingerprint_that_an_index_states_without_having_it(tmp_path):
    out = write(tmp_path / "out")
    own = open_dataset(out, "train").fingerprint
    state_fingerprint(out / "train.index", open_dataset(out, "test").fingerprint)
    hint = f"`mvlm data index {out} --without-tars`"
    assert problems(out) == [f"train.index: wanted the fingerprint of its samples, found another; {hint}"]
    rebuild_indices(out, without_tars=True)
    assert (problems(out), open_dataset(out, "train").fingerprint) == ([], own)


def test_check_names_captions_in_which_nothing_can_be_seen(tmp_path):
    """Builds drop them. In tars of other tools they would end the training of some tokenizers."""
    (tmp_path / "tars").mkdir()
    with tarfile.open(tmp_path / "tars" / "train-0.tar", "w") as tar:
        for i, text in enumerate(("a cat", "a dog\n\u200b\u0301")):
            image = published.encoded(published.make_image(i))
            published.add_members(tar, [(f"{i}.jpg", image), (f"{i}.txt", text.encode())])
    rebuild_indices(tmp_path / "tars")
    assert problems(tmp_path / "tars") == [
        r"train-0.tar key 1: wanted captions in which something can be seen, found '\u200b\u0301'; "
        "remove the caption, or build the data set again"
    ]


@pytest.mark.slow
def test_contact_sheet_shows_images_and_captions(tmp_path):
    out = write(tmp_path / "out")
    path = contact_sheet(out, tmp_path / "sheet.png")
    with Image.open(path) as sheet:
        assert sheet.size == (8 * 168 + 8, 2 * 204 + 8)
        first = np.asarray(sheet.crop((8, 8, 168, 168)), float)
    # The test split comes first. Its image is centred in its cell, unscaled.
    image = np.asarray(published.make_image(90), float)  # 72 x 54
    assert np.abs(first[53 : 53 + 54, 44 : 44 + 72] - image).mean() < 2
    assert (first[:50] == 255).all()
