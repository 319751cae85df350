"""Parts of a data set, and their merge: the bytes of one machine's build, whatever the parts."""

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from mvlm_dataloading import BuildOptions, DataError, build_part, build_shards, merge_parts, open_dataset
from mvlm_dataloading.build.build import parse_part
from mvlm_dataloading.dataset import folders
from mvlm_dataloading.sources.record import ListedPiece, Record, Source
from support import published
from support.data import build_records, file_contents, make_record, read_json_lines
from support.faults.faulty_proxy import serve_faulty
from support.object_store import forget_stores, serve_s3

OPTIONS = BuildOptions(shard_bytes=20_000, drop_duplicates=True)


def record(number: int, image: int | None = None) -> Record:
    return make_record(f"k{number}", published.make_image(number if image is None else image), [f"caption {number}"])


@pytest.fixture(scope="module")
def source() -> Source:
    """Five pieces. Each pair of equal images, and the leaked one, lie in pieces of different parts."""
    pieces = [
        ListedPiece("test", [record(0), record(1)]),
        ListedPiece("train", [record(2), record(3), record(4, image=1)]),
        ListedPiece("train", [record(5), make_record("broken", published.make_image(6), [])]),
        ListedPiece("train", [record(7, image=2), record(8)]),
        ListedPiece("train", [record(9), record(8, image=10)]),  # a key that was used before
    ]
    return Source("set", "tests", "CC0", {"made": 1}, pieces, "nobody")


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory) -> dict[str, bytes]:
    return file_contents(build_shards(source, tmp_path_factory.mktemp("whole") / "out", OPTIONS, workers=0))


def build_parts(source: Source, folder: Path, count: int, options: BuildOptions = OPTIONS, **settings) -> list[Path]:
    return [
        build_part(source, folder / f"{i}", (i, count), options, workers=0, **settings) for i in range(1, count + 1)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_parts_merge_to_the_bytes_of_one_build(source, whole, tmp_path, count):
    """With seven parts of five pieces, two parts are empty."""
    parts = build_parts(source, tmp_path, count)
    merged = merge_parts(parts[::-1], tmp_path / "out")
    assert file_contents(merged) == whole
    assert {line["reason"] for line in read_json_lines(merged / "rejected.jsonl")} == {
        "image is in an evaluation split", "image is a duplicate", "key was used before", "no caption"
    }  # fmt: skip
    assert open_dataset(merged, "train").keys.tolist() == ["k2", "k3", "k5", "k8", "k9"]
    assert merge_parts(parts, tmp_path / "out") == merged  # the parts are still there
    assert {path.name for path in tmp_path.iterdir()} == {"out", *(part.name for part in parts)}


def test_a_merge_copies_where_files_cannot_be_linked(source, whole, tmp_path, monkeypatch):
    def no_links(*_):
        raise OSError(1, "Operation not permitted")

    def killed(path: Path, to: Path) -> None:
        to.write_bytes(path.read_bytes()[:99])
        raise KeyboardInterrupt

    parts = build_parts(source, tmp_path, 2)
    monkeypatch.setattr(os, "link", no_links)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", killed)
        with pytest.raises(KeyboardInterrupt):
            merge_parts(parts, tmp_path / "out")
    out = merge_parts(parts, tmp_path / "out")
    assert file_contents(out) == whole
    assert len(open_dataset(out, "train")) == 5  # no index is older than its tar


@pytest.mark.slow
def test_parts_know_the_tokenizer_and_the_evaluation_sets(source, tmp_path, waves_tokenizer):
    waves_tokenizer.save(tmp_path / "tokenizer.json")
    options = BuildOptions(tokenizer=tmp_path / "tokenizer.json", text_length=8)
    other = build_records(tmp_path / "other", {"validation": [record(5)]})
    whole = build_shards(source, tmp_path / "whole", options, evaluation_sets=[other], workers=0)
    parts = build_parts(source, tmp_path, 2, options, evaluation_sets=[other])
    (tmp_path / "tokenizer.json").unlink()
    assert file_contents(merge_parts(parts, tmp_path / "out")) == file_contents(whole)
    assert "k5" not in open_dataset(tmp_path / "out", "train").keys.tolist()
    description = json.loads((other / "dataset.json").read_text())
    (other / "dataset.json").write_text(json.dumps(description | {"licence": "another"}))
    with pytest.raises(DataError, match="other: wanted the data sets of --against as the parts were built with"):
        merge_parts(parts, tmp_path / "late")


def test_missing_and_unfitting_parts_are_refused(source, tmp_path):
    one, two, three, four = build_parts(source, tmp_path, 4)
    other = build_part(source, tmp_path / "other", (2, 4), BuildOptions(quality=50), workers=0)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "text").write_text("precious")
    out = tmp_path / "out"
    for refused, message in (
        (lambda: merge_parts([one, three], out), "wanted all 5 pieces, found 3; name or finish the parts 2/4, 4/4"),
        (lambda: merge_parts([one, two, three, four, out], out), "out: wanted a part of a build"),
        (lambda: merge_parts([], out), "wanted the folders of all parts"),
        (lambda: merge_parts([one, other, three, four], out), "other: wanted the same input and options"),
        (lambda: build_part(source, one, (2, 4), OPTIONS, workers=0), "wanted an unfinished build of this input"),
        (lambda: build_part(source, tmp_path / "mine", (1, 1), OPTIONS, workers=0), "mine: wanted a new or an empty"),
    ):
        with pytest.raises(DataError, match=message):
            refused()
    assert not out.exists()
    assert (tmp_path / "mine" / "text").read_text() == "precious"


