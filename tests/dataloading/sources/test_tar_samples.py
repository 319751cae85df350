"""Damaged and odd tars of other tools."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from mvlm_dataloading import BuildOptions, DataError, build_shards, open_dataset
from mvlm_dataloading.sources.record import safe_key
from mvlm_dataloading.sources.tar_samples import read_samples
from mvlm_dataloading.sources.webdataset import webdataset
from support import published


def rejections(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]


def peak_since_reset() -> int:
    """Peak memory of this process in bytes since the peak was last reset."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) << 10


def write_tar(path: Path, members: list[tuple[tarfile.TarInfo | str, bytes]]) -> None:
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, content in members:
            member = tarfile.TarInfo(name) if isinstance(name, str) else name
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


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
    out = build_shards(webdataset([tmp_path / "odd.tar"]), tmp_path / "out", workers=0)
    dataset = open_dataset(out, "train")
    names = ["../../etc/climb", "/absolute", "猫 é", "dots.v1.final", "again", "other", "long" * 60]
    assert dataset.keys.tolist() == [safe_key(name) for name in names]
    assert dataset.captions(2) == ["猫"]
    rejected = {line["where"].removeprefix(f"{tmp_path}/"): line["reason"] for line in rejections(out)}
    assert rejected == {
        "odd.tar:linked": "no image",
        "odd.tar:hard": "no image",
        "odd.tar:device": "no image",
        "odd.tar:pipe": "no image",
        "odd.tar:folder": "no image",
        "odd.tar:twice": "sample has two files of the same kind",
        "odd.tar:again": "key was used before",
        "odd.tar:latin1": "caption is not UTF-8",
        "odd.tar:mute": "no caption",
        "odd.tar:blind": "no image",
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["odd.tar", "out"]


def test_truncated_tars_keep_their_whole_samples(tmp_path):
    whole = tmp_path / "whole.tar"
    jpegs = [published.encoded(published.make_image(i)) for i in range(3)]
    write_tar(whole, [(f"{i}.{ext}", part) for i in range(3) for ext, part in (("jpg", jpegs[i]), ("txt", b"words"))])
    with tarfile.open(whole) as tar:
        members = tar.getmembers()
    content = whole.read_bytes()
    last = members[-2]  # the third image
    cuts = {
        "in an image": last.offset_data + 100,
        "in a header": last.offset + 100,
        "after a header": last.offset_data,
        "before a caption": members[-1].offset,
        "in a caption": members[-1].offset_data + 2,
    }
    for name, cut in cuts.items():
        folder = tmp_path / name.replace(" ", "-")
        folder.mkdir()
        (folder / "cut.tar").write_bytes(content[:cut])
        out = build_shards(webdataset([folder / "cut.tar"]), folder / "out", workers=0)
        assert open_dataset(out, "train").keys.tolist() == ["0", "1"], name
        reasons = [line["reason"] for line in rejections(out)]
        assert reasons, name
        assert all("tar" in reason or reason == "no caption" for reason in reasons), (name, reasons)
    for name, content, message in (
        ("empty", b"", "wanted at least one sample, found none; rejected"),
        ("no-header", b"z" * 100, "wanted at least one sample, found none; rejected"),
        ("no-tar", b"z" * 5000, r"no-tar\.tar: wanted a tar .*, found no header of a tar at byte 0; download it again"),
        ("gzip", b"\x1f\x8b\x08" + bytes(100), r"gzip\.tar: wanted a tar .*, found damaged compressed data at byte 0"),
    ):
        (tmp_path / f"{name}.tar").write_bytes(content)
        with pytest.raises(DataError, match=message):
            build_shards(webdataset([tmp_path / f"{name}.tar"]), tmp_path / f"{name}-out", workers=0)


def test_a_damaged_header_in_a_tar_is_refused_with_its_place(tmp_path):
    """`tarfile` takes it for the end: 3 of 12 samples without a word."""
    jpeg = published.encoded(published.make_image(0))
    for name in ("good", "bad"):
        members = [(f"{name}{i}.{ext}", part) for i in range(12) for ext, part in (("jpg", jpeg), ("txt", b"words"))]
        write_tar(tmp_path / f"{name}.tar", list(members))
    with tarfile.open(tmp_path / "bad.tar") as tar:
        at = tar.getmember("bad3.jpg").offset
    with (tmp_path / "bad.tar").open("r+b") as file:
        file.seek(at + 150)
        file.write(b"\xff" * 4)
    with tarfile.open(tmp_path / "bad.tar") as tar:
        assert len(tar.getmembers()) == 6
    message = rf"bad\.tar: wanted a tar whose every block belongs to .*, found a damaged header at byte {at}; "
    for workers in (0, 1):
        with pytest.raises(DataError, match=message):
            build_shards(webdataset([tmp_path]), tmp_path / "out", workers=workers)
        assert not (tmp_path / "out").exists()


def test_tars_that_were_put_together_by_cat_are_refused(tmp_path):
    jpeg = published.encoded(published.make_image(0))
    for name in "ab":
        write_tar(tmp_path / f"{name}.tar", [(f"{name}.jpg", jpeg), (f"{name}.txt", b"words")])
    first, second = ((tmp_path / f"{name}.tar").read_bytes() for name in "ab")
    (tmp_path / "both.tar").write_bytes(first + second)
    with pytest.raises(DataError, match=rf"both\.tar: .* ends a tar at byte {len(first)}; download it again, or leave"):
        build_shards(webdataset([tmp_path / "both.tar"]), tmp_path / "out", workers=0)


def test_a_build_warns_of_a_tar_that_was_cut(tmp_path, caplog):
    jpeg = published.encoded(published.make_image(0))
    write_tar(
        tmp_path / "a.tar", [(f"{i}.{ext}", part) for i in range(3) for ext, part in (("jpg", jpeg), ("txt", b"x"))]
    )
    content = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(content[: len(content) // 2 // 512 * 512])
    build_shards(webdataset([tmp_path / "a.tar"]), tmp_path / "out", workers=0)
    assert "a.tar:a.tar: wanted a whole tar, found a cut one; what it held behind the cut is lost" in caplog.text


def test_a_tar_that_cannot_be_read_just_now_leaves_nothing_that_looks_finished(tmp_path, monkeypatch):
    """A disk's error is not damage: the same command again has all samples."""
    jpeg = published.encoded(published.make_image(1))
    write_tar(
        tmp_path / "a.tar", [(f"{i}.{ext}", part) for i in range(3) for ext, part in (("jpg", jpeg), ("txt", b"x"))]
    )
    read, failures = tarfile.TarFile.extractfile, [OSError(5, "Input/output error")]

    def extract(tar: tarfile.TarFile, member: Any) -> Any:
        if failures and str(member.name).startswith("1."):
            raise failures.pop()
        return read(tar, member)

    monkeypatch.setattr(tarfile.TarFile, "extractfile", extract)
    with pytest.raises(DataError, match=r"a\.tar: wanted a tar that can be read, found .*Input/output error"):
        build_shards(webdataset([tmp_path / "a.tar"]), tmp_path / "out", workers=0)
    out = build_shards(webdataset([tmp_path / "a.tar"]), tmp_path / "out", workers=0)
    assert open_dataset(out, "train").keys.tolist() == ["0", "1", "2"]


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
    write_tar(tmp_path / "a.tar", list(members))
    out = build_shards(webdataset([tmp_path / "a.tar"]), tmp_path / "out", workers=0)
    dataset = open_dataset(out, "train")
    assert {dataset.keys[i]: dataset.captions(i) for i in range(len(dataset))} == {"a": ["one"], "b": ["two"]}
    reasons = {line["key"]: line["reason"] for line in rejections(out)}
    assert reasons == {"c": "metadata are too long", "d": "caption is too long", "e": "no caption"}


def test_tars_of_other_files_alone_are_refused_by_name(tmp_path):
    for name in ("a.tar", "b.tar"):
        write_tar(tmp_path / name, [("1.wav", b"sound"), ("1.lab", b"words")])
    with pytest.raises(
        DataError, match=r"wanted at least one sample, .* no caption in train a\.tar and 1 more; name the"
    ):
        build_shards(webdataset([tmp_path / "a.tar", tmp_path / "b.tar"]), tmp_path / "out", workers=0)


@pytest.mark.slow
def test_a_tar_member_that_is_too_large_is_not_read(tmp_path):
    """The tar is sparse there, so the member takes no disk space."""
    path = tmp_path / "huge.tar"
    write_tar(path, [("a.jpg", published.encoded(published.make_image(0))), ("a.txt", b"a")])
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
    Path("/proc/self/clear_refs").write_text("5")
    before = peak_since_reset()
    out = build_shards(webdataset([path]), tmp_path / "out", BuildOptions(max_image_bytes=1 << 20), workers=0)
    assert peak_since_reset() - before < 100 << 20
    reasons = [line["reason"] for line in rejections(out)]
    assert reasons == ["image file is too large"]


@pytest.mark.parametrize("name", ["x.tar", "x.TAR", "x.tar.gz", "x.tar.bz2", "x.tar.xz", "x.tgz"])
def test_a_cut_tar_is_found_wherever_it_was_cut(tmp_path, name):
    """Where a header begins, tarfile takes what is there for the whole."""
    tar = io.BytesIO()
    mode: Any = next((f"w:{kind}" for kind in ("gz", "bz2", "xz") if name.endswith(kind)), "w")
    with tarfile.open(fileobj=tar, mode=mode) as opened:
        for i in range(12):
            image = published.encoded(published.make_image(i))
            published.add_members(opened, [(f"{i}.jpg", image), (f"{i}.txt", b"words")])
    content = tar.getvalue()
    (tmp_path / name).write_bytes(content)
    whole = [sample.key for sample in read_samples(tmp_path / name, 1 << 20)]
    assert whole == [str(i) for i in range(12)]
    step = 512 if mode == "w" else max(1, len(content) // 40)
    # An uncompressed tar may lose its padding, but for one empty block at the end of the file.
    for cut in range(step, len(content) - (tarfile.RECORDSIZE if mode == "w" else 0), step):
        (tmp_path / name).write_bytes(content[:cut])
        found = list(read_samples(tmp_path / name, 1 << 20))
        assert [sample.key for sample in found] == whole or any(sample.fault for sample in found), cut


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
    mode: Any = f"w:{kind}"
    with tarfile.open(tmp_path / f"x.tar.{kind}", mode) as tar:
        published.add_members(tar, [("a.jpg", b"one"), ("b.jpg", b"two")])
    with (tmp_path / f"x.tar.{kind}").open("ab") as file:
        file.write(b"more bytes")
    one, two, *rest = read_samples(tmp_path / f"x.tar.{kind}", 1 << 20)
    assert [(sample.key, sample.fault) for sample in (one, two)] == [("a", None), ("b", None)]
    assert all(sample.fault == "tar is damaged after its samples" for sample in rest)


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_hard_links_stand_for_the_files_before_them(tmp_path, mode):
    """GNU tar writes one for each further name of a file, and our own tars for a further question about an image."""
    pixels = [published.make_image(i) for i in range(2)]
    names = {"a.jpg": "", "a.txt": "", "b.jpg": "", "b.txt": "a.txt", "c.jpg": "a.jpg", "c.txt": "b.txt",
             "d.jpg": "a.jpg", "d.txt": "", "e.jpg": "later.jpg", "e.txt": "a.txt"}  # fmt: skip
    contents = {"a.jpg": published.encoded(pixels[0]), "b.jpg": published.encoded(pixels[1])}
    path = tmp_path / ("a.tar" if mode == "w" else "a.tar.gz")
    with tarfile.open(path, mode) as tar:
        for name, link in names.items():
            member = special(name, tarfile.LNKTYPE, link) if link else tarfile.TarInfo(name)
            content = b"" if link else contents.get(name, b"words of " + name.encode())
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    out = build_shards(webdataset([path]), tmp_path / "out", workers=0)
    dataset = open_dataset(out, "train")
    assert dataset.keys.tolist() == ["a", "b", "c", "d"]
    assert [dataset.captions(i)[0] for i in range(4)] == [*3 * ["words of a.txt"], "words of d.txt"]
    assert [dataset.image_bytes(i) for i in range(4)] == [contents[f"{key}.jpg"] for key in "abaa"]
    assert [(line["key"], line["reason"]) for line in rejections(out)] == [("e", "no image")]
    # What `mvlm data index` keeps of a tar of ours, a build keeps too.
    again = build_shards(webdataset([out / "train-000000.tar"]), tmp_path / "again", workers=0)
    assert open_dataset(again, "train").keys.tolist() == ["a", "b", "c", "d"]
