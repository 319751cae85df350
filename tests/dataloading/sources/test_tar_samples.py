"""Damaged and odd tars of other tools."""

import io
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from mvlm_dataloading import BuildOptions, DataError, build_shards, open_dataset
from mvlm_dataloading.sources.record import safe_key
from mvlm_dataloading.sources.tar_samples import read_samples
from mvlm_dataloading.sources.webdataset import webdataset
from mvlm_dataloading.tar_walk import TarWalk
from support import published
from support.data import captions_by_key, read_json_lines
from support.hostile_images import peak_memory, reset_peak


def write_tar(path: Path, members: Sequence[tuple[tarfile.TarInfo | str, bytes]], mode: Any = "w") -> Path:
    with tarfile.open(path, mode, format=tarfile.PAX_FORMAT) as tar:
        for name, content in members:
            member = tarfile.TarInfo(name) if isinstance(name, str) else name
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def pairs(*names: Any) -> list[tuple[tarfile.TarInfo | str, bytes]]:
    """An image and a caption of each name."""
    jpeg = published.encoded(published.make_image(0))
    return [(f"{name}.{ext}", part) for name in names for ext, part in (("jpg", jpeg), ("txt", b"words"))]


def build(path: Path, **settings: Any) -> Path:
    out = path.parent / f"{path.name}-out"
    return build_shards(webdataset([path]), out, BuildOptions(**settings), workers=0)


def reasons(out: Path) -> dict[str, str]:
    return {line["where"].rsplit("/", 1)[1]: line["reason"] for line in read_json_lines(out / "rejected.jsonl")}


def special(name: str, kind: bytes, link: str = "") -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, link
    return member


