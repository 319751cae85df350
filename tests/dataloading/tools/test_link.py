"""`tools.link`: tars and Parquet files of real writers, linked where they are, opened, loaded, resumed and in parts."""

import base64
import io
import os
import re
import shutil
import struct
import tarfile
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mvlm_dataloading import (
    DataError,
    Loader,
    ViewOptions,
    check_shards,
    make_view,
    open_dataset,
    rebuild_indices,
)
from mvlm_dataloading.images.dali_decoder import ImageDecoder
from mvlm_dataloading.links.captions import parse_captions_option
from mvlm_dataloading.links.scan import image_fault
from mvlm_dataloading.tools import link as module
from mvlm_dataloading.tools.check import contact_sheet, findings_table
from mvlm_dataloading.tools.link import LinkOptions, link_files, merge_links
from support import seaweed as spoil
from support.data import wave_tokenizer
from support.gate import gate_of
from support.linked import FORMATS, picture, sample, write_table, write_tars
from support.seaweed import BUCKET, KEYS, Seaweed, reading_from, serve_proxy

ALL = "txt,json:caption=2,json:recaption=1"


@pytest.fixture(autouse=True)
def cache(data_cache: Path) -> Path:
    return data_cache


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three tars of 20 samples."""
    folder = tmp_path_factory.mktemp("tars")
    write_tars(folder, 3, 20)
    return folder


@pytest.fixture(scope="module")
def uploaded(seaweed: Seaweed, tars: Path) -> str:
    """The URL of these tars in a bucket, with braces."""
    for tar in tars.iterdir():
        seaweed.put(f"linked/{tar.name}", tar.read_bytes())
    return f"s3://{BUCKET}/linked/{{00000..00002}}.tar"


def options(caption: str = "txt", **further: str) -> LinkOptions:
    return LinkOptions(parse_captions_option(caption), **further)


def link(urls: str | Path | list[str], out: Path, caption: str = "txt", **further) -> dict:
    given = urls if isinstance(urls, list) else [str(urls)]
    found = link_files(given, out, options(caption, **further.pop("options", {})), workers=0, **further)
    assert found is not None
    return found


def check_samples(out: Path, count: int, captions: list[str]) -> None:
    """Compare the samples that open with those that were written."""
    dataset = open_dataset(out, "train")
    assert len(dataset) == count
    for number in range(count):
        assert dataset.captions(number) == [text.format(number) for text in captions]
        written = picture(number, list(FORMATS)[number % 4])
        if number % 4 == 3:  # a GIF, which DALI does not read
            found, wanted = (
                np.asarray(Image.open(io.BytesIO(one)).convert("RGB")) for one in (dataset.image_bytes(number), written)
            )
            assert np.array_equal(found, wanted)
        else:
            assert dataset.image_bytes(number) == written


def load(out: Path, batches: int = 9) -> Iterator[tuple[np.ndarray, list[int]]]:
    """Images and tokens of the first batches."""
    dataset = open_dataset(out, "train")
    loader = Loader(dataset, wave_tokenizer(), batch_size=20, image_size=32, text_length=12, seed=3)
    for _, (batch, _) in zip(range(batches), loader, strict=False):
        yield batch.images.numpy(), batch.tokens.tolist()
    loader.close()


def test_tars_in_a_bucket(seaweed: Seaweed, uploaded: str, tars: Path, tmp_path: Path) -> None:
    """They open with what was written, and load the batches of the same tars on a disk."""
    with reading_from(seaweed.s3):
        link(uploaded, tmp_path / "out", ALL)
        check_samples(tmp_path / "out", 60, ["text {}", "json {}", "re {} a", "re {} b"])
        remote = list(load(tmp_path / "out"))
    files = b"".join(path.read_bytes() for path in (tmp_path / "out").iterdir())
    assert not any(secret.encode() in files for secret in KEYS.values())
    link(tars / "{00000..00002}.tar", tmp_path / "local", ALL)
    for (images, tokens), (wanted, others) in zip(remote, load(tmp_path / "local"), strict=True):
        assert np.array_equal(images, wanted)
        assert tokens == others


def test_an_index_has_at_most_60_bytes_a_sample(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for number in range(500):
            key = f"a/very/long/path/of/a/key/{number:0100d}"
            for extension, content in (("jpg", picture(number)), *((f"t{k}.txt", b"text") for k in range(4))):
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    for caption in ("t0.txt", "t0.txt,t1.txt,t2.txt,t3.txt"):
        link(tmp_path / "a.tar", tmp_path / caption, caption)
        assert (tmp_path / caption / "train.index").stat().st_size < 500 * 57 + 200
        assert len({open_dataset(tmp_path / caption, "train").keys[i] for i in range(500)}) == 500


@pytest.mark.parametrize("by_datasets", [True, False])
def test_parquet(by_datasets: bool, seaweed: Seaweed, tmp_path: Path) -> None:
    path = write_table(tmp_path / "rows.parquet", range(30), by_datasets=by_datasets)
    url = seaweed.put(f"rows-{by_datasets}.parquet", path.read_bytes())
    with reading_from(seaweed.s3):
        link(url, tmp_path / "out", "caption,others")
        check_samples(tmp_path / "out", 30, ["text {}", "re {} a", "re {} b"])
        remote = list(load(tmp_path / "out", 2))
    link(path, tmp_path / "local", "caption,others")
    for (images, tokens), (wanted, others) in zip(remote, load(tmp_path / "local", 2), strict=True):
        assert np.array_equal(images, wanted)
        assert tokens == others
    if not by_datasets:
        link(path, tmp_path / "field", "info:caption")
        check_samples(tmp_path / "field", 30, ["text {}"])
    with pytest.raises(DataError, match=r"caption, others.*--caption"):
        link(path, tmp_path / "none", "missing")


def test_captions_are_drawn_by_weight_and_epoch(tars: Path, tmp_path: Path) -> None:
    """By seed, epoch and sample alone: a resumed loader draws the same."""
    link(tars / "*.tar", tmp_path / "out", ALL)
    dataset, tokenizer = open_dataset(tmp_path / "out", "train"), wave_tokenizer()
    texts = [text for i in range(60) for text in dataset.captions(i)]
    fields = {tuple(tokenizer.encode([text], 12)[0].tolist()): text.split()[0] for text in texts}
    batches, drawn = list(load(tmp_path / "out", 150)), Counter[str]()
    for _, tokens in batches:
        starts = [*(k for k, token in enumerate(tokens) if token == tokenizer.cls_id), len(tokens)]
        drawn.update(fields[tuple(tokens[a:b])] for a, b in pairwise(starts))
    assert sum(drawn.values()) == 3000
    for field, share in (("text", 1 / 4), ("json", 2 / 4), ("re", 1 / 4)):
        assert abs(drawn[field] / 3000 - share) < 5 * (share * (1 - share) / 3000) ** 0.5
    assert [tokens for _, tokens in load(tmp_path / "out", 9)] == [tokens for _, tokens in batches[:9]]


def test_parts_and_a_resumed_pass_give_the_same_bytes(tars: Path, tmp_path: Path, monkeypatch) -> None:
    urls = [str(tars / "*.tar")]
    link(urls, tmp_path / "whole" / "out", ALL)
    for number in (1, 2):
        link_files(urls, tmp_path / f"p{number}", options(ALL), part=(number, 2), workers=1)
    with pytest.raises(DataError, match="file 2"):
        merge_links([tmp_path / "p1"], tmp_path / "merged" / "out")
    merge_links([tmp_path / "p2", tmp_path / "p1"], tmp_path / "merged" / "out")

    read, scan_tar = [], module.scan_tar

    def scan(store, linked, given):
        read.append(linked.url)
        if len(read) == 3:
            raise KeyboardInterrupt
        return scan_tar(store, linked, given)

    monkeypatch.setattr(module, "scan_tar", scan)
    with pytest.raises(KeyboardInterrupt):
        link(urls, tmp_path / "killed" / "out", ALL)
    with pytest.raises(DataError, match="another"):
        link(urls, tmp_path / "killed" / "out", "txt")
    link(urls, tmp_path / "killed" / "out", ALL)
    assert len(read) == 4  # three, and the last once more
    folders = [tmp_path / one / "out" for one in ("whole", "merged", "killed")]
    contents = [{path.name: path.read_bytes() for path in folder.iterdir()} for folder in folders]
    assert contents[0] == contents[1] == contents[2]
    assert sorted(path.name for path in (tmp_path / "killed").iterdir()) == ["out"]


def test_splits_by_name_and_by_option(tars: Path, tmp_path: Path) -> None:
    write_tars(tmp_path / "val", 1, 5, "them-val-{}.tar")
    urls = [str(tars / "*.tar"), str(tmp_path / "val" / "*.tar")]
    assert {name: part["samples"] for name, part in link(urls, tmp_path / "out")["splits"].items()} == {
        "train": 60,
        "validation": 5,
    }
    assert list(link(urls, tmp_path / "out2", options={"split": "test"})["splits"]) == ["test"]


def test_samples_that_are_left_out(tmp_path: Path) -> None:
    jpeg = picture(0)
    samples = [
        {"jpg": jpeg, "txt": b"good"}, {"jpg": jpeg}, {"txt": b"no image"}, {"jpg": b"no image", "txt": b"a"},
        {"jpg": jpeg[: len(jpeg) // 2], "txt": b"cut"}, {"jpg": jpeg, "png": picture(1, "png"), "txt": b"two"},
        {"jpg": jpeg, "txt": b"\xff"}, {"jpg": b"", "txt": b"empty"}, {"jpg": jpeg + bytes(30), "txt": b"with a tail"},
    ]  # fmt: skip
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for number, parts in enumerate(samples):
            for extension, content in parts.items():
                member = tarfile.TarInfo(f"{number}.{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    found = link(tmp_path / "a.tar", tmp_path / "out")
    dataset = open_dataset(tmp_path / "out", "train")
    assert [dataset.captions(i)[0] for i in range(len(dataset))] == ["good", "with a tail"]
    assert sum(found["rejected"].values()) == 7
    assert found["rejected"]["no caption"] == 2
    with pytest.raises(DataError, match=r"none \(.*the samples have .*txt"):
        link(tmp_path / "a.tar", tmp_path / "none", "json:caption")


def test_pngs_whose_checksums_tell_of_damage(tmp_path: Path) -> None:
    """The decoder refuses what is left out."""
    png = picture(1, "png")
    decoder, taken = ImageDecoder(None), {}
    for at in range(33, len(png) - 12):
        content = bytes((*png[:at], png[at] ^ 4, *png[at + 1 :]))
        taken[at] = image_fault(content) is None
        if not taken[at]:
            assert isinstance(next(decoder([content])), str)
    assert not taken[png.index(b"IDAT") + 20]
    assert image_fault(png) is None


def test_a_tar_that_was_cut(tars: Path, tmp_path: Path, caplog) -> None:
    """At every block: the samples before the cut are linked, nothing is invented, and it is said."""
    content = (tars / "00000.tar").read_bytes()
    for size in range(0, 30_000, 2560):
        (tmp_path / "cut.tar").write_bytes(content[:size])
        out = tmp_path / str(size)
        if size < 7000:  # no sample is whole
            with pytest.raises(DataError, match=r"cut\.tar|none"):
                link(tmp_path / "cut.tar", out)
            continue
        found = link(tmp_path / "cut.tar", out)
        assert found["rejected"]["tar ends early"] == 1
        dataset = open_dataset(out, "train")
        assert [dataset.captions(i) for i in range(len(dataset))] == [[f"text {i}"] for i in range(len(dataset))]
        assert "the samples before are linked" in caplog.text


@pytest.mark.parametrize("damage", ["packed by gzip", "compressed", "no header", "damaged", "another", "footer"])
def test_files_that_are_refused_by_name(damage: str, tars: Path, tmp_path: Path) -> None:
    import gzip

    whole = bytearray((tars / "00000.tar").read_bytes())
    name, content = "bad.tar", bytes(whole)
    if damage == "packed by gzip":
        content = gzip.compress(content)
    elif damage == "compressed":
        name = "bad.tar.gz"
    elif damage == "no header":
        content = b"x" * 20480
    elif damage == "damaged":
        content = bytes(whole[:5120] + b"\xff" * 512 + whole[5632:])
        at = content.index(b"000000001.", 512) // 512 * 512
        content = bytes(whole[:at] + b"\xff" * 512 + whole[at + 512 :])
    elif damage == "another":
        name = "bad.parquet"
    else:
        name = "bad.parquet"
        table = bytearray(write_table(tmp_path / "t.parquet", range(9), by_datasets=False).read_bytes())
        table[-60:-20] = b"\xff" * 40
        content = bytes(table)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=damage) as caught:
        link([str(tmp_path / name), str(tars / "00001.tar")], tmp_path / "out")
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name, content, word",
    [
        ("a.tar", b"", "no header|end"), ("a.tar", bytes(10240), "none"), ("a.tar", b"BZh91AY" + bytes(600), "bzip2"),
        ("a.tar", b"\xfd7zXZ\x00" + bytes(600), "xz"), ("a.tar", b"\x28\xb5\x2f\xfd" + bytes(600), "zstd"),
        ("a.tar.zst", b"", "compressed"), ("a.tgz", b"", "compressed"), ("a.zip", b"PK", "ends in"),
        ("a.parquet", b"", "Parquet"), ("a.parquet", b"PAR1" * 9, "Parquet"), ("a.parquet", "cut", "Parquet"),
        ("a.parquet", "group", "damaged"), ("a.parquet", "no image", "with the bytes of images"),
        ("a.parquet", "two images", "--image"), ("a.parquet", "other captions", "--caption"), ("a.tar", None, "file"),
    ],
)  # fmt: skip
def test_bad_files_have_one_line_each(name: str, content: bytes | str | None, word: str, tmp_path: Path) -> None:
    from pyarrow import parquet

    if isinstance(content, str):
        path = write_table(tmp_path / "whole.parquet", range(9), by_datasets=False)
        whole, table = bytearray(path.read_bytes()), parquet.read_table(path)
        whole[4:24] = b"\xff" * 20  # the header of a page
        changed = {"no image": table.drop(["image"]), "two images": table.append_column("more", table["image"])}
        changed["other captions"] = table.drop(["caption"])
        if content in changed:
            parquet.write_table(changed[content], path)
        content = {"cut": path.read_bytes()[:-30], "group": bytes(whole)}.get(content, path.read_bytes())
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=word) as caught:
        link([str(tmp_path / name)], tmp_path / "out", "caption" if name.endswith("parquet") else "txt")
    assert name in str(caught.value) or "out" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def _gif(width: int, height: int) -> bytes:
    image = struct.pack("<HHHHB", 0, 0, width, height, 0)
    return b"GIF89a" + struct.pack("<HHBBB", width, height, 0, 0, 0) + b"," + image + b"\x02\x02D\x01\x00;"


def _bmp(width: int, height: int) -> bytes:
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 100, 0, 0, 54) + header + bytes(46)


@pytest.mark.parametrize(
    "members, reason",
    [
        ({"1.jpg": b"", "1.txt": b"x"}, "image file is empty"), ({"1.jpg": picture(1)}, "no caption"),
        ({"1.gif": _gif(65000, 65000), "1.txt": b"x"}, "image has too many pixels"),
        ({"1.bmp": _bmp(60000, 60000), "1.txt": b"x"}, "image has too many pixels"),
        ({"1.jpg": picture(1), "1.txt": b"\xff\xfe\xff"}, "no caption"),
        ({"1.jpg": picture(1), "1.json": b"[1, 2]"}, "no caption"),
        ({"1.jpg": picture(1), "1.json": b'{"caption": '}, "no caption"),
        ({"1.jpg": "/etc/passwd", "1.txt": b"x"}, "no image"),
        ({"1.jpg": picture(1), "1.txt": "/etc/passwd"}, "no caption"),
        ({"1.jpg": picture(1, "png"), "1.txt": b"x"}, None), ({"/abs/1.jpg": picture(1), "/abs/1.txt": b"x"}, None),
        ({"../../1.jpg": picture(1), "../../1.txt": b"x"}, None), ({"0.jpg": picture(1), "0.txt": b"x"}, None),
    ],
)  # fmt: skip
def test_bad_samples_are_left_out_and_counted(members: dict[str, bytes | str], reason: str | None, tmp_path) -> None:
    """A good sample beside them stays. Files that are odd alone are taken; no path leads anywhere. A text is a link."""
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, content in {"z.jpg": picture(0), "z.txt": b"good", **members}.items():
            member = tarfile.TarInfo(name)
            if isinstance(content, str):
                member.type, member.linkname = tarfile.SYMTYPE, content
            else:
                member.size = len(content)
            tar.addfile(member, io.BytesIO(content) if isinstance(content, bytes) else None)
    found = link(tmp_path / "a.tar", tmp_path / "out", "txt,json:caption")
    dataset = open_dataset(tmp_path / "out", "train")
    captions = [dataset.captions(i)[0] for i in range(len(dataset))]
    assert captions == (["good"] if reason else ["good", "x"])
    assert found["rejected"] == ({reason: 1} if reason else {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tar", "cache", "out"]


@pytest.mark.parametrize(
    "images, captions, wanted",
    [
        ("with nulls", ["a", "b", "c", "d"], 2), ("bytes", ["a", None, "", "d"], 2),
        ("bytes", [["a"], [], None, ["d"]], 2), ("large", ["a", "b", "c", "d"], 4), ("bytes", [1, 2, 3, 4], 4),
        ("numbers", ["a"] * 4, "one column with the bytes"),
        ("lists", ["a"] * 4, "one column with the bytes"), ("encrypted", ["a"] * 4, "encrypted"),
    ],
)  # fmt: skip
def test_odd_tables(images: str, captions: list, wanted: int | str, tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    own = [picture(k) for k in range(4)]
    column = {
        "with nulls": pyarrow.array([own[0], None, b"", own[3]], pyarrow.binary()),
        "large": pyarrow.array(own, pyarrow.large_binary()),
        "numbers": [1, 2, 3, 4],
        "lists": [[one] for one in own],
    }.get(images, own)
    table = pyarrow.table({"image": column, "caption": captions})
    further = {"encryption_properties": _encryption()} if images == "encrypted" else {}
    with parquet.ParquetWriter(tmp_path / "a.parquet", table.schema, **further) as writer:
        writer.write_table(table)
    if isinstance(wanted, int):
        assert link(tmp_path / "a.parquet", tmp_path / "out", "caption")["splits"]["train"]["samples"] == wanted
        return
    with pytest.raises(DataError, match=wanted) as caught:
        link(tmp_path / "a.parquet", tmp_path / "out", "caption")
    assert "\n" not in str(caught.value)


def _encryption() -> Any:
    """Encryption of the columns under a footer that all can read, which would end a process that asks pyarrow of it."""
    encryption = pytest.importorskip("pyarrow.parquet.encryption")

    class Keys(encryption.KmsClient):
        def wrap_key(self, key, name):
            return base64.b64encode(key)

        def unwrap_key(self, key, name):
            return base64.b64decode(key)

    names = {"footer_key": "of the footer", "column_keys": {"of columns": ["image", "caption"]}}
    settings = encryption.EncryptionConfiguration(**names, plaintext_footer=True)
    factory = encryption.CryptoFactory(lambda _: Keys())
    return factory.file_encryption_properties(encryption.KmsConnectionConfig(), settings)


def test_a_pass_over_a_bad_network(seaweed: Seaweed, uploaded: str, tmp_path: Path) -> None:
    """Gives the index of a good one; of an outage the finished files stay."""
    with reading_from(seaweed.s3):
        link(uploaded, tmp_path / "good" / "out", ALL)
    with serve_proxy(seaweed.s3) as (address, proxy), reading_from(address):
        proxy.spoils.extend([spoil.dropped, spoil.truncated, spoil.status(503), spoil.delayed, spoil.another_length])
        link(uploaded, tmp_path / "bad" / "out", ALL)
        for path in (tmp_path / "good" / "out").iterdir():
            assert (tmp_path / "bad" / "out" / path.name).read_bytes() == path.read_bytes()
        proxy.spoils.extend([spoil.delayed] * 2 + [spoil.status(403)] * 99)
        with pytest.raises(DataError, match=r"denied.*2 of 3 files .*1 are finished"):
            link(uploaded, tmp_path / "out", ALL)
        proxy.spoils.clear()
        proxy.asked.clear()
        link(uploaded, tmp_path / "out", ALL)
        assert not any("00000.tar" in path for path in proxy.asked)


@pytest.mark.slow
def test_a_pass_goes_on_when_the_bucket_was_away(seaweed: Seaweed, tmp_path: Path, caplog) -> None:
    """In two processes: one line is logged, and the index is that of an undisturbed pass."""
    for tar in write_tars(tmp_path / "tars", 12, 4):
        seaweed.put(f"away/{tar.name}", tar.read_bytes())
    urls, folders = f"s3://{BUCKET}/away/{{00000..00011}}.tar", [tmp_path / name / "out" for name in ("good", "away")]
    with gate_of(seaweed.s3) as gate, reading_from(gate.address):
        link(urls, folders[0], ALL)
        assert not caplog.messages
        gate.shut_later(sent=gate.sent // 2, refuses=4)
        link_files([urls], folders[1], options(ALL), workers=2)
        assert gate.refused == 4
    good, away = ({path.name: path.read_bytes() for path in folder.iterdir()} for folder in folders)
    assert good == away
    assert caplog.messages == [f"s3://{BUCKET}: the store cannot be reached; it is tried again for two minutes"]


def test_a_shard_that_changed_since_it_was_linked(seaweed: Seaweed, tars: Path, tmp_path: Path) -> None:
    content = (tars / "00000.tar").read_bytes()
    url = seaweed.put("changing.tar", content)
    with reading_from(seaweed.s3):
        link(url, tmp_path / "out")
        seaweed.put("changing.tar", content.replace(b"text 1", b"TEXT 1"))
        with pytest.raises(DataError, match=r"changing\.tar.*link it again"):
            open_dataset(tmp_path / "out", "train").captions(1)
        with pytest.raises(DataError, match=r"changing\.tar.*link it again"):
            list(load(tmp_path / "out", 1))


def test_linked_data_at_a_url(seaweed: Seaweed, uploaded: str, tars: Path, tmp_path: Path, monkeypatch) -> None:
    with reading_from(seaweed.s3):
        link(uploaded, tmp_path / "out", ALL)
        for path in (tmp_path / "out").iterdir():
            seaweed.put(f"index-of-linked/{path.name}", path.read_bytes())
        found = open_dataset(f"s3://{BUCKET}/index-of-linked", "train")
        assert found.fingerprint == open_dataset(tmp_path / "out", "train").fingerprint
        assert found.captions(7) == ["text 7", "json 7", "re 7 a", "re 7 b"]
        with serve_proxy(seaweed.s3) as (address, proxy), reading_from(address):
            monkeypatch.setenv("MVLM_CACHE", str(tmp_path / "another cache"))
            third = open_dataset(f"s3://{BUCKET}/index-of-linked", "train")
            assert third.captions(7) == ["text 7", "json 7", "re 7 a", "re 7 b"]
            whole = (tmp_path / "out" / "train.index").stat().st_size
            assert (
                0 < proxy.sent["/tests/index-of-linked/train.index"] < 200 + (whole - 200) * 0.5
            )  # one shard of three
            assert third.where(59) == found.where(59)
        link(tars / "*.tar", tmp_path / "local")
        for path in (tmp_path / "local").iterdir():
            seaweed.put(f"index-of-paths/{path.name}", path.read_bytes())
        with pytest.raises(DataError, match="links to URLs"):  # another's index must not name files of this machine
            open_dataset(f"s3://{BUCKET}/index-of-paths", "train")


def test_other_captions_are_other_data(tars: Path, tmp_path: Path) -> None:
    """So a run is not resumed with them by mistake. A tar that was only touched is other data too."""
    found = set()
    for number, caption in enumerate(("txt", "txt=2,json:caption", "txt,json:caption")):
        link(tars / "*.tar", tmp_path / str(number), caption)
        found.add(open_dataset(tmp_path / str(number), "train").fingerprint)
    assert len(found) == 3


def test_hard_links_to_images(tmp_path: Path) -> None:
    """As this library writes them for several samples of an image."""
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for number in range(3):
            member = tarfile.TarInfo(f"{number}.jpg")
            if number:
                member.type, member.linkname = tarfile.LNKTYPE, "0.jpg"
                tar.addfile(member)
            else:
                member.size = len(picture(0))
                tar.addfile(member, io.BytesIO(picture(0)))
            text = tarfile.TarInfo(f"{number}.txt")
            text.size = 1
            tar.addfile(text, io.BytesIO(b"%d" % number))
    link(tmp_path / "a.tar", tmp_path / "out")
    dataset = open_dataset(tmp_path / "out", "train")
    assert [(dataset.captions(i), dataset.image_bytes(i)) for i in range(3)] == [
        ([str(i)], picture(0)) for i in range(3)
    ]


def test_names_are_split_as_webdataset_splits_them() -> None:
    from webdataset.tariterators import base_plus_ext

    from mvlm_dataloading.links.tars import split_name

    for name in ("a/b.c/0001.jpg", "0001.caption1.txt", "x.JPG", "dir.with.dots/x.seg.png", "a/0001.image.jpg"):
        key, extension = base_plus_ext(name)
        assert extension is not None
        assert split_name(name) == (key, extension.lower())


def test_a_damaged_index_is_named(tars: Path, tmp_path: Path) -> None:
    link(tars / "*.tar", tmp_path / "out")
    index = tmp_path / "out" / "train.index"
    content = bytearray(index.read_bytes())
    content[-100] ^= 1
    index.write_bytes(content)
    os.utime(index)
    found = open_dataset(tmp_path / "out", "train")
    with pytest.raises(DataError, match=r"train\.index.*link again"):
        found.where(59)


def test_samples_are_those_of_the_writer(tars: Path, tmp_path: Path) -> None:
    """The oracle of these tests is what webdataset was given."""
    link(tars / "*.tar", tmp_path / "out", ALL)
    dataset = open_dataset(tmp_path / "out", "train")
    for i in (0, 33, 59):
        assert dataset.keys[i] == sample(i)["__key__"]


def test_check_decodes_some_and_asks_for_all(seaweed: Seaweed, tars: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("mvlm_dataloading.tools.check._LINKED", 10)
    contents = [tar.read_bytes() for tar in sorted(tars.iterdir())]
    for number, content in enumerate(contents):
        seaweed.put(f"checked/{number}.tar", content)
    with reading_from(seaweed.s3):
        link("s3://tests/checked/*.tar", tmp_path / "out", ALL)
        (found,) = check_shards(tmp_path / "out", workers=0).values()
        assert not found.problems
        assert len(found.sizes) == 10
        assert "of 60 samples 10 were decoded" in findings_table(tmp_path / "out", {"train": found})
        contact_sheet(tmp_path / "out", tmp_path / "sheet.png")
        seaweed.put("checked/1.tar", contents[1][::-1])
        seaweed.client().delete_object(Bucket=BUCKET, Key="checked/2.tar")
        problems = check_shards(tmp_path / "out", workers=0)["train"].problems
        assert [("1.tar" in one, "2.tar" in one) for one in problems] == [(True, False), (False, True)]


@pytest.mark.parametrize("table", [False, True])
def test_views_of_links(table: bool, tars: Path, tmp_path: Path) -> None:
    """They are links with some of the records, and open without their sources."""
    if table:
        link(write_table(tmp_path / "a.parquet", range(60), by_datasets=False), tmp_path / "out", "caption")
    else:
        link(tars / "*.tar", tmp_path / "out", "txt,json:caption")
    dataset = open_dataset(tmp_path / "out", "train")
    given = {(*dataset.captions(i), dataset.image_bytes(i)) for i in range(60)}

    make_view(tmp_path / "half", [tmp_path / "out"], ViewOptions(fraction=0.5))
    make_view(tmp_path / "some", [tmp_path / "out"], ViewOptions(match="[13] ?[0-3]$|9$"))
    make_view(tmp_path / "many", [tmp_path / "out"], weights=[2.5])
    shutil.rmtree(tmp_path / "out")
    for name, low, high in (("half", 15, 45), ("some", 6, 30), ("many", 120, 180)):
        view = open_dataset(tmp_path / name, "train")
        assert low < len(view) < high
        assert {(*view.captions(i), view.image_bytes(i)) for i in range(len(view))} <= given
        assert not check_shards(tmp_path / name, workers=0)["train"].problems
    matching = open_dataset(tmp_path / "some", "train")
    wanted = [one for one in given if any(re.search("[13] ?[0-3]$|9$", text) for text in one[:-1])]
    assert len(matching) == len(wanted)
    assert len(list(load(tmp_path / "many", 2))) == 2


def test_a_view_of_two_links_and_a_built_folder(tars: Path, waves: Path, tmp_path: Path) -> None:
    """Each source keeps its own captions and its own weight; copies of a sample are stored once."""
    link(tars / "0000[01].tar", tmp_path / "a", "txt,json:caption=2,json:recaption")
    link(write_table(tmp_path / "b.parquet", range(100, 130), by_datasets=False), tmp_path / "b", "caption")
    sources = [tmp_path / "a", tmp_path / "b", waves]
    make_view(tmp_path / "mix", sources, ViewOptions(splits=("train",), leaks="keep"), weights=[1, 2, 0.5])
    make_view(tmp_path / "again", [tmp_path / "mix"], ViewOptions(fraction=0.7))
    view, built = open_dataset(tmp_path / "mix", "train"), open_dataset(waves, "train")
    samples = [(tuple(view.captions(i)), view.image_bytes(i)) for i in range(len(view))]
    counts = Counter(samples)
    for source, copies in ((tmp_path / "a", 1), (tmp_path / "b", 2)):
        dataset = open_dataset(source, "train")
        for i in range(len(dataset)):
            assert counts.pop((tuple(dataset.captions(i)), dataset.image_bytes(i))) == copies
    own = {(tuple(built.captions(i)), built.image_bytes(i)) for i in range(len(built))}
    assert 0.3 * len(own) < len(counts) < 0.7 * len(own)
    assert counts.keys() <= own
    assert [list(one[0]) for one in samples] == list(view.captions_of(range(len(view))))
    (drawn,) = load(tmp_path / "mix", 1)
    assert np.array_equal(drawn[0], next(load(tmp_path / "mix", 1))[0])
    assert view.remote is not None
    view.remote.fetch([2])  # the table's, whose samples the view has twice
    places = view.locate("image", np.flatnonzero(view.shard_of(np.arange(len(view))) == 2))[0]
    assert len(set(places.tolist())) * 2 == len(places) == 60
    again = open_dataset(tmp_path / "again", "train")
    assert {(tuple(again.captions(i)), again.image_bytes(i)) for i in range(len(again))} <= set(samples)
    assert not check_shards(tmp_path / "again", workers=0)["train"].problems


def test_views_that_would_decode_all_images_are_refused(tars: Path, waves: Path, tmp_path: Path) -> None:
    link(tars / "*.tar", tmp_path / "out")
    for sources, given, word in (
        ([tmp_path / "out"], ViewOptions(min_side=9), "min-side"),
        ([tmp_path / "out"], ViewOptions(duplicates="near"), "duplicates"),
        ([tmp_path / "out", waves], ViewOptions(), "leaks"),
        ([tmp_path / "out"], ViewOptions(match="nowhere"), "at least one sample"),
    ):
        with pytest.raises(DataError, match=word):
            make_view(tmp_path / "view", sources, given)
    with pytest.raises(DataError, match="data link"):
        rebuild_indices(tmp_path / "out")
