"""WebDataset tars: CC3M and SBU from img2dataset, and tars of other tools."""

import gzip
import json
import tarfile
from collections.abc import Iterable
from pathlib import Path

import pytest

from mvlm_dataloading import DataError, open_dataset
from mvlm_dataloading.build.build import build_part
from mvlm_dataloading.sources.record import safe_key
from mvlm_dataloading.sources.webdataset import cc3m, webdataset
from support import published
from support.data import build_source, read_json_lines


def test_cc3m(tmp_path):
    published.img2dataset(tmp_path / "train")
    published.img2dataset(tmp_path / "validation", first=50, tars=1)
    found = build_source(cc3m([tmp_path / "train"], (tmp_path / "validation",)), tmp_path / "out")
    numbers = {"train": [0, 1, 2, 3, 5, 6, 7, 8], "validation": [50, 51, 52, 53]}
    assert {split: [*part.values()] for split, part in found.items()} == {
        split: [published.captions(i)[:1] for i in known] for split, known in numbers.items()
    }
    # Each download counts from 0.
    assert [*found["train"]][:2] == ["train-000000000", "train-000000001"]
    assert next(iter(found["validation"])) == "validation-000000000"
    assert open_dataset(tmp_path / "out", "train").metadata(4)["url"] == "https://example.org/5.jpg"
    assert [(line["key"], line["reason"]) for line in read_json_lines(tmp_path / "out/rejected.jsonl")] == [
        ("train-000000004", "image was not downloaded"),
        ("train-000010004", "image was not downloaded"),
        ("validation-000000004", "image was not downloaded"),
    ]


def test_a_share_of_the_training_tars_is_for_evaluation(tmp_path):
    """Every sample is in one split, whatever else is built with it, and copies of an image are in one split."""
    for tar in range(2):
        write_tar(tmp_path / f"{tar}.tar", [f"{tar}-{i}" for i in range(30)], first=30 * tar)
        write_tar(tmp_path / f"copies-{tar}.tar", [f"copy-{tar}-{i}" for i in range(30)], first=30 * tar)
    tars = [tmp_path / "0.tar", tmp_path / "1.tar"]
    found = build_source(webdataset(tars, 0.25, 0.25), tmp_path / "out")
    keys = sorted(key for part in found.values() for key in part)
    assert keys == sorted(f"{tar}-{i}" for tar in range(2) for i in range(30))
    assert all(6 <= len(found[split]) <= 24 for split in ("validation", "test"))
    one = build_source(webdataset(tars[:1], 0.25, 0.25), tmp_path / "one")
    assert all(part.keys() <= found[split].keys() for split, part in one.items())
    copies = build_source(webdataset([tmp_path / f"copies-{tar}.tar" for tar in range(2)], 0.25, 0.25), tmp_path / "c")
    assert {split: {f"copy-{key}" for key in part} for split, part in found.items()} == {
        split: set(part) for split, part in copies.items()
    }
    assert webdataset(tars, 0.25).recipe != webdataset(tars, 0.5).recipe
    held_out = webdataset(tars, 0.5, (tmp_path / "copies-0.tar",)).pieces
    assert [piece.split for piece in held_out] == ["train", "validation"] * 2 + ["test"]
    with pytest.raises(DataError, match="shares"):
        webdataset(tars, 0.75, 0.75)


