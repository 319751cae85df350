"""Builds: equal bytes, resuming after a kill, locks, crashes of the decoder, and a full disk."""

import fcntl
import io
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from mvlm_dataloading import BuildOptions, DataError, ShardWriter, build_shards, open_dataset
from mvlm_dataloading.build.piece import CRASHED
from mvlm_dataloading.sources.folder import folder
from mvlm_dataloading.sources.record import ListedPiece, Source, cut_into_pieces
from support import published
from support.data import build_records, file_contents, make_record, read_json_lines

ROOT = Path(__file__).parents[3]


FAULTS = ROOT / "tests" / "promises" / "faults"


def environment(**more: str) -> dict[str, str]:
    """Environment of a subprocess with this process's import path."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **more}


def keys(out: Path, split: str = "train") -> list[str]:
    return open_dataset(out, split).keys.tolist()


@pytest.mark.slow
def test_a_build_does_not_depend_on_the_number_of_processes(tmp_path):
    published.folder(tmp_path / "images", 30)
    (tmp_path / "images/a/0.jpg").write_bytes(b"broken")

    def in_small_pieces() -> Source:
        whole = folder(tmp_path / "images", test=0.2)
        records = {}
        for piece in whole.pieces:
            records.setdefault(piece.split, []).extend(piece.records(1))
        return Source("folder", "", "", whole.recipe, cut_into_pieces(records, 7))

    seen, options = [], BuildOptions(shard_bytes=20_000)
    one = build_shards(in_small_pieces(), tmp_path / "one", options, workers=0)
    two = build_shards(
        in_small_pieces(), tmp_path / "two", BuildOptions(shard_bytes=20_000), workers=2, progress=seen.append
    )
    assert file_contents(one) == file_contents(two)
    assert len(open_dataset(one, "train").tars) > 4
    assert (seen[-1].pieces, seen[-1].of_pieces, seen[-1].records) == (5, 5, 30)


@pytest.mark.slow
def test_a_finished_data_set_is_not_built_again(tmp_path):
    records = {"train": [make_record("a", published.make_image(0))]}
    out = build_records(tmp_path / "out", records)
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    build_records(out, records)
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before
    with pytest.raises(DataError, match="wanted a new folder or the data set set"):
        build_records(out, records, min_side=20)


@pytest.mark.slow
def test_unfinished_builds_of_earlier_versions_are_resumed(tmp_path, monkeypatch):
    """The plan of an unfinished build, with the fields of version 0.1.0. Only its hash of the records is not here."""

    def stop(*_):
        raise KeyboardInterrupt

    records = {"train": [make_record("a", published.make_image(0))]}
    with monkeypatch.context() as patch:
        patch.setattr("mvlm_dataloading.build.build.assemble", stop)
        with pytest.raises(KeyboardInterrupt):
            build_records(tmp_path / "out", records)
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
    build_records(tmp_path / "out", records)
    assert (tmp_path / "out" / "train-000000.tar").stat().st_ino == written
    assert not (tmp_path / ".out.partial").exists()


@pytest.mark.slow
def test_a_killed_build_is_not_resumed_by_another_build(tmp_path, monkeypatch):
    records = {"train": [make_record(f"k{i}", published.make_image(i)) for i in range(4)]}

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("mvlm_dataloading.build.build.assemble", stop)
        with pytest.raises(KeyboardInterrupt):
            build_records(tmp_path / "out", records, each=2)
    assert not (tmp_path / "out").exists()
    for each, quality in ((1, None), (2, 50)):
        with pytest.raises(DataError, match="found another one; finish it with its own command, or remove"):
            build_records(tmp_path / "out", records, each=each, quality=quality)
    seen = []
    source = Source("set", "tests", "CC0", {}, [ListedPiece("train", records["train"][i : i + 2]) for i in (0, 2)])
    build_shards(source, tmp_path / "out", progress=seen.append, workers=0)
    assert (seen[0].pieces, seen[-1].records) == (2, 0)  # no piece was built twice
    assert keys(tmp_path / "out") == ["k0", "k1", "k2", "k3"]


def test_a_wrong_tokenizer_does_not_block_the_next_build(tmp_path, tokenizer):
    records = {"train": [make_record("a", published.make_image(0))]}
    (tmp_path / "wrong.csv").write_text("image,caption")
    tokenizer.save(tmp_path / "tokenizer.json")
    with pytest.raises(DataError, match=r"wrong\.csv: wanted a tokenizer.json, found a file that is not one"):
        build_records(tmp_path / "out", records, tokenizer=tmp_path / "wrong.csv")
    assert not (tmp_path / ".out.partial").exists()
    assert keys(build_records(tmp_path / "out", records, tokenizer=tmp_path / "tokenizer.json")) == ["a"]


@pytest.mark.slow
def test_a_build_into_a_link_fills_the_linked_empty_folder(tmp_path):
    records = {"train": [make_record("a", published.make_image(0))]}
    (tmp_path / "elsewhere" / "empty").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere" / "empty")
    (tmp_path / "nowhere").symlink_to(tmp_path / "elsewhere" / "new")
    for link in (tmp_path / "link", tmp_path / "nowhere"):
        build_records(link, records)
        build_records(link, records)  # and is recognised
        assert link.is_symlink()
        assert keys(link) == keys(link.resolve()) == ["a"]
    assert sorted(path.name for path in tmp_path.rglob("*.partial")) == []
    (tmp_path / "third").mkdir()
    (tmp_path / "to-third").symlink_to(tmp_path / "third")
    with ShardWriter(tmp_path / "to-third", name="", source="", licence="", attribution="", recipe={}) as writer:
        writer.add("b", published.encoded(published.make_image(1)), ["words"])
    assert keys(tmp_path / "third") == ["b"]


def test_a_build_into_a_mount_point_is_refused_at_once(tmp_path, monkeypatch):
    """A finished folder cannot replace it. `os.path.ismount` is patched, as nothing is mounted here."""
    (tmp_path / "volume").mkdir()
    monkeypatch.setattr("os.path.ismount", lambda path: Path(path) == tmp_path / "volume")
    seen = []
    source = Source("set", "", "", {}, [ListedPiece("train", [make_record("a", published.make_image(0))])])
    with pytest.raises(DataError, match="volume: wanted a folder that can be replaced, found a mount point"):
        build_shards(source, tmp_path / "volume", progress=seen.append, workers=0)
    assert seen == []
    assert [path.name for path in tmp_path.iterdir()] == ["volume"]
    build_shards(source, tmp_path / "volume" / "set", workers=0)
    build_shards(source, tmp_path / "volume" / "set", workers=0)


def test_two_builds_of_a_folder_at_once_are_refused(tmp_path):
    (tmp_path / ".out.partial").mkdir()
    with (tmp_path / ".out.partial/lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="wanted to be the only process that writes there, found another"):
            build_records(tmp_path / "out", {"train": [make_record("a", published.make_image(0))]})
    build_records(tmp_path / "out", {"train": [make_record("a", published.make_image(0))]})


def test_a_build_without_a_usable_record_is_refused(tmp_path):
    with pytest.raises(
        DataError, match=r"wanted at least one sample, found none; rejected: \{'no caption': 1\}, .*the lines of a"
    ):
        build_records(tmp_path / "out", {"train": [make_record("a", published.make_image(0), [])]})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_crash_of_the_decoder_costs_one_image(tmp_path):
    done = subprocess.run(
        [sys.executable, str(FAULTS / "dying_decoder.py"), str(tmp_path / "out")],
        capture_output=True, text=True, env=environment(), timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert keys(tmp_path / "out") == [f"k{i:02d}" for i in range(12) if i not in (3, 10)]
    assert {line["key"]: line["reason"] for line in read_json_lines(tmp_path / "out" / "rejected.jsonl")} == {
        "k03": CRASHED,
        **dict.fromkeys(("k03-0", "k03-1", "k03-2"), CRASHED),  # questions about the same image
        "k10": CRASHED,
    }


@pytest.mark.slow
def test_no_image_is_blamed_for_a_killed_worker(tmp_path):
    """It is killed four times on the same images, as by a machine without memory."""
    done = subprocess.run(
        [sys.executable, str(FAULTS / "dying_decoder.py"), str(tmp_path / "out"), "killed"],
        capture_output=True, text=True, env=environment(), timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out.deaths").read_text() == "xxxx"
    assert len(open_dataset(tmp_path / "out", "train")) == 12


@pytest.mark.slow
def test_a_killed_build_resumes_and_ends_with_the_same_bytes():
    """Ten trials here; `make faults-data` has fifty."""
    memory = {"TMPDIR": "/dev/shm"} if os.access("/dev/shm", os.W_OK) else {}
    done = subprocess.run(
        [sys.executable, str(FAULTS / "kill_writers.py"), "--trials", "10"],
        capture_output=True, text=True, env=environment(**memory), timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "10 trials over" in done.stdout
    assert done.stdout.count("kill@") >= 5


@pytest.mark.slow
def test_a_build_on_a_full_disk_leaves_no_data_set(tmp_path):
    """A limit of the system on file sizes stands in for the full disk, in a subprocess."""
    published.folder(tmp_path / "images", 12)
    command = [sys.executable, "-m", "mvlm", "data", "folder", "images", "out", "--workers", "1"]
    limit = 20_000

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    settings = {"cwd": tmp_path, "capture_output": True, "text": True, "env": environment()}  # fmt: skip
    done = subprocess.run(command, preexec_fn=limited, **settings)
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1].startswith("mvlm: ")
    assert (
        "wanted room to write, found none (File too large); free some space and give the same command again"
        in done.stderr
    )
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out.partial/pieces/*"))
    done = subprocess.run(command, **settings)
    assert done.returncode == 0, done.stderr
    assert "out: 12 train" in done.stdout
    shutil.rmtree(tmp_path / ".out.partial", ignore_errors=True)
    assert file_contents(tmp_path / "out") == file_contents(
        build_shards(folder(tmp_path / "images"), tmp_path / "again", workers=0)
    )


def test_an_image_that_is_too_long_for_a_jpeg_is_rejected(tmp_path):
    long = io.BytesIO()
    Image.new("L", (66_000, 20)).save(long, "PNG")
    records = {"train": [make_record("long", long.getvalue()), make_record("good", published.make_image(0))]}
    out = build_records(tmp_path / "out", records, max_aspect=6e4, quality=90)
    assert open_dataset(out, "train").keys.tolist() == ["good"]
    assert [line["reason"] for line in read_json_lines(out / "rejected.jsonl")] == ["image is too long for a JPEG"]
    kept = build_records(tmp_path / "kept", records, max_aspect=6e4)  # as it is, a PNG may have any length
    assert len(open_dataset(kept, "train")) == 2
