import errno
import hashlib
import io
import json
import subprocess
import sys
import tarfile
import threading
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from mvlm_dataloading import DataError, ShardWriter, build_shards, open_dataset
from mvlm_dataloading.build.image_check import ImageDecoder
from mvlm_dataloading.build.part import BuildProgress
from mvlm_dataloading.dataset.description import already_written
from mvlm_dataloading.sources.record import ListedPiece, Source
from support import published
from support.data import file_contents, make_image, make_record, write_dataset

HEADER: dict[str, Any] = {"name": "set", "source": "s", "licence": "CC0", "attribution": "a"}


def writer_for(folder: Path, **settings) -> ShardWriter:
    return ShardWriter(folder, **HEADER, recipe={"v": 1}, **settings)


def test_shard_writer_files_and_description(tmp_path):
    with writer_for(tmp_path / "out") as writer:
        image = make_image(0)
        assert writer.add("a-1", image, ["  two\nwords ", "two words", " ", "more"], {"name": "é"}) is None
        assert writer.add("b", make_image(1, kind="JPEG"), ["b"]) is None
        assert writer.add("c", make_image(2, kind="WEBP"), ["c"], split="test") is None
    out = tmp_path / "out"
    assert sorted(file_contents(out)) == [
        "dataset.json",
        "test-000000.idx",
        "test-000000.tar",
        "test.index",
        "train-000000.idx",
        "train-000000.tar",
        "train.index",
    ]
    with tarfile.open(out / "train-000000.tar") as tar:
        assert tar.getnames() == ["a-1.png", "a-1.txt", "a-1.json", "b.jpg", "b.txt", "b.json"]
        read = {member.name: content.read() for member in tar if (content := tar.extractfile(member))}
        assert {(member.mtime, member.uid, member.gid, member.uname) for member in tar} == {(0, 0, 0, "")}
    assert read["a-1.png"] == image
    assert read["a-1.txt"].decode() == "two words\nmore\n"
    assert json.loads(read["a-1.json"]) == {"name": "é"}
    description = json.loads((out / "dataset.json").read_text())
    tar = (out / "train-000000.tar").read_bytes()
    assert description == {
        "format_version": 1,
        **HEADER,
        "recipe": {"v": 1},
        "splits": {
            "test": {"samples": 1, "captions": 1, "shards": description["splits"]["test"]["shards"]},
            "train": {
                "samples": 2,
                "captions": 3,
                "shards": [
                    {
                        "tar": "train-000000.tar",
                        "samples": 2,
                        "bytes": len(tar),
                        "sha256": hashlib.sha256(tar).hexdigest(),
                    }
                ],
            },
        },
        "tokenizer": None,
        "rejected": {},
    }


def test_shard_writer_puts_transparent_images_on_white(tmp_path):
    """Others stay as they are, also with an alpha channel."""
    disc, opaque = Image.new("RGBA", (20, 10), (9, 9, 9, 0)), io.BytesIO()
    disc.putpixel((3, 4), (0, 0, 0, 255))
    file = io.BytesIO()
    disc.save(file, "WEBP", lossless=True, exact=True)
    Image.new("RGBA", (20, 10), (1, 2, 3, 255)).save(opaque, "PNG")
    with writer_for(tmp_path / "out") as writer:
        assert writer.add("disc", file.getvalue(), ["a disc"]) is None
        assert writer.add("opaque", opaque.getvalue(), ["a square"]) is None
    dataset = open_dataset(tmp_path / "out", "train")
    with Image.open(io.BytesIO(dataset.image_bytes(0))) as stored:
        assert (stored.format, stored.mode) == ("PNG", "RGB")
        wanted = np.full((10, 20, 3), 255)
        wanted[4, 3] = 0
        assert np.array_equal(np.asarray(stored), wanted)
    assert dataset.image_bytes(1) == opaque.getvalue()


