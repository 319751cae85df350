import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import tarfile

import numpy as np
import pytest

from mvlm_dataloading import DataError, ShardWriter, open_dataset
from mvlm_dataloading.build.shard_writer import index_text
from mvlm_dataloading.randomness import text_hash


@pytest.fixture
def folder(tmp_path, make):
    """Two splits of 8 pictures in a few shards, to be broken."""
    return make.dataset(tmp_path / "data", 8, max_shard_bytes=50_000, splits=("train", "validation"))


def refuse(folder, *words: str, split: str = "train") -> None:
    """Opening fails with one line that holds all the words."""
    with pytest.raises(DataError) as caught:
        open_dataset(folder, split)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def rewrite_index(folder, change) -> None:
    path = folder / "train-000000.idx"
    path.write_text(change(path.read_text()))


def test_random_access(train_split, make):
    assert len(train_split) == 60
    for i in (59, 0, 31, 17):
        assert train_split.captions(i) == make.captions(i)
        assert train_split.metadata(i) == {"number": i}
        assert train_split.image_bytes(i) == make.picture(i, kind=("PNG", "JPEG", "WEBP")[i % 3])
        assert train_split.keys[i] == f"train{i:04d}"
        assert f"train{i:04d}" in train_split.where(i)
    assert train_split.shard.tolist() == sorted(train_split.shard.tolist())


def test_offsets_are_those_of_tarfile(train_split):
    for number, path in enumerate(train_split.tars):
        inside = np.flatnonzero(train_split.shard == number)
        with tarfile.open(path) as tar:
            members = {member.name: (member.offset_data, member.size) for member in tar}
        for part, extension in ((train_split.text, "txt"), (train_split.meta, "json"), (train_split.image, None)):
            for i in inside:
                wanted = extension or ("png", "jpg", "webp")[i % 3]
                assert members[f"{train_split.keys[i]}.{wanted}"] == (part.offset[i], part.size[i])


def test_image_id_is_the_sources_or_the_bytes(tmp_path, make):
    with ShardWriter(tmp_path / "d", name="", source="", licence="", attribution="", recipe={}) as writer:
        writer.add("a", make.picture(0), ["one"])
        writer.add("b", make.picture(0), ["two"])
        writer.add("c", make.picture(1), ["three"])
        writer.add("d", make.picture(2), ["four"], {"image_id": 12})
        writer.add("e", make.picture(3), ["five"], {"image_id": 12})
    dataset = open_dataset(tmp_path / "d", "train")
    ids = [dataset.image_id(i) for i in range(5)]
    assert ids[0] == ids[1] == text_hash(make.picture(0))
    assert ids[3] == ids[4]
    assert len(set(ids)) == 3


def test_fingerprint_follows_the_split_and_its_bytes(tmp_path, make, waves, train_split):
    assert open_dataset(waves, "train").fingerprint == train_split.fingerprint
    assert open_dataset(waves, "test").fingerprint != train_split.fingerprint
    shutil.copytree(waves, tmp_path / "copy")
    assert open_dataset(tmp_path / "copy", "train").fingerprint == train_split.fingerprint
    other = make.dataset(tmp_path / "other", 59, max_shard_bytes=150_000, kinds=("PNG", "JPEG", "WEBP"))
    assert open_dataset(other, "train").fingerprint != train_split.fingerprint


def test_an_index_of_another_name_is_a_view_with_a_fingerprint_of_its_own(folder):
    """Some of a shard's samples, in another order, without another tar."""
    whole = open_dataset(folder, "train")
    description = json.loads((folder / "dataset.json").read_text())
    shards = description["splits"]["train"]["shards"]
    lines = (folder / "train-000000.idx").read_text().splitlines()[1:]
    prints = set()
    for number, order in enumerate([[1, 0], [0, 1], [0], [1, 1]]):
        (folder / f"view{number}.idx").write_text(index_text([lines[i] for i in order]))
        shard = shards[0] | {"index": f"view{number}.idx", "samples": len(order)}
        description["splits"]["train"]["shards"] = [shard]
        (folder / "dataset.json").write_text(json.dumps(description))
        view = open_dataset(folder, "train")
        assert [view.keys[i] for i in range(len(view))] == [whole.keys[i] for i in order]
        assert [view.image_bytes(i) for i in range(len(view))] == [whole.image_bytes(i) for i in order]
        prints.add(view.fingerprint)
    assert len(prints | {whole.fingerprint}) == 5


def test_a_data_set_can_be_pickled(train_split, make):
    assert pickle.loads(pickle.dumps(train_split)).captions(5) == make.captions(5)


def test_missing_folder_and_description(tmp_path, folder):
    refuse(tmp_path / "nowhere", "nowhere: wanted a data folder, found none; `mvlm data` writes one")
    (folder / "dataset.json").unlink()
    refuse(folder, "dataset.json: wanted the data set's description, found no such file")


def one_shard(**changed) -> str:
    shard = {"tar": "train-000000.tar", "samples": 1, "bytes": 1, "sha256": ""} | changed
    return json.dumps({"format_version": 1, "splits": {"train": {"shards": [shard]}}})


@pytest.mark.parametrize(
    "text",
    [
        *("", "[]", "{}", '{"format_version": 1, "splits": {"train": {"shards": [{}]}}}', "\xff", "[" * 100_000),
        *(one_shard(tar=5), one_shard(samples="1"), one_shard(bytes=None), one_shard(sha256=[]), one_shard(index=5)),
        '{"format_version": ' + "9" * 5000 + "}",
    ],
    ids=lambda text: text[:60],
)
def test_a_description_that_is_none(folder, text):
    (folder / "dataset.json").write_text(text, encoding="latin-1")
    refuse(folder, "dataset.json: wanted the description of a data set, found")


