"""Builds: equal bytes, resuming after a kill, locks, crashes of the decoder, and a full disk."""

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mvlm_dataloading import BuildOptions, DataError, build_shards, open_dataset
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

FAULTS = Path(__file__).parents[2] / "promises" / "faults"
ONE = {"train": [make_record("a", published.make_image(0))]}


def run(*words: object, **settings: Any) -> subprocess.CompletedProcess[str]:
    """Run Python with this process's import path. Files of kill campaigns are in memory."""
    memory = {"TMPDIR": "/dev/shm"} if os.access("/dev/shm", os.W_OK) else {}
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **memory}
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, **settings)


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
def test_unfinished_builds_of_earlier_versions_are_resumed(tmp_path):
    """The plan of an unfinished build, with the fields of version 0.1.0. Only its hash of the records is not here."""
    with killed_before_assembly():
        build_records(tmp_path / "out", ONE)
    plan = tmp_path / ".out.partial" / "plan.json"
    older = {
        "name": "set",
        "recipe": {
            "revision": 3, "max_pixels": 50000000, "min_side": 16, "max_aspect": 10.0, "max_image_bytes": 67108864,
            "max_caption_bytes": 2000, "shard_bytes": 268435456, "drop_duplicates": False, "text_length": 40,
            "against": [], "records": json.loads(plan.read_text())["recipe"]["records"],
        },
        "pieces": ["train 1 from a to a"],
    }  # fmt: skip
    plan.write_text(json.dumps(older))
    written = (tmp_path / ".out.partial" / "pieces" / "000000" / "000.tar").stat().st_ino
    build_records(tmp_path / "out", ONE)
    assert (tmp_path / "out" / "train-000000.tar").stat().st_ino == written
    assert not (tmp_path / ".out.partial").exists()


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


def test_a_wrong_tokenizer_does_not_block_the_next_build(tmp_path, tokenizer):
    (tmp_path / "wrong.csv").write_text("image,caption")
    tokenizer.save(tmp_path / "tokenizer.json")
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


@pytest.mark.slow
def test_a_crash_of_the_decoder_costs_one_image(tmp_path):
    done = run(FAULTS / "dying_decoder.py", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert keys_of(tmp_path / "out") == [f"k{i:02d}" for i in range(12) if i not in (3, 10)]
    questions = ("k03", "k03-0", "k03-1", "k03-2")  # about the same image
    assert {
        line["key"]: line["reason"] for line in read_json_lines(tmp_path / "out" / "rejected.jsonl")
    } == dict.fromkeys((*questions, "k10"), CRASHED)


@pytest.mark.slow
def test_no_image_is_blamed_for_a_killed_worker(tmp_path):
    """It is killed four times on the same images, as by a machine without memory."""
    done = run(FAULTS / "dying_decoder.py", tmp_path / "out", "killed")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out.deaths").read_text() == "xxxx"
    assert len(open_dataset(tmp_path / "out", "train")) == 12


@pytest.mark.extended
@pytest.mark.slow
@pytest.mark.parametrize(
    "campaign, said",
    [(("kill_writers.py", "--trials", 10), "10 trials over"), (("kill_parts.py", "--kills", 6), "the bytes of one")],
)
def test_killed_builds_parts_and_merges_end_with_the_bytes_of_one_build(campaign, said):
    """`make faults-data` and `make faults-parts` kill more often."""
    script, *words = campaign
    done = run(FAULTS / script, *words)
    assert done.returncode == 0, done.stdout + done.stderr
    assert said in done.stdout
    assert script != "kill_writers.py" or done.stdout.count("kill@") >= 5


@pytest.mark.slow
def test_a_build_on_a_full_disk_leaves_no_data_set(tmp_path):
    """A limit of the system on file sizes stands in for the full disk, in a subprocess."""
    published.folder(tmp_path / "images", 12)
    command = ["-m", "mvlm", "data", "folder", "images", "out", "--workers", "1"]

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    done = run(*command, cwd=tmp_path, preexec_fn=limited)
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1].startswith("mvlm: ")
    assert "wanted room to write, found none (File too large)" in done.stderr
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out.partial/pieces/*"))
    done = run(*command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    shutil.rmtree(tmp_path / ".out.partial", ignore_errors=True)
    again = build_shards(folder(tmp_path / "images"), tmp_path / "again", workers=0)
    assert file_contents(tmp_path / "out") == file_contents(again)


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
    done = run("script.py", cwd=tmp_path)
    assert done.returncode == 1
    assert "DataError: worker processes: wanted a program that they can import" in done.stderr.splitlines()[-1]