def test_shard_writer_stores_webp_files_so_that_their_exif_data_are_found(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the tag Orientation
    webp = published.encoded(published.make_image(1), "WEBP", exif=exif, icc_profile=b"abc")
    with writer_for(tmp_path / "out") as writer:
        assert writer.add("a", webp, ["a"]) is None
    (pixels,) = ImageDecoder(1 << 20)([open_dataset(tmp_path / "out", "train").image_bytes(0)])
    wanted = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(webp))), float)
    assert not isinstance(pixels, str)
    assert np.abs(pixels - wanted).max() <= 1


@pytest.mark.slow
def test_index_equals_that_of_wds2idx(waves, tmp_path):
    tars = sorted(waves.glob("*.tar"))
    assert len(tars) > 5
    for tar in tars:
        command = [sys.executable, "-m", "wds2idx", str(tar), str(tmp_path / "made.idx")]
        subprocess.run(command, check=True, capture_output=True)
        assert (tmp_path / "made.idx").read_bytes() == tar.with_suffix(".idx").read_bytes()


def test_shard_writer_output_is_deterministic(tmp_path):
    folders = [
        write_dataset(tmp_path / name, 9, max_shard_bytes=60_000, kinds=("PNG", "JPEG")) for name in ("one", "two")
    ]
    assert file_contents(folders[0]) == file_contents(folders[1])


def test_shards_stay_below_their_maximum_size(waves):
    for tar in waves.glob("*.tar"):
        assert tar.stat().st_size <= 150_000 + tarfile.RECORDSIZE
    sizes = [
        shard["samples"] for shard in json.loads((waves / "dataset.json").read_text())["splits"]["train"]["shards"]
    ]
    assert sum(sizes) == 60


def gif() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "GIF")
    return file.getvalue()


