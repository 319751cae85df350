"""Writing a data set: what is left out, what goes on after an interruption, and what a full disk leaves."""

import fcntl
import io
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import published
import pytest
from PIL import Image

from mvlm_dataloading import DataError, Settings, ShardWriter, build_shards, open_dataset
from mvlm_dataloading.build.hash_search import MAX_DISTANCE, first_equal, near_known, near_pairs
from mvlm_dataloading.build.image_check import perceptual_hash
from mvlm_dataloading.build.piece import CRASHED
from mvlm_dataloading.sources.folder import folder
from mvlm_dataloading.sources.record import Listed, Record, Source

ROOT = Path(__file__).parents[2]
FAULTS = ROOT / "tests" / "faults"


def record(key: str, image: Image.Image | bytes, captions=("words",), kind: str = "PNG") -> Record:
    content = image if isinstance(image, bytes) else published.encoded(image, kind)
    return Record(key, content, list(captions), key)


def build(out: Path, splits: dict[str, list[Record]], each: int = 100, against=(), **settings) -> Path:
    pieces = [Listed(split, known[i : i + each]) for split, known in splits.items() for i in range(0, len(known), each)]
    return build_shards(
        Source("set", "tests", "CC0", {}, pieces), out, Settings(**settings), against=against, workers=0
    )


def brighter(image: Image.Image, levels: int) -> Image.Image:
    return Image.fromarray(np.minimum(np.asarray(image).astype(int) + levels, 255).astype(np.uint8))


