"""Data sets that are written sample by sample."""

import errno
import hashlib
import json
import tarfile

import numpy as np
import pytest
from PIL import Image
from wds2idx import IndexCreator

from mvlm_dataloading import DataError, open_dataset
from mvlm_dataloading.dataset.description import already_written
from support import published
from support.data import build_records, file_contents, make_image, make_record, shard_writer, write_dataset
from support.hostile_images import png


def test_shard_writer_files_and_description(tmp_path):
    with shard_writer(tmp_path / "out", recipe={"v": 1}) as writer:
        image = make_image(0)
        assert writer.add("a-1", image, ["  two\nwords ", "two words", " ", "more"], {"name": "é"}) is None
        assert writer.add("b", make_image(1, kind="JPEG"), ["b"]) is None
        assert writer.add("c", make_image(2, kind="WEBP"), ["c"], split="test") is None
    out = tmp_path / "out"
    assert sorted(file_contents(out)) == [
        "dataset.json", "test-000000.idx", "test-000000.tar", "test.index",
        "train-000000.idx", "train-000000.tar", "train.index",
    ]  # fmt: skip
    with tarfile.open(out / "train-000000.tar") as tar:
        assert tar.getnames() == ["a-1.png", "a-1.txt", "a-1.json", "b.jpg", "b.txt", "b.json"]
        read = {member.name: content.read() for member in tar if (content := tar.extractfile(member))}
        assert {(member.mtime, member.uid, member.gid, member.uname) for member in tar} == {(0, 0, 0, "")}
    assert read["a-1.png"] == image
    assert read["a-1.txt"].decode() == "two words\nmore\n"
    assert json.loads(read["a-1.json"]) == {"name": "é"}
    description = json.loads((out / "dataset.json").read_text())
    tar = (out / "train-000000.tar").read_bytes()
    digest = hashlib.sha256(tar).hexdigest()
    shard = {"tar": "train-000000.tar", "samples": 2, "bytes": len(tar), "sha256": digest}
    assert description == {
        "format_version": 1, "name": "set", "source": "tests", "licence": "CC0", "attribution": "nobody",
        "recipe": {"v": 1},
        "splits": {
            "test": {"samples": 1, "captions": 1, "shards": description["splits"]["test"]["shards"]},
            "train": {"samples": 2, "captions": 3, "shards": [shard]},
        },
        "tokenizer": None, "rejected": {},
    }  # fmt: skip


@pytest.mark.slow
def test_shards_keep_to_their_size_and_have_the_indices_of_wds2idx(waves, tmp_path):
    tars = sorted(waves.glob("*.tar"))
    assert len(tars) > 5
    for tar in tars:
        assert tar.stat().st_size <= 150_000 + tarfile.RECORDSIZE
        with IndexCreator(str(tar), str(tmp_path / "made.idx"), verbose=False) as creator:
            creator.create_index()
        assert (tmp_path / "made.idx").read_bytes() == tar.with_suffix(".idx").read_bytes()


def test_shard_writer_rejects_and_counts_bad_samples(tmp_path):
    good, key, undecodable = make_image(3), "key is not 1 to 80 of A-Z a-z 0-9 _ + = @ , -", "image cannot be decoded"
    gif = published.encoded(Image.new("RGB", (8, 8)), "GIF")
    wanted = [
        ("good", good, ["a"], None),
        ("good", good, ["again"], "key was used before"),
        *(("mute", good, captions, "no caption")
          for captions in ([" ", "\n"], [], ["\ud800x"], ["\u200b", "\u0301"])),
        ("noise", np.random.default_rng(0).bytes(500), ["a"], undecodable),
        ("cut", good[: len(good) // 2], ["a"], undecodable),
        ("empty", b"", ["a"], undecodable),
        ("gif", gif, ["a"], "image format is GIF, not JPEG, PNG or WebP"),
        ("bomb", png(60_000, 60_000, 0), ["a"], "image has too many pixels"),
        *((odd, good, ["a"], key) for odd in ("a.b", "a/b", "a b", "", "é", "x" * 81)),
        ("odd-texts", make_image(0), ["ok", "\ud800x"], None),
    ]  # fmt: skip
    with shard_writer(tmp_path / "out") as writer:
        for name, image, captions, reason in wanted:
            assert writer.add(name, image, captions, {"file": "caf\udce9"}) == reason, name
    dataset = open_dataset(tmp_path / "out", "train")
    reasons = [reason for *_, reason in wanted if reason]
    assert dataset.description["rejected"] == {reason: reasons.count(reason) for reason in sorted({*reasons})}
    assert (dataset.captions(0), dataset.captions(1), dataset.metadata(1)) == (["a"], ["ok"], {"file": "caf?"})


@pytest.mark.parametrize("error", [KeyError, DataError, OSError])
def test_shard_writer_leaves_nothing_after_an_exception(tmp_path, monkeypatch, error):
    """Exceptions of the program, of a set without a sample, of a full disk on which files cannot even be closed."""
    close = tarfile.TarFile.close

    def full(tar, *_):
        close(tar)
        raise OSError(errno.ENOSPC, "No space left on device")

    def write():
        with shard_writer(tmp_path / "out") as writer:
            writer.add("a", b"" if error is DataError else make_image(0), ["a"])
            if error is OSError:
                monkeypatch.setattr(tarfile.TarFile, "addfile", full)
                monkeypatch.setattr(tarfile.TarFile, "close", full)
                writer.add("b", make_image(0), ["a"])
            if error is KeyError:
                raise KeyError

    with pytest.raises(error):
        write()
    assert list(tmp_path.iterdir()) == []


def test_shard_writer_replaces_an_unfinished_folder(tmp_path):
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "train-000000.tar").write_bytes(b"half")
    (tmp_path / "out").mkdir()  # an empty folder is as good as none
    write_dataset(tmp_path / "out", 2)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert len(open_dataset(tmp_path / "out", "train")) == 2


def test_shard_writer_refuses_a_folder_in_use(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "letter.txt").write_text("dear")
    for refused in (lambda: shard_writer(out), lambda: already_written(out, name="set", recipe={})):
        with pytest.raises(DataError, match="wanted a new or an empty folder, found one in use"):
            refused()
    assert file_contents(out) == {"letter.txt": b"dear"}


def test_a_second_writer_of_a_folder_is_refused_and_the_first_goes_on(tmp_path):
    with shard_writer(tmp_path / "out") as writer:
        writer.add("a", make_image(0), ["one"])
        for second in (shard_writer, lambda out: build_records(out, {"train": [make_record("a", make_image(0))]})):
            with pytest.raises(DataError, match="wanted to be the only process that writes there, found another"):
                second(tmp_path / "out")
        writer.add("b", make_image(1), ["two"])
    assert len(open_dataset(tmp_path / "out", "train")) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not (tmp_path / "out" / "lock").exists()