@pytest.mark.parametrize("text", ["", "3", "0/2", "3/2", "1/0", "-1/2", "1/2/3", "a/b", "1.5/2"])
def test_a_part_is_i_of_n(text):
    assert parse_part("2/2") == (2, 2)
    with pytest.raises(DataError, match="part: wanted i/n"):
        parse_part(text)


@pytest.fixture
def bucket(data_cache) -> Iterator[str]:
    """An empty object store, and an empty cache of this machine."""
    with serve_s3("pairs"):
        yield "s3://pairs"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the server's and the client's packages
def test_parts_and_their_merge_at_an_object_store(source, whole, bucket, data_cache, tmp_path, monkeypatch):
    """A part's upload fails at its last file; the part is resumed; no finished piece is uploaded again."""
    s3 = f"{bucket}/work"
    parts = [f"{s3}/parts/{i}" for i in (1, 2)]
    put, stored = folders.RemoteFolder.put, []

    def failing(self, path, name):
        if name == "pieces/000002/shards.json" and name not in stored:
            stored.append(name)
            raise OSError("the network is gone")
        stored.append(name)
        put(self, path, name)

    with monkeypatch.context() as patch:
        patch.setattr(folders.RemoteFolder, "put", failing)
        with pytest.raises(OSError, match="the network is gone"):
            build_part(source, parts[0], (1, 2), OPTIONS, workers=0)
        with pytest.raises(DataError, match="wanted all 5 pieces, found 1"):
            merge_parts(parts[:1], tmp_path / "early")
        build_part(source, parts[0], (1, 2), OPTIONS, workers=0)
        assert stored.count("pieces/000000/shards.json") == 1
        build_part(source, parts[1], (2, 2), OPTIONS, workers=0)
    cut = Counter[str]()

    def cut_twice(method: str, path: str) -> str | None:
        cut[path] += method == "GET"
        return "length" if method == "GET" and "/pieces/" in path and cut[path] <= 2 else None

    with serve_faulty(os.environ["AWS_ENDPOINT_URL"], cut_twice) as (address, happened), monkeypatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", address)
        forget_stores()
        assert file_contents(merge_parts(parts, tmp_path / "local")) == whole
        assert happened["length"] > 2 * len(whole)
    forget_stores()
    merge_parts(parts, f"{s3}/deep/set")
    merge_parts(parts, f"{s3}/deep/set")  # and is recognised
    build_shards(source, f"{s3}/deep/direct", OPTIONS, workers=0)
    remote = folders.RemoteFolder(s3)
    for name in ("set", "direct"):
        assert {path: remote.read(f"deep/{name}/{path}", 1 << 30) for path in whole} == whole
    assert {name.split("/")[1] for name in remote.names("deep")} == {"set", "direct"}
    assert open_dataset(f"{s3}/deep/set", "train").keys.tolist() == ["k2", "k3", "k5", "k8", "k9"]
    with pytest.raises(DataError, match="wanted a new folder or the data set set"):
        build_shards(source, f"{s3}/deep/set", BuildOptions(quality=50), workers=0)
    assert not list((data_cache / "builds").glob("*/pieces/*"))
    build_shards(source, "s3://pairs", OPTIONS, workers=0)  # the bucket itself, which has no folder beside it
    assert {path: folders.RemoteFolder("s3://pairs").read(path, 1 << 30) for path in whole} == whole