def test_keys_of_several_downloads_are_prefixed(tmp_path):
    """Each download numbers its samples from 0, and other links failed in each."""
    for number, first in (("one", 0), ("two", 50)):
        published.img2dataset(tmp_path / number, first=first)
    found = build_source(cc3m([tmp_path / "one", tmp_path / "two"]), tmp_path / "out")
    wanted = [i for first in (0, 5, 50, 55) for i in range(first, first + 4)]
    assert [*found["train"].values()] == [published.captions(i)[:1] for i in wanted]
    assert [*found["train"]][:: len(wanted) - 1] == ["0-000000000", "1-000010003"]
    dataset = open_dataset(tmp_path / "out", "train")
    assert len({dataset.image_id(i) for i in range(len(dataset))}) == len(dataset)
    rejected = read_json_lines(tmp_path / "out/rejected.jsonl")
    assert {line["reason"] for line in rejected} == {"image was not downloaded"}
    assert rejected[-1]["where"] == f"{tmp_path / 'two' / '00001.tar'}:000010004"
    # The same tars in a folder each get other prefixes: another data set.
    tars = [tmp_path / number / f"0000{tar}.tar" for number in ("one", "two") for tar in (0, 1)]
    assert [*build_source(cc3m(tars), tmp_path / "tars")["train"]][-1] == "3-000010003"
    assert cc3m(tars).recipe != cc3m([tmp_path / "one", tmp_path / "two"]).recipe


def test_an_empty_image_id_gets_no_prefix(tmp_path):
    """An empty id with a prefix would become the name of all images of its folder."""
    for number, shade in (("one", 0), ("two", 50)):
        write_tar(tmp_path / number / "00000.tar", map(str, range(3)), "a word", first=shade, image_id="")
    build_source(webdataset([tmp_path / "one", tmp_path / "two"]), tmp_path / "out")
    dataset = open_dataset(tmp_path / "out", "train")
    assert {dataset.metadata(i).get("image_id") for i in range(6)} == {""}
    assert len({dataset.image_id(i) for i in range(6)}) == 6


def test_keys_of_tars_that_each_count_from_0_are_prefixed(tmp_path):
    for tar in range(3):
        write_tar(tmp_path / f"part.{tar}.tar.gz", map(str, range(2 if tar else 20)), f"{tar} {{}}", first=30 * tar)
    source = webdataset([tmp_path])
    found = build_source(source, tmp_path / "out")["train"]
    assert [*found.values()] == [[f"{tar} {k}"] for tar in range(3) for k in range(2 if tar else 20)]
    assert [*found][:2] == [safe_key("part.0-0"), safe_key("part.0-1")]
    # Without repeated keys there is no prefix.
    assert [*build_source(webdataset([tmp_path / "part.1.tar.gz"]), tmp_path / "alone")["train"]] == ["0", "1"]
    assert webdataset([tmp_path]).recipe == source.recipe
    with pytest.raises(DataError, match=r"part\.1\.tar\.gz: wanted each file once, found it twice"):
        webdataset([tmp_path], validation=(tmp_path / "part.1.tar.gz",))


def test_webdataset_of_other_tools(tmp_path):
    jpegs = [published.encoded(published.make_image(i)) for i in range(6)]
    with tarfile.open(tmp_path / "some.tar.gz", "w:gz") as tar:
        published.add_members(
            tar,
            [
                ("./a/one.JPG", jpegs[0]),
                ("./a/one.TXT", b"\xef\xbb\xbffirst\nsecond"),
                ("with.dots.in.it.jpeg", jpegs[1]),
                ("with.dots.in.it.json", json.dumps({"text": ["third", "fourth"]}).encode()),
                ("name with blanks.jpg", jpegs[2]),
                ("name with blanks.cls", b"7"),
                ("name with blanks.txt", b"fifth"),
            ],
        )
    found = build_source(webdataset(test=(tmp_path / "some.tar.gz",), caption_field="text"), tmp_path / "out")
    names = {"a/one": ["first", "second"], "with.dots.in.it": ["third", "fourth"], "name with blanks": ["fifth"]}
    assert found == {"test": {safe_key(name): captions for name, captions in names.items()}}