def test_a_description_of_another_version(folder):
    description = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps(description | {"format_version": 99}))
    refuse(folder, "wanted format_version 1, found 99")


def test_unknown_split(folder):
    refuse(folder, "wanted the split testing, found train, validation; name one of these", split="testing")


def test_missing_shard(folder):
    (folder / "train-000001.tar").unlink()
    refuse(folder, "train-000001.tar: wanted a shard that dataset.json names, found no such file")


def test_empty_shard(folder):
    (folder / "train-000000.tar").write_bytes(b"")
    refuse(folder, "train-000000.tar: wanted", "found an empty file")


def test_shard_of_another_size(folder):
    with (folder / "train-000000.tar").open("ab") as tar:
        tar.write(b"x")
    refuse(folder, "train-000000.tar: wanted", "bytes as in dataset.json, found")


def test_unreadable_tar(folder):
    tar = folder / "train-000000.tar"
    tar.write_bytes(b"z" * tar.stat().st_size)
    os.utime(tar.with_suffix(".idx"))
    refuse(folder, "train-000000.tar: wanted a tar file, found something unreadable")


def test_missing_index(folder):
    (folder / "train-000000.idx").unlink()
    refuse(folder, "train-000000.idx: wanted the index of train-000000.tar, found no such file", "wds2idx")


def test_index_older_than_its_tar(folder):
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


def test_the_advice_for_an_index_works(folder):
    index = folder / "train-000000.idx"
    index.unlink()
    command = [sys.executable, "-m", "wds2idx", str(index.with_suffix(".tar")), str(index)]
    subprocess.run(command, check=True, capture_output=True)
    open_dataset(folder, "train")


def test_index_of_another_tar(folder):
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
        lambda text: text.replace("png 512 ", "png 99999999 "),  # past the end
        lambda text: text.replace(" 512 ", " 512 1"),  # another size
        lambda text: text.replace("train0000.png", "train0001.png"),  # another name
    ],
)
def test_index_with_the_right_count_of_another_tar(folder, change):
    rewrite_index(folder, change)
    refuse(
        folder, "train-000000.idx: wanted the index of train-000000.tar, found that", "is not where it says", "wds2idx"
    )


@pytest.mark.parametrize(
    "change", [lambda t: t.replace("v1.2", "v1.1"), lambda t: "", lambda t: t + "\n", lambda t: t[: len(t) // 2]]
)
def test_index_that_is_cut_or_of_another_version(folder, change):
    rewrite_index(folder, change)
    refuse(folder, "train-000000.idx: wanted", "wds2idx")


def test_index_with_a_damaged_line(folder):
    rewrite_index(folder, lambda text: text.replace(" train0000.txt", ""))
    refuse(folder, "wanted `extension offset size name` of each component, found 11 words in a line")
    rewrite_index(folder, lambda text: text.replace("png 512", "png five"))
    refuse(folder, "wanted `extension offset size name` of each component")


def write_by_hand(folder, members: list[tuple[str, bytes]]) -> None:
    """A shard that our writer would refuse, with an index that fits."""
    samples: dict[str, list[str]] = {}
    path = folder / "train-000000.tar"
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            key, extension = name.split(".", 1)
            samples.setdefault(key, []).append(f"{extension} {tar.offset + 512} {len(content)} {name}")
            tar.addfile(member, io.BytesIO(content))
    path.with_suffix(".idx").write_text(index_text([" ".join(parts) for parts in samples.values()]))
    shard = {"tar": path.name, "samples": len(samples), "bytes": path.stat().st_size, "sha256": ""}
    description = {
        "format_version": 1,
        "splits": {"train": {"samples": len(samples), "captions": 0, "shards": [shard]}},
    }
    (folder / "dataset.json").write_text(json.dumps(description))


@pytest.mark.parametrize("caption", [None, b"", b"\n", b"  \n\t\n"])
def test_sample_without_a_caption(tmp_path, make, caption):
    sample = [("b.jpg", make.picture(0, kind="JPEG"))] + ([] if caption is None else [("b.txt", caption)])
    write_by_hand(tmp_path, [("a.png", make.picture(1)), ("a.txt", b"a"), *sample])
    refuse(tmp_path, "train-000000.tar", "key b", "wanted at least one caption, found none")


def test_sample_without_an_image(tmp_path, make):
    write_by_hand(tmp_path, [("a.png", make.picture(1)), ("a.txt", b"a"), ("b.gif", b"x"), ("b.txt", b"b")])
    refuse(tmp_path, "train-000000.tar key b: wanted an image (jpg, jpeg, png, webp), found none")


def test_captions_and_metadata_of_other_writers(tmp_path, make):
    write_by_hand(
        tmp_path,
        [
            ("d/a.JPG", make.picture(1, kind="JPEG")),
            ("d/a.txt", b"\xe7\x8c\xab\r\n\n two "),
            ("b.png", make.picture(0)),
            ("b.txt", b"\xff"),
            ("b.json", b"[1]"),
            ("c.png", make.picture(0)),
            ("c.txt", b"a caption longer than sixteen bytes"),
            ("c.json", b"{"),
        ],
    )
    refuse(tmp_path, "key b: wanted captions in UTF-8, found other bytes")
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
