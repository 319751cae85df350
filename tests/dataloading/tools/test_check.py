"""Checks of a data set: statistics, damage, keys, metadata and token ids; the contact sheet."""

import hashlib
import os
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mvlm_dataloading import DataError, Loader, ShardWriter, check_shards, make_view, open_dataset, rebuild_indices
from mvlm_dataloading.tools.check import contact_sheet, findings_table
from support import published
from support.data import build_scripts, problems_of, write_tar
from support.scenes import png, scene


def damage(path: Path, old: bytes, new: bytes, after: bytes = b"") -> None:
    content = path.read_bytes()
    at = content.index(old, content.index(after))
    path.write_bytes(content[:at] + new + content[at + len(old) :])
    for index in (path.with_suffix(".idx"), path.parent / "train.index"):
        os.utime(index)


def test_check_reports_statistics(tmp_path):
    out = build_scripts(tmp_path / "out")
    seen = []
    found = check_shards(out, workers=0, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (11, 11)
    train = found["train"]
    assert train.sizes == [(60 + 10 * i, 50) for i in range(10)]
    assert train.captions == [1, 2, *8 * [1]]
    assert train.words == [3, 2, 3, 1, 1, *6 * [2]]
    assert {"LATIN": 8, "CYRILLIC": 1, "NONE": 1}.items() <= train.scripts.items()
    assert sum(train.scripts.values()) == 11
    assert (train.formats, found["test"].formats) == ({"jpg": 10}, {"png": 1})
    assert problems_of(out) == []
    assert "rejected: 1 image file is empty" in findings_table(out, found)
    with Image.open(contact_sheet(out, tmp_path / "sheet.png")) as sheet:
        assert sheet.size == (8 * 168 + 8, 2 * 204 + 8)
        first = np.asarray(sheet.crop((8, 8, 168, 168)), float)
    # The test split comes first. Its image is centred in its cell, unscaled.
    image = np.asarray(published.make_image(90), float)  # 72 x 54
    assert np.abs(first[53 : 53 + 54, 44 : 44 + 72] - image).mean() < 2
    assert (first[:50] == 255).all()


def test_check_counts_repeated_captions(tmp_path):
    rows = [("a", "A red  star"), ("a", "one"), ("b", "a red star"), ("c", "two"), ("c", "three"), ("d", "four")]
    with ShardWriter(tmp_path / "d", name="", source="", licence="", attribution="", recipe={}) as writer:
        for i, (image, caption) in enumerate(rows):
            writer.add(str(i), png(scene(i)[0]), [caption], {"image_id": image}, split="test")
    text = findings_table(tmp_path / "d", check_shards(tmp_path / "d", workers=0))
    (line,) = [line.split(maxsplit=2) for line in text.splitlines() if line.startswith("repeated captions")]
    assert line[2] == "2 (R@1 of exact pairs at most 75.0 / 66.7 %)"


WEBP = published.encoded(published.make_image(0), "WEBP", exif=b"Exif\0\0II*\0\x08\0\0\0\0\0", icc_profile=b"abc")


@pytest.mark.parametrize(
    "members, wanted",
    [
        ([("a.webp", WEBP), ("a.txt", b"a")], ["DALI cannot read a WebP with EXIF data"]),
        ([("a.webp", WEBP[:40]), ("a.txt", b"a")], ["image cannot be decoded"]),
        (["a cat", "a dog\n\u200b\u0301"], ["key 1: wanted captions in which something can be seen"]),
    ],
)
def test_check_tells_of_others_samples_what_a_build_would_not_write(tmp_path, members, wanted):
    write_tar(tmp_path / "train-0.tar", members)
    rebuild_indices(tmp_path)
    problems = problems_of(tmp_path)
    assert len(problems) == len(wanted)
    assert all(part in problem for part, problem in zip(wanted, problems, strict=True))


@pytest.mark.parametrize(
    "metadata, good",
    [(b"[" * 100_000, False), (b'{"a": ' + b"9" * 5000 + b"}", False), (b'{"image_id": "\\ud800"}', True)],
    ids=["lists", "a long number", "half a pair"],
)
def test_odd_metadata_are_refused_or_accepted_by_check_and_loader_alike(
    tmp_path, waves_tokenizer, monkeypatch, metadata, good
):
    image = published.encoded(published.make_image(0))
    write_tar(tmp_path / "train-0.tar", [("a.jpg", image), ("a.txt", b"words"), ("a.json", metadata)])
    with monkeypatch.context() as other_tool:  # writes index lines that ours leaves out
        other_tool.setattr("mvlm_dataloading.tools.reindex.parse_metadata", lambda text, where: {})
        rebuild_indices(tmp_path)
    loader = Loader(
        open_dataset(tmp_path, "train"), waves_tokenizer, batch_size=1, image_size=32, text_length=8, seed=0
    )
    if good:
        assert problems_of(tmp_path) == []
        batch, _ = next(iter(loader))
        wanted = hashlib.blake2b(b"image_id \xed\xa0\x80", digest_size=8).digest()
        assert batch.image_id.tolist() == [int.from_bytes(wanted, "little", signed=True)]
    else:
        (found,) = problems_of(tmp_path)
        assert "wanted metadata as JSON" in found
        with pytest.raises(DataError, match="wanted metadata as JSON"):
            next(iter(loader))
    loader.close()


@pytest.mark.slow
def test_check_finds_and_names_damage(tmp_path):
    out = build_scripts(tmp_path / "out")
    damage(out / "train-000001.tar", b"number 5", b"number\xff5")
    found = problems_of(out)
    # Opening the split may report it too, because short captions are read then.
    assert len(found) in (2, 3)
    assert "train-000001.tar: wanted sha256" in found[-2]
    assert found[-1].startswith("train-000001.tar key k5: wanted captions in UTF-8")
    jpeg = open_dataset(out, "train").image_bytes(9)
    damage(out / "train-000002.tar", jpeg[200:], bytes(len(jpeg) - 200))
    (out / "train-000000.tar").unlink()
    found = problems_of(out)
    assert "train-000002.tar key k9: wanted an image, found that image cannot be decoded" in found
    assert "train-000000.tar: wanted a shard that dataset.json names, found no such file" in found[0]
    assert "train-000000.tar: wanted a shard and its index, found" in found[1]
    assert len(found) == 6  # the rest was checked anyway


@pytest.mark.slow
def test_check_finds_a_repeated_key(tmp_path):
    image = published.encoded(published.make_image(0))
    for name in ("train-0.tar", "train-1.tar"):
        write_tar(tmp_path / name, [("a.jpg", image), ("a.txt", b"a")])
    rebuild_indices(tmp_path)
    assert problems_of(tmp_path) == ["train: wanted unique keys, found a more than once"]
    make_view(tmp_path / "view", [build_scripts(tmp_path / "good")], weights=[2])
    assert problems_of(tmp_path / "view") == []  # a view may repeat keys


@pytest.mark.slow
def test_check_finds_token_ids_beyond_the_vocabulary(tmp_path, waves_tokenizer):
    waves_tokenizer.save(tmp_path / "tokenizer.json")
    out = build_scripts(tmp_path / "out", tokenizer=tmp_path / "tokenizer.json", text_length=8)
    assert problems_of(out) == []
    ids, _ = waves_tokenizer.encode(["number 6"], 8)
    tokens = np.array([len(ids), *ids], "<i4")
    for wrong, message in (
        ([*tokens[:-1], 70000], "k6: wanted captions of 3 token ids or more, from 0 to 399"),
        ([*tokens[:-1], -1], "k6: wanted captions of 3 token ids or more, from 0 to 399"),
        ([99, *tokens[1:]], "k6: wanted stored tokens of 1 captions"),
    ):
        damage(out / "train-000001.tar", tokens.tobytes(), np.array(wrong, "<i4").tobytes(), b"k6.tok")
        assert any(re.search(message, problem) for problem in problems_of(out))
        damage(out / "train-000001.tar", np.array(wrong, "<i4").tobytes(), tokens.tobytes(), b"k6.tok")


@pytest.mark.slow
def test_check_finds_an_index_that_differs_from_the_samples(tmp_path):
    out = build_scripts(tmp_path / "out")
    path, own = out / "train.index", open_dataset(out, "train").fingerprint
    content = bytearray(path.read_bytes())
    content[-1] ^= 1  # in the last key
    path.write_bytes(content)
    (found,) = problems_of(out)
    assert "train.index: wanted the stored checksum of the keys of shard 2" in found
    # A valid index of other samples: the first two lines of a shard are exchanged.
    dali = out / "train-000001.idx"
    lines = dali.read_text().splitlines()
    dali.write_text("\n".join([lines[0], lines[2], lines[1], *lines[3:], ""]))
    rebuild_indices(out, without_tars=True)
    dali.write_text("\n".join([*lines, ""]))
    (found,) = problems_of(out)
    assert found.startswith("train.index: wanted the samples of train-000001.tar as in its DALI index")
    rebuild_indices(out, without_tars=True)
    assert problems_of(out) == []
    assert open_dataset(out, "train").fingerprint == own