def huge_png() -> bytes:
    # The header of a 60,000 x 60,000 image before a small one's data.
    file = io.BytesIO()
    Image.new("L", (8, 8)).save(file, "PNG")
    data = bytearray(file.getvalue())
    data[16:24] = (60_000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


def test_shard_writer_rejects_and_counts_bad_samples(tmp_path, caplog):
    good = make_image(3)
    noise = np.random.default_rng(0).bytes(500)
    with writer_for(tmp_path / "out") as writer:
        assert writer.add("good", good, ["a"]) is None
        assert writer.add("good", good, ["again"]) == "key was used before"
        assert writer.add("mute", good, [" ", "\n"]) == "no caption"
        assert writer.add("none", good, []) == "no caption"
        assert writer.add("noise", noise, ["a"]) == "image cannot be decoded"
        assert writer.add("cut", good[: len(good) // 2], ["a"]) == "image cannot be decoded"
        assert writer.add("empty", b"", ["a"]) == "image cannot be decoded"
        assert writer.add("gif", gif(), ["a"]) == "image format is GIF, not JPEG, PNG or WebP"
        assert writer.add("bomb", huge_png(), ["a"]) == "image has too many pixels"
        for key in ("a.b", "a/b", "a b", "", "é", "x" * 81):
            assert "key is not" in str(writer.add(key, good, ["a"]))
    description = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert description["rejected"] == {
        "image cannot be decoded": 3,
        "image format is GIF, not JPEG, PNG or WebP": 1,
        "image has too many pixels": 1,
        "key is not 1 to 80 of A-Z a-z 0-9 _ + = @ , -": 6,
        "key was used before": 1,
        "no caption": 2,
    }
    assert len(open_dataset(tmp_path / "out", "train")) == 1
    assert "rejected sample 'bomb' of set: image has too many pixels" in caplog.text


def test_shard_writer_without_a_sample_leaves_nothing(tmp_path):
    with (
        pytest.raises(DataError, match="wanted at least one sample, found none"),
        writer_for(tmp_path / "out") as writer,
    ):
        writer.add("a", b"", ["a"])
    assert list(tmp_path.iterdir()) == []


def test_shard_writer_leaves_nothing_after_an_exception(tmp_path):
    def write():
        with writer_for(tmp_path / "out") as writer:
            writer.add("a", make_image(0), ["a"])
            raise KeyError

    with pytest.raises(KeyError):
        write()
    assert list(tmp_path.iterdir()) == []


def test_shard_writer_leaves_nothing_on_a_full_disk(tmp_path, monkeypatch):
    close = tarfile.TarFile.close

    def full(tar, *_):
        close(tar)
        raise OSError(errno.ENOSPC, "No space left on device")

    def write():
        with writer_for(tmp_path / "out") as writer:
            writer.add("a", make_image(0), ["a"])
            monkeypatch.setattr(tarfile.TarFile, "addfile", full)
            monkeypatch.setattr(tarfile.TarFile, "close", full)
            writer.add("b", make_image(0), ["a"])

    with pytest.raises(OSError, match="No space left"):
        write()
    assert list(tmp_path.iterdir()) == []


def test_shard_writer_replaces_an_unfinished_folder(tmp_path):
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "train-000000.tar").write_bytes(b"half")
    (tmp_path / "out").mkdir()  # an empty folder is as good as none
    write_dataset(tmp_path / "out", 2)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert len(open_dataset(tmp_path / "out", "train")) == 2


def test_shard_writer_leaves_the_unfinished_build_of_another_command(tmp_path):
    class Stop(Exception):
        pass

    def stop(done: BuildProgress) -> None:
        if done.pieces:
            raise Stop

    records = [make_record(f"k{i}", make_image(i)) for i in range(3)]
    source = Source("built", "", "", {}, [ListedPiece("train", records)])
    with pytest.raises(Stop):
        build_shards(source, tmp_path / "out", workers=0, progress=stop)
    piece = tmp_path / ".out.partial/pieces/000000"
    before = file_contents(piece)
    assert "000.tar" in before
    with pytest.raises(DataError, match=r"\.out\.partial: .* found the unfinished build of another one; finish it"):
        writer_for(tmp_path / "out")
    assert file_contents(piece) == before
    build_shards(source, tmp_path / "out", workers=0)  # the lock is free
    assert len(open_dataset(tmp_path / "out", "train")) == 3


def test_shard_writer_refuses_a_folder_in_use(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "letter.txt").write_text("dear")
    for refused in (lambda: writer_for(out), lambda: already_written(out, name="set", recipe={})):
        with pytest.raises(DataError, match="wanted a new or an empty folder, found one in use"):
            refused()
    assert file_contents(out) == {"letter.txt": b"dear"}


def test_captions_and_metadata_that_are_no_unicode(tmp_path):
    with writer_for(tmp_path / "out") as writer:
        assert writer.add("a", make_image(0), ["ok", "\ud800x"], {"file": "caf\udce9"}) is None
        assert writer.add("b", make_image(1), ["\ud800x"]) == "no caption"
        assert writer.add("c", make_image(2), ["\u200b", "\u0301"]) == "no caption"
    found = open_dataset(tmp_path / "out", "train")
    assert (found.captions(0), found.metadata(0)) == (["ok"], {"file": "caf?"})


def test_another_thread_may_abandon_what_was_written(tmp_path):
    writer = writer_for(tmp_path / "out")
    writer.add("a", make_image(0), ["one"])
    thread = threading.Thread(target=writer.abandon)
    thread.start()
    thread.join()
    assert list(tmp_path.iterdir()) == []
    with writer_for(tmp_path / "out") as again:
        again.add("a", make_image(0), ["one"])
    assert len(open_dataset(tmp_path / "out", "train")) == 1


def test_a_second_writer_of_a_folder_is_refused_and_the_first_goes_on(tmp_path):
    with writer_for(tmp_path / "out") as writer:
        writer.add("a", make_image(0), ["one"])
        with pytest.raises(DataError, match="wanted to be the only writer there, found another"):
            writer_for(tmp_path / "out")
        writer.add("b", make_image(1), ["two"])
    assert len(open_dataset(tmp_path / "out", "train")) == 2
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "dataset.json", "train-000000.idx", "train-000000.tar", "train.index",
    ]  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