def environment(**more: str) -> dict[str, str]:
    """That of a process that imports what this one does."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **more}


def keys(out: Path, split: str = "train") -> list[str]:
    return open_dataset(out, split).keys.tolist()


def lines(out: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (out / f"{name}.jsonl").read_text().splitlines()]


def contents(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.iterdir())}


def test_what_is_in_an_evaluation_split_is_not_trained_on(tmp_path):
    other = build(tmp_path / "other", {"validation": [record("v", published.picture(50))],
                                       "train": [record("t", published.picture(51))]})  # fmt: skip
    shown = published.picture(1, (144, 108))
    out = build(
        tmp_path / "out",
        {
            "test": [record("a", shown), record("b", published.picture(2))],
            "train": [
                record("same", shown),
                record("smaller", shown.resize((72, 54)), kind="JPEG"),
                record("brighter", brighter(shown, 12)),
                record("wider", shown.resize((216, 108))),  # another shape is another picture
                record("of-the-others-evaluation", published.picture(50)),
                record("of-the-others-training", published.picture(51)),
                record("alone", published.picture(3)),
            ],
        },
        against=[other],
    )
    assert keys(out) == ["wider", "of-the-others-training", "alone"]
    assert keys(out, "test") == ["a", "b"]
    exact, near = "picture is in an evaluation split", "picture is nearly one of an evaluation split"
    wanted = {"same": exact, "smaller": near, "brighter": near, "of-the-others-evaluation": exact}
    assert {line["key"]: line["reason"] for line in lines(out, "rejected")} == wanted
    assert json.loads((out / "dataset.json").read_text())["rejected"] == {exact: 2, near: 2}
    assert lines(out, "duplicates") == [
        {"key": "same", "split": "train", "kind": "exact", "of": "test/a"},
        {"key": "smaller", "split": "train", "kind": "near", "of": "test/a"},
        {"key": "brighter", "split": "train", "kind": "near", "of": "test/a"},
        {"key": "of-the-others-evaluation", "split": "train", "kind": "exact", "of": "validation/other/v"},
    ]


def test_duplicates_are_told_of_and_dropped_if_so_asked(tmp_path):
    image = published.picture(1, (144, 108))
    records = [
        record("a", image, ["first"]),
        record("b", published.picture(2)),
        record("again", image, ["second", "third"]),
        record("nearly", image.resize((100, 75)), kind="JPEG"),
        record("flat", Image.new("RGB", (40, 40), "teal")),
        record("flat-too", Image.new("RGB", (40, 40), "navy")),  # there is nothing in it to be recognised by
    ]
    told = [
        {"key": "again", "split": "train", "kind": "exact", "of": "train/a"},
        {"key": "nearly", "split": "train", "kind": "near", "of": "train/a"},
    ]
    kept = build(tmp_path / "kept", {"train": records}, each=2)
    assert keys(kept) == [one.key for one in records]
    assert lines(kept, "duplicates") == told
    dropped = build(tmp_path / "dropped", {"train": records}, each=2, drop_duplicates=True)
    assert keys(dropped) == ["a", "b", "nearly", "flat", "flat-too"]
    assert lines(dropped, "duplicates") == told
    # The tar from which a sample was taken is what it would have been without.
    without = build(tmp_path / "without", {"train": [r for r in records if r.key != "again"]}, each=3)
    assert open_dataset(dropped, "train").captions(2) == ["words"]
    read = [open_dataset(out, "train") for out in (dropped, without)]
    for i in range(5):
        assert read[0].image_bytes(i) == read[1].image_bytes(i)
        assert read[0].metadata(i) == read[1].metadata(i)
    description = json.loads((dropped / "dataset.json").read_text())
    assert description["splits"]["train"]["captions"] == 5
    subprocess.run(
        [sys.executable, "-m", "wds2idx", str(dropped / "train-000001.tar"), str(tmp_path / "made.idx")],
        check=True, capture_output=True,
    )  # fmt: skip
    assert (tmp_path / "made.idx").read_bytes() == (dropped / "train-000001.idx").read_bytes()


def test_the_perceptual_hash_survives_what_publishing_does():
    distances, strangers = [], []
    hashes = []
    for i in range(60):
        image = published.picture(i, (300, 225))
        own = perceptual_hash(np.asarray(image))
        assert own is not None
        hashes.append(own)
        for changed in (
            image.resize((100, 75)),
            Image.open(io.BytesIO(published.encoded(image))),
            brighter(image, 10),
            image.convert("L").convert("RGB"),
        ):
            other = perceptual_hash(np.asarray(changed))
            assert other is not None
            distances.append((own ^ other).bit_count())
    for i in range(60):
        strangers += [(hashes[i] ^ hashes[j]).bit_count() for j in range(i)]
    assert np.mean(np.array(distances) <= MAX_DISTANCE) > 0.97
    assert min(strangers) > 2 * MAX_DISTANCE
    assert perceptual_hash(np.full((50, 50, 3), 7, np.uint8)) is None


def test_near_pairs_are_those_of_a_loop():
    rng = np.random.default_rng(0)
    values = rng.integers(0, 2**64, 120, np.uint64)
    for i in range(0, 100, 2):  # neighbours at all distances from 0 to 6, and a few copies
        flips = rng.choice(64, rng.integers(0, 7), replace=False)
        values[i + 1] = values[i] ^ np.bitwise_or.reduce(np.uint64(1) << flips.astype(np.uint64), initial=np.uint64(0))
    found = sorted(near_pairs(values))
    assert len(set(found)) == len(found)
    wanted = [
        (i, j) for i in range(120) for j in range(i + 1, 120)
        if int(values[i] ^ values[j]).bit_count() <= MAX_DISTANCE
    ]  # fmt: skip
    assert found == wanted
    assert len(wanted) > 15
    # Each of the four bands in turn is the only one that is the same.
    for same in range(4):
        flips = sum(1 << (16 * band + 5) for band in range(4) if band != same)
        pair = np.array([values[0], values[0] ^ np.uint64(flips)])
        assert list(near_pairs(pair)) == [(0, 1)]
        assert near_known(pair[:1], np.ones(1), pair[1:], np.ones(1), 1.1).tolist() == [0]
    ones = np.ones(120)
    first = near_known(values[60:], ones[60:], values[:60], ones[:60], 1.1)
    for i, j in enumerate(first.tolist()):
        near = [k for k in range(60) if int(values[60 + i] ^ values[k]).bit_count() <= MAX_DISTANCE]
        assert j == (near[0] if near else -1)
    assert (near_known(values, ones, values, 2 * ones, 1.1) == -1).all()
    assert first_equal(np.array([b"b", b"a", b"b", b"c", b"a"], "S32")).tolist() == [0, 1, 0, 3, 1]


def test_pictures_are_made_smaller_and_never_larger(tmp_path):
    records = [record("large", published.picture(1, (200, 100))), record("small", published.picture(2, (60, 40)))]
    out = build(tmp_path / "out", {"train": records}, short_side=50)
    dataset = open_dataset(out, "train")
    with Image.open(io.BytesIO(dataset.image_bytes(0))) as image:
        assert (image.format, image.size) == ("JPEG", (100, 50))
    assert dataset.image_bytes(1) == records[1].image
    encoded = build(tmp_path / "encoded", {"train": records}, short_side=50, quality=40)
    dataset = open_dataset(encoded, "train")
    with Image.open(io.BytesIO(dataset.image_bytes(1))) as image:
        assert (image.format, image.size) == ("JPEG", (60, 40))


def test_token_ids_are_written_beside_the_captions(tmp_path, tokenizer):
    tokenizer.save(tmp_path / "tokenizer.json")
    captions = [["picture number 1 of some waves", "the wave"], ["waves"]]
    records = [record(f"k{i}", published.picture(i), known) for i, known in enumerate(captions)]
    out = build(tmp_path / "out", {"train": records}, tokenizer=tmp_path / "tokenizer.json", text_length=6)
    description = json.loads((out / "dataset.json").read_text())
    assert description["tokens"] == {"fingerprint": tokenizer.fingerprint, "max_length": 6}
    assert (out / "tokenizer.json").read_bytes() == (tmp_path / "tokenizer.json").read_bytes()
    dataset = open_dataset(out, "train")
    assert dataset.tokenizer_sha256 is not None
    tar = (out / "train-000000.tar").read_bytes()
    index = [line.split(" ") for line in (out / "train-000000.idx").read_text().splitlines()[1:]]
    for row, known in zip(index, captions, strict=True):
        extension, offset, size, name = row[-4:]
        assert (extension, name.endswith(".tok")) == ("tok", True)
        numbers = np.frombuffer(tar[int(offset) : int(offset) + int(size)], "<i4").tolist()
        for caption in known:  # a count, then so many ids
            ids, _ = tokenizer.encode([caption], 6)
            assert numbers[: 1 + len(ids)] == [len(ids), *ids.tolist()]
            numbers = numbers[1 + len(ids) :]
        assert numbers == []


def test_the_bytes_do_not_depend_on_the_number_of_processes(tmp_path):
    published.folder(tmp_path / "pictures", 30)
    (tmp_path / "pictures/a/0.jpg").write_bytes(b"broken")

    def cut() -> Source:
        from mvlm_dataloading.sources.record import cut

        whole = folder(tmp_path / "pictures", test=0.2)
        records = {}
        for piece in whole.pieces:
            records.setdefault(piece.split, []).extend(piece.records(1))
        return Source("folder", "", "", whole.recipe, cut(records, 7))

    seen = []
    one = build_shards(cut(), tmp_path / "one", Settings(shard_bytes=20_000), workers=0)
    two = build_shards(cut(), tmp_path / "two", Settings(shard_bytes=20_000), workers=2, progress=seen.append)
    assert contents(one) == contents(two)
    assert len(open_dataset(one, "train").tars) > 4
    assert (seen[-1].pieces, seen[-1].of_pieces, seen[-1].records) == (5, 5, 30)


def test_a_finished_set_is_left_as_it_is(tmp_path):
    records = {"train": [record("a", published.picture(0))]}
    out = build(tmp_path / "out", records)
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    build(out, records)
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before
    with pytest.raises(DataError, match="wanted a new folder or the data set set"):
        build(out, records, min_side=20)


def test_another_run_is_not_mixed_into_what_a_killed_one_left(tmp_path, monkeypatch):
    records = {"train": [record(f"k{i}", published.picture(i)) for i in range(4)]}

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("mvlm_dataloading.build.build.assemble", stop)
        with pytest.raises(KeyboardInterrupt):
            build(tmp_path / "out", records, each=2)
    assert not (tmp_path / "out").exists()
    for each, quality in ((1, None), (2, 50)):
        with pytest.raises(DataError, match="found that of another; give the same command again, or remove"):
            build(tmp_path / "out", records, each=each, quality=quality)
    seen = []
    source = Source("set", "tests", "CC0", {}, [Listed("train", records["train"][i : i + 2]) for i in (0, 2)])
    build_shards(source, tmp_path / "out", progress=seen.append, workers=0)
    assert (seen[0].pieces, seen[-1].records) == (2, 0)  # nothing was done twice
    assert keys(tmp_path / "out") == ["k0", "k1", "k2", "k3"]


def test_a_link_to_an_empty_folder_gets_that_folder_filled(tmp_path):
    records = {"train": [record("a", published.picture(0))]}
    (tmp_path / "elsewhere" / "empty").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere" / "empty")
    (tmp_path / "nowhere").symlink_to(tmp_path / "elsewhere" / "new")
    for link in (tmp_path / "link", tmp_path / "nowhere"):
        build(link, records)
        build(link, records)  # and is known again
        assert link.is_symlink()
        assert keys(link) == keys(link.resolve()) == ["a"]
    assert sorted(path.name for path in tmp_path.rglob("*.partial")) == []
    (tmp_path / "third").mkdir()
    (tmp_path / "to-third").symlink_to(tmp_path / "third")
    with ShardWriter(tmp_path / "to-third", name="", source="", licence="", attribution="", recipe={}) as writer:
        writer.add("b", published.encoded(published.picture(1)), ["words"])
    assert keys(tmp_path / "third") == ["b"]


def test_a_mount_point_is_refused_before_anything_is_done(tmp_path, monkeypatch):
    """It cannot be replaced by a finished folder. Nothing is mounted here; the system is asked by its name."""
    (tmp_path / "volume").mkdir()
    monkeypatch.setattr("os.path.ismount", lambda path: Path(path) == tmp_path / "volume")
    seen = []
    source = Source("set", "", "", {}, [Listed("train", [record("a", published.picture(0))])])
    with pytest.raises(DataError, match="volume: wanted a folder that can be replaced, found a mount point"):
        build_shards(source, tmp_path / "volume", progress=seen.append, workers=0)
    assert seen == []
    assert [path.name for path in tmp_path.iterdir()] == ["volume"]
    build_shards(source, tmp_path / "volume" / "set", workers=0)
    build_shards(source, tmp_path / "volume" / "set", workers=0)


def test_two_runs_at_once_are_refused(tmp_path):
    (tmp_path / ".out.partial").mkdir()
    with (tmp_path / ".out.partial/lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="wanted to be the only one that writes there, found another"):
            build(tmp_path / "out", {"train": [record("a", published.picture(0))]})
    build(tmp_path / "out", {"train": [record("a", published.picture(0))]})


def test_a_set_of_which_nothing_is_left(tmp_path):
    with pytest.raises(DataError, match=r"wanted at least one sample, found none; rejected: \{'no caption': 1\}"):
        build(tmp_path / "out", {"train": [record("a", published.picture(0), [])]})
    assert list(tmp_path.iterdir()) == []


def test_settings_that_cannot_be(tmp_path):
    for name, value in (("quality", 0), ("short_side", 1), ("max_pixels", 10**9), ("max_aspect", 0.5)):
        with pytest.raises(DataError, match=f"{name.replace('_', '-')}: wanted .* to .*, got"):
            build(tmp_path / "out", {"train": [record("a", published.picture(0))]}, **{name: value})  # pyright: ignore[reportArgumentType]


def test_a_decoder_that_dies_costs_one_picture(tmp_path):
    done = subprocess.run(
        [sys.executable, str(FAULTS / "dying_decoder.py"), str(tmp_path / "out")],
        capture_output=True, text=True, env=environment(), timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert keys(tmp_path / "out") == [f"k{i:02d}" for i in range(12) if i not in (3, 10)]
    assert {line["key"]: line["reason"] for line in lines(tmp_path / "out", "rejected")} == {
        "k03": CRASHED,
        "k10": CRASHED,
    }


def test_a_killed_run_goes_on_and_ends_with_the_same_bytes():
    """Ten trials here; `make faults-data` has fifty."""
    memory = {"TMPDIR": "/dev/shm"} if os.access("/dev/shm", os.W_OK) else {}
    done = subprocess.run(
        [sys.executable, str(FAULTS / "kill_writers.py"), "--trials", "10"],
        capture_output=True, text=True, env=environment(**memory), timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "10 trials over" in done.stdout
    assert done.stdout.count("kill@") >= 5


def test_a_full_disk_leaves_nothing_that_a_reader_takes(tmp_path):
    """A real limit of the system on the size of a file: a tar cannot be finished, in another process."""
    published.folder(tmp_path / "pictures", 12)
    command = [sys.executable, "-m", "mvlm", "data", "folder", "pictures", "out", "--workers", "1"]
    limit = 20_000

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    settings = {"cwd": tmp_path, "capture_output": True, "text": True, "env": environment()}  # fmt: skip
    done = subprocess.run(command, preexec_fn=limited, **settings)
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1].startswith("mvlm: ")
    assert "wanted room to write, found none (File too large); what is done is kept in" in done.stderr
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out.partial/pieces/*"))
    done = subprocess.run(command, **settings)
    assert done.returncode == 0, done.stderr
    assert "out: 12 train" in done.stdout
    shutil.rmtree(tmp_path / ".out.partial", ignore_errors=True)
    assert contents(tmp_path / "out") == contents(
        build_shards(folder(tmp_path / "pictures"), tmp_path / "again", workers=0)
    )