def test_odd_members_of_tars_are_skipped_or_rejected(tmp_path):
    """Nothing is unpacked, so `..` in a path is harmless. Links to files outside the tar, and devices, are skipped."""
    jpegs = [published.encoded(published.make_image(i)) for i in range(12)]
    write_tar(
        tmp_path / "odd.tar",
        [
            ("../../etc/climb.jpg", jpegs[0]), ("../../etc/climb.txt", b"climbs"),
            ("/absolute.jpg", jpegs[1]), ("/absolute.txt", b"absolute"),
            (special("linked.jpg", tarfile.SYMTYPE, "/etc/passwd"), b""), ("linked.txt", b"linked"),
            (special("hard.jpg", tarfile.LNKTYPE, "/etc/passwd"), b""), ("hard.txt", b"hard"),
            (special("device.jpg", tarfile.CHRTYPE), b""), ("device.txt", b"device"),
            (special("pipe.jpg", tarfile.FIFOTYPE), b""), ("pipe.txt", b"pipe"),
            (special("folder.jpg", tarfile.DIRTYPE), b""), ("folder.txt", b"folder"),
            ("猫 é.JPEG", jpegs[2]), ("猫 é.Txt", "猫".encode()),
            ("dots.v1.final.jpg", jpegs[3]), ("dots.v1.final.txt", b"dots"),
            ("twice.jpg", jpegs[4]), ("twice.png", jpegs[5]), ("twice.txt", b"twice"),
            ("again.jpg", jpegs[6]), ("again.txt", b"again"),
            ("other.jpg", jpegs[7]), ("other.txt", b"other"),
            ("again.jpg", jpegs[8]), ("again.txt", b"again, another"),
            ("latin1.jpg", jpegs[9]), ("latin1.txt", b"caf\xe9"),
            ("mute.jpg", jpegs[10]),
            ("blind.txt", b"blind"),
            ("notes/README", b"not a sample"), (".hidden.jpg", jpegs[11]), ("unknown.xyz", b"1"),
            ("long" * 60 + ".jpg", jpegs[11]), ("long" * 60 + ".txt", b"long"),
        ],
    )  # fmt: skip
    out = build(tmp_path / "odd.tar")
    dataset = open_dataset(out, "train")
    names = ["../../etc/climb", "/absolute", "猫 é", "dots.v1.final", "again", "other", "long" * 60]
    assert dataset.keys.tolist() == [safe_key(name) for name in names]
    assert dataset.captions(2) == ["猫"]
    assert reasons(out) == {
        **{f"odd.tar:{name}": "no image" for name in ("linked", "hard", "device", "pipe", "folder", "blind")},
        "odd.tar:twice": "sample has two files of the same kind",
        "odd.tar:again": "key was used before",
        "odd.tar:latin1": "caption is not UTF-8",
        "odd.tar:mute": "no caption",
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["odd.tar", "odd.tar-out"]


def refuse(path: Path, word: str, workers: int = 0) -> None:
    with pytest.raises(DataError, match=word):
        build_shards(webdataset([path]), path.parent / "refused", workers=workers)
    assert not (path.parent / "refused").exists()


def test_tars_that_are_damaged_or_hold_nothing_are_refused_with_the_place(tmp_path):
    """`tarfile` takes a damaged header for the end: 3 of 12 samples without a word."""
    bad = write_tar(tmp_path / "bad.tar", pairs(*range(12)))
    with tarfile.open(bad) as tar:
        at = tar.getmember("3.jpg").offset
    with bad.open("r+b") as file:
        file.seek(at + 150)
        file.write(b"\xff" * 4)
    for workers in (0, 1):
        refuse(bad, rf"bad\.tar: .* byte {at};", workers)
    one, other = (write_tar(tmp_path / f"{name}.tar", pairs(name)).read_bytes() for name in "ab")
    for name, content, word in (
        ("empty", b"", "none"),
        ("no-header", b"z" * 100, "none"),
        ("no-tar", b"z" * 5000, "byte 0"),
        ("gzip", b"\x1f\x8b\x08" + bytes(100), "byte 0"),
        ("both", one + other, f"byte {len(one)};"),  # put together by cat
    ):
        (tmp_path / f"{name}.tar").write_bytes(content)
        refuse(tmp_path / f"{name}.tar", word)
    refuse(write_tar(tmp_path / "sound.tar", [("1.wav", b"sound"), ("1.lab", b"words")]), r"sound\.tar")


def test_a_tar_that_cannot_be_read_now_leaves_nothing_that_looks_finished(tmp_path, monkeypatch):
    """A disk's error is not damage: the same command again has all samples."""
    path = write_tar(tmp_path / "a.tar", pairs(0, 1, 2))
    read, failures = TarWalk.read, [OSError(5, "Input/output error")]

    def failing(walk: TarWalk, member: Any) -> Any:
        if failures and str(member.name).startswith("1."):
            raise failures.pop()
        return read(walk, member)

    monkeypatch.setattr(TarWalk, "read", failing)
    refuse(path, "Input/output error")
    assert open_dataset(build(path), "train").keys.tolist() == ["0", "1", "2"]


def test_a_file_that_nobody_reads_costs_no_sample(tmp_path):
    """Embeddings beside an image may be large, and so may metadata beside a caption."""
    image, long = published.encoded(published.make_image(1)), bytes((4 << 20) + 1)
    members = [
        ("a.jpg", image), ("a.npy", long), ("a.txt", b"one"),
        ("b.jpg", image), ("b.json", long), ("b.txt", b"two"),
        ("c.jpg", image), ("c.json", long),
        ("d.jpg", image), ("d.txt", long),
        ("e.gif", b"GIF89a"),
    ]  # fmt: skip
    out = build(write_tar(tmp_path / "a.tar", list(members)))
    assert captions_by_key(out) == {"train": {"a": ["one"], "b": ["two"]}}
    assert reasons(out) == {
        "a.tar:c": "metadata are too long", "a.tar:d": "caption is too long", "a.tar:e": "no caption"
    }  # fmt: skip


@pytest.mark.slow
def test_a_tar_member_that_is_too_large_is_not_read(tmp_path):
    """The tar is sparse there, so the member takes no disk space."""
    path = write_tar(tmp_path / "huge.tar", pairs("a"))
    member = tarfile.TarInfo("b.jpg")
    member.size = 200 << 20
    with path.open("r+b") as file:
        file.seek(0)
        with tarfile.open(path) as tar:
            end = max(m.offset_data + 512 for m in tar.getmembers())
        file.seek(end)
        file.write(member.tobuf(tarfile.GNU_FORMAT))
        file.truncate(end + 512 + (200 << 20))
        file.seek(0, 2)
        file.write(bytes(1024))
    before = reset_peak()
    out = build(path, max_image_bytes=1 << 20)
    assert peak_memory() - before < 100 << 20
    assert reasons(out) == {"huge.tar:b": "image file is too large"}


@pytest.mark.parametrize("name", ["x.tar", "x.TAR", "x.tar.gz", "x.tar.bz2", "x.tar.xz", "x.tgz"])
def test_a_cut_tar_is_found_wherever_it_was_cut(tmp_path, name):
    """A tar that was cut before a header is whole to tarfile. Samples before the cut are kept."""
    mode = next((f"w:{kind}" for kind in ("gz", "bz2", "xz") if name.endswith(kind)), "w")
    content = write_tar(tmp_path / name, pairs(*range(12)), mode).read_bytes()
    whole = [sample.key for sample in read_samples(tmp_path / name, 1 << 20)]
    assert whole == [str(i) for i in range(12)]
    with tarfile.open(tmp_path / name) as tar:
        texts = [member.offset_data + member.size for member in tar if member.name.endswith(".txt")]
    step = 512 if mode == "w" else max(1, len(content) // 40)
    # An uncompressed tar may lose its padding, but for one empty block at the end of the file.
    for cut in range(step, len(content) - (tarfile.RECORDSIZE if mode == "w" else 0), step):
        (tmp_path / name).write_bytes(content[:cut])
        found = list(read_samples(tmp_path / name, 1 << 20))
        assert [sample.key for sample in found] == whole or any(sample.fault for sample in found), cut
        kept = [sample.key for sample in found if not sample.fault]
        assert kept == whole[: len(kept)]
        assert mode != "w" or len(kept) >= sum(end <= cut for end in texts), cut


def test_a_cut_tar_is_named_once(tmp_path, caplog):
    content = write_tar(tmp_path / "x.tar", pairs(*range(12))).read_bytes()
    (tmp_path / "x.tar").write_bytes(content[: len(content) // 2])
    where = {line["where"] for line in read_json_lines(build(tmp_path / "x.tar") / "rejected.jsonl")}
    assert str(tmp_path / "x.tar") in where
    assert "x.tar:x.tar" not in caplog.text


@pytest.mark.parametrize("first", [b"BZh12.jpg", b"BZh1AY.jpg", b"\x1f\x8b1.jpg"])
def test_a_plain_tar_may_begin_like_a_compressed_one(tmp_path, first):
    name = first.decode("latin-1")
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.GNU_FORMAT, encoding="latin-1") as tar:
        published.add_members(tar, [(name, b"an image"), (name.replace("jpg", "txt"), b"words")])
    (sample,) = read_samples(tmp_path / "x.tar", 1 << 20)
    assert (sample.parts, sample.fault) == ({"jpg": b"an image", "txt": b"words"}, None)


@pytest.mark.parametrize("kind", ["gz", "bz2", "xz"])
def test_bytes_after_a_compressed_tar_cost_no_sample(tmp_path, kind):
    """Captions of img2dataset are in a table beside the tar, so its samples are images alone."""
    path = write_tar(tmp_path / f"x.tar.{kind}", [("a.jpg", b"one"), ("b.jpg", b"two")], f"w:{kind}")
    with path.open("ab") as file:
        file.write(b"more bytes")
    one, two, *rest = read_samples(path, 1 << 20)
    assert [(sample.key, sample.fault) for sample in (one, two)] == [("a", None), ("b", None)]
    assert all(sample.fault == "tar is damaged after its samples" for sample in rest)


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_hard_links_stand_for_the_files_before_them(tmp_path, mode):
    """GNU tar writes one for each further name of a file, and our own tars for a further question about an image."""
    pixels = [published.make_image(i) for i in range(2)]
    names = {"a.jpg": "", "a.txt": "", "b.jpg": "", "b.txt": "a.txt", "c.jpg": "a.jpg", "c.txt": "b.txt",
             "d.jpg": "a.jpg", "d.txt": "", "e.jpg": "later.jpg", "e.txt": "a.txt"}  # fmt: skip
    contents = {"a.jpg": published.encoded(pixels[0]), "b.jpg": published.encoded(pixels[1])}
    members = [
        (special(name, tarfile.LNKTYPE, link), b"")
        if link
        else (name, contents.get(name, b"words of " + name.encode()))
        for name, link in names.items()
    ]
    out = build(write_tar(tmp_path / ("a.tar" if mode == "w" else "a.tar.gz"), members, mode))
    dataset = open_dataset(out, "train")
    assert dataset.keys.tolist() == ["a", "b", "c", "d"]
    assert [dataset.captions(i)[0] for i in range(4)] == [*3 * ["words of a.txt"], "words of d.txt"]
    assert [dataset.image_bytes(i) for i in range(4)] == [contents[f"{key}.jpg"] for key in "abaa"]
    assert list(reasons(out).values()) == ["no image"]
    # What `mvlm data index` keeps of a tar of ours, a build keeps too.
    assert open_dataset(build(out / "train-000000.tar"), "train").keys.tolist() == ["a", "b", "c", "d"]
