"""Builds: equal bytes, resuming after a kill, locks, crashes of the decoder, and a full disk."""

import resource
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from mvlm_dataloading import BuildOptions, DataError, build_shards, open_dataset
from mvlm_dataloading.build import workers
from mvlm_dataloading.build.piece import CRASHED
from mvlm_dataloading.sources.folder import folder
from mvlm_dataloading.sources.record import ListedPiece, Source, cut_into_pieces
from support import published
from support.data import (
    build_records,
    file_contents,
    keys_of,
    killed_before_assembly,
    make_record,
    read_json_lines,
    shard_writer,
)
from support.faults.pieces import DEADLY, DeadlyPiece

ONE = {"train": [make_record("a", published.make_image(0))]}


@pytest.mark.slow
def test_a_build_does_not_depend_on_the_number_of_processes(tmp_path, monkeypatch):
    monkeypatch.setattr("mvlm_dataloading.sources.record.PIECE_RECORDS", 7)
    published.folder(tmp_path / "images", 30)
    (tmp_path / "images/a/0.jpg").write_bytes(b"broken")
    whole = folder(tmp_path / "images", test=0.2)
    records = {}
    for piece in whole.pieces:
        records.setdefault(piece.split, []).extend(piece.records(1))
    source = Source("folder", "", "", whole.recipe, cut_into_pieces(records))
    seen, options = [], BuildOptions(shard_bytes=20_000)
    one = build_shards(source, tmp_path / "one", options, workers=0)
    two = build_shards(source, tmp_path / "two", options, workers=2, progress=seen.append)
    assert file_contents(one) == file_contents(two)
    assert len(open_dataset(one, "train").tars) > 4
    assert (seen[-1].pieces, seen[-1].of_pieces, seen[-1].records) == (5, 5, 30)


@pytest.mark.slow
def test_a_killed_build_is_not_resumed_by_another_build(tmp_path):
    records = {"train": [make_record(f"k{i}", published.make_image(i)) for i in range(4)]}
    with killed_before_assembly():
        build_records(tmp_path / "out", records, each=2)
    assert not (tmp_path / "out").exists()
    pieces = tmp_path / ".out.partial" / "pieces"
    before = {path: path.read_bytes() for path in pieces.rglob("*.tar")}
    assert len(before) == 2
    for each, quality in ((1, None), (2, 50)):
        with pytest.raises(DataError, match="wanted an unfinished build of this input"):
            build_records(tmp_path / "out", records, each=each, quality=quality)
    with pytest.raises(DataError, match="the unfinished build of another one"):
        shard_writer(tmp_path / "out")
    assert {path: path.read_bytes() for path in pieces.rglob("*.tar")} == before
    seen = []
    source = Source("set", "tests", "CC0", {}, [ListedPiece("train", records["train"][i : i + 2]) for i in (0, 2)])
    build_shards(source, tmp_path / "out", progress=seen.append, workers=0)
    assert (seen[0].pieces, seen[-1].records) == (2, 0)  # no piece was built twice
    assert keys_of(tmp_path / "out") == ["k0", "k1", "k2", "k3"]


def test_a_wrong_tokenizer_does_not_block_the_next_build(tmp_path, waves_tokenizer):
    (tmp_path / "wrong.csv").write_text("image,caption")
    waves_tokenizer.save(tmp_path / "tokenizer.json")
    with pytest.raises(DataError, match=r"wrong\.csv: wanted a tokenizer.json"):
        build_records(tmp_path / "out", ONE, tokenizer=tmp_path / "wrong.csv")
    assert not (tmp_path / ".out.partial").exists()
    assert keys_of(build_records(tmp_path / "out", ONE, tokenizer=tmp_path / "tokenizer.json")) == ["a"]


@pytest.mark.slow
def test_a_build_into_a_link_fills_the_linked_empty_folder(tmp_path):
    (tmp_path / "elsewhere" / "empty").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere" / "empty")
    (tmp_path / "nowhere").symlink_to(tmp_path / "elsewhere" / "new")
    for link in (tmp_path / "link", tmp_path / "nowhere"):
        build_records(link, ONE)
        build_records(link, ONE)  # and is recognised
        assert link.is_symlink()
        assert keys_of(link) == keys_of(link.resolve()) == ["a"]
    assert sorted(path.name for path in tmp_path.rglob("*.partial")) == []
    (tmp_path / "third").mkdir()
    (tmp_path / "to-third").symlink_to(tmp_path / "third")
    with shard_writer(tmp_path / "to-third") as writer:
        writer.add("b", published.encoded(published.make_image(1)), ["words"])
    assert keys_of(tmp_path / "third") == ["b"]