def write_tar(path: Path, keys: Iterable[str], text: str = "words", first: int = 0, **fields: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as tar:
        for number, key in enumerate(keys, first):
            image = published.encoded(published.make_image(number))
            published.add_members(tar, [(f"{key}.jpg", image), (f"{key}.txt", text.format(key).encode())])
            if fields:
                published.add_members(tar, [(f"{key}.json", json.dumps(fields).encode())])


def test_keys_in_common_behind_the_first_ones_are_kept_with_prefixes(tmp_path, caplog):
    for number, name in enumerate(("a", "b")):
        write_tar(tmp_path / "tars" / f"{name}.tar", [*(f"{number}-{k}" for k in range(16)), "last"])
    without = build_source(webdataset([tmp_path / "tars"]), tmp_path / "without")["train"]
    assert len(without) == 33
    assert "found 1 with the key of an earlier one, left out; if they are in several tars, give" in caplog.text
    found = build_source(webdataset([tmp_path / "tars"], prefix_keys=True), tmp_path / "out")["train"]
    assert [key for key in found if key.endswith("last")] == ["a-last", "b-last"]
    assert len(found) == 34
    tars = [tmp_path / "tars" / f"{name}.tar" for name in "ab"]
    assert "1-b-last" in build_source(webdataset(tars, prefix_keys=True), tmp_path / "several")["train"]


def test_tars_in_subfolders_are_read_too(tmp_path):
    for name in ("a.tar", "one/0.tar", "two/0.tar"):
        write_tar(tmp_path / "tars" / name, ["k"], name)
    found = build_source(webdataset([tmp_path / "tars"]), tmp_path / "tars" / "out")
    assert found == {"train": {"a-k": ["a.tar"], "one-0-k": ["one/0.tar"], "two-0-k": ["two/0.tar"]}}
    # The data set in the folder, and a part of one, are no part of what they were built from.
    build_part(webdataset([tmp_path / "tars"]), tmp_path / "tars" / "part", (1, 2), workers=0)
    assert build_source(webdataset([tmp_path / "tars"]), tmp_path / "tars" / "out") == found


def test_tars_of_an_evaluation_split_in_a_subfolder_are_never_trained_on(tmp_path):
    for number, name in enumerate(("0.tar", "val/1.tar")):
        write_tar(tmp_path / "tars" / name, [str(number)], name, first=number)
    with pytest.raises(DataError, match=r"val/1\.tar: wanted tars of the train split, found the folder val; name it"):
        webdataset([tmp_path / "tars"])
    found = build_source(webdataset([tmp_path / "tars"], (tmp_path / "tars" / "val",)), tmp_path / "out")
    assert found == {"train": {"train-0": ["0.tar"]}, "validation": {"validation-1": ["val/1.tar"]}}


def test_a_blank_text_does_not_hide_the_caption_in_the_metadata(tmp_path):
    write_tar(tmp_path / "a.tar", ["k"], "\n \u200b\n", caption="a word")
    assert build_source(webdataset([tmp_path / "a.tar"]), tmp_path / "out") == {"train": {"k": ["a word"]}}


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_tar_of_an_evaluation_split_is_not_taken_for_training_too(tmp_path, suffix):
    """All of its images would be left out of training. Its name, its place and its packing may differ."""
    for number, name in enumerate(("a", "b")):
        write_tar(tmp_path / f"{name}.tar", [f"{name}{i}" for i in range(3)], first=3 * number)
    one, two, copy = tmp_path / "a.tar", tmp_path / "b.tar", tmp_path / f"copy.tar{suffix}"
    copy.write_bytes(gzip.compress(one.read_bytes()) if suffix else one.read_bytes())
    with pytest.raises(DataError, match=r"a\.tar: wanted each file once, found it twice"):
        webdataset([one], test=(one,))
    message = r"a\.tar: wanted training tars .* found the same bytes in .*copy\.tar of (validation|test)"
    if suffix:  # other bytes, and the same images
        message = r"wanted training samples that are in no evaluation split, found that all 3 are in one"
    for validation, test in (((copy,), ()), ((), (copy,))):
        with pytest.raises(DataError, match=message):
            build_source(webdataset([one], validation, test), tmp_path / "out")
        assert not (tmp_path / "out").exists()
    if suffix:
        found = build_source(webdataset([one, two], test=(copy,)), tmp_path / "out")
        assert {split: len(part) for split, part in found.items()} == {"train": 3, "test": 3}