def test_a_build_into_a_mount_point_is_refused_at_once(tmp_path, monkeypatch):
    """A finished folder cannot replace it. `os.path.ismount` is patched, as nothing is mounted here."""
    (tmp_path / "volume").mkdir()
    monkeypatch.setattr("os.path.ismount", lambda path: Path(path) == tmp_path / "volume")
    with pytest.raises(DataError, match="volume: wanted a folder that can be replaced, found a mount point"):
        build_records(tmp_path / "volume", ONE)
    assert [path.name for path in tmp_path.iterdir()] == ["volume"]
    build_records(tmp_path / "volume" / "set", ONE)


def test_a_build_without_a_usable_record_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"rejected: \{'no caption': 1\}"):
        build_records(tmp_path / "out", {"train": [make_record("a", published.make_image(0), [])]})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "name, value", [("quality", 0), ("short_side", 1), ("max_pixels", 10**9), ("max_aspect", 0.5), ("text_length", 2)]
)
def test_build_options_out_of_range_are_refused(tmp_path, name, value):
    with pytest.raises(DataError, match=f"{name.replace('_', '-')}: wanted .* to .*, got"):
        build_records(tmp_path / "out", ONE, **{name: value})  # pyright: ignore[reportArgumentType]


def deadly_pieces(deaths: Path | None) -> list[DeadlyPiece]:
    """12 images in two pieces, of which two end the process. Of the first there are four samples."""
    images = [published.encoded(published.make_image(i), "PNG") + DEADLY * (i in (3, 10)) for i in range(12)]
    records = [make_record(f"k{i:02d}", image) for i, image in enumerate(images)]
    again = [make_record(f"k03-{n}", images[3], ["another question"]) for n in range(3)]
    return [
        DeadlyPiece("train", [*records[:4], *again, *records[4:6]], deaths),
        DeadlyPiece("train", records[6:], deaths),
    ]


@pytest.mark.slow
def test_a_crash_of_the_decoder_costs_one_image(tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "MAX_CRASHES", 2)  # one with all images of the group, one with the deadly image alone
    build_shards(Source("deadly", "", "", {}, deadly_pieces(None)), tmp_path / "out", workers=1)
    assert keys_of(tmp_path / "out") == [f"k{i:02d}" for i in range(12) if i not in (3, 10)]
    reasons = {line["key"]: line["reason"] for line in read_json_lines(tmp_path / "out" / "rejected.jsonl")}
    assert reasons == dict.fromkeys(("k03", "k03-0", "k03-1", "k03-2", "k10"), CRASHED)


@pytest.mark.slow
def test_no_image_is_blamed_for_a_killed_worker(tmp_path):
    """A worker is killed four times on the same images, as by a machine without memory."""
    pieces = deadly_pieces(tmp_path / "deaths")
    build_shards(Source("deadly", "", "", {}, pieces), tmp_path / "out", workers=1)
    assert (tmp_path / "deaths").read_text() == "xxxx"
    assert len(open_dataset(tmp_path / "out", "train")) == 15


def test_a_build_on_a_full_disk_leaves_no_data_set_and_goes_on_later(tmp_path):
    """A limit of the system on file sizes stands in for the full disk."""
    published.folder(tmp_path / "images", 12)
    source, limits = folder(tmp_path / "images"), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(DataError, match=r"wanted room to write, found none \(File too large\)"):
            build_shards(source, tmp_path / "out", workers=0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out.partial/pieces/*"))
    again = build_shards(source, tmp_path / "again", workers=0)
    assert file_contents(build_shards(source, tmp_path / "out", workers=0)) == file_contents(again)


SCRIPT = """
from pathlib import Path
from mvlm_dataloading import build_shards
from mvlm_dataloading.sources.folder import folder

build_shards(folder(Path("images")), Path("out"), workers=1)
"""


@pytest.mark.slow
def test_a_script_that_calls_outside_of_its_main_part_is_told_so(tmp_path):
    (tmp_path / "images").mkdir()
    Image.new("RGB", (32, 32)).save(tmp_path / "images/a.png")
    (tmp_path / "images/a.txt").write_text("a black square")
    (tmp_path / "script.py").write_text(SCRIPT)
    done = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert "DataError: worker processes: wanted a program that they can import" in done.stderr.splitlines()[-1]
