"""What a visitor may send, and the message for everything else."""

import io
import os
import struct
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mvlm.app.uploads import (
    KEPT,
    MAX_BYTES,
    MAX_CHARACTERS,
    MAX_LABELS,
    Uploads,
    check_image,
    check_lines,
    check_text,
)
from mvlm.errors import ConfigError, RunError
from support import hostile_images


def png(width: int, height: int) -> bytes:
    """A PNG whose header promises this size, and which holds one row."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    row = zlib.compress(bytes(1 + 3 * width))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", row) + chunk(b"IEND", b"")


def whole_png() -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)).save(file, "PNG")
    return file.getvalue()


BOMB_SVG = b'<?xml version="1.0"?><!DOCTYPE svg [<!ENTITY a "' + b"a" * 50 + b'"><!ENTITY b "&a;&a;">]><svg>&b;</svg>'


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"


def test_no_program_of_the_system_reads_an_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow would hand an EPS file to Ghostscript."""
    started = tmp_path / "started"
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {started}\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    (tmp_path / "x.png").write_bytes(EPS)
    with pytest.raises(RunError):
        check_image(tmp_path / "x.png")
    assert not started.exists()


@pytest.mark.parametrize(
    "content, message",
    [
        (png(60_000, 60_000), "wanted at most 40000000 pixels"),
        (png(9_000, 9_000), "wanted at most 40000000 pixels, found 9000 x 9000; make it smaller"),
        (hostile_images.png(6300, 6300, 6300), "wanted an image that takes at most 150 MB"),
        (BOMB_SVG, "wanted an image, could not read it"),
        (whole_png()[:-900], "wanted an image, could not read it"),
        (b"", "wanted an image, could not read it"),
        (b"#!/bin/sh\n", "wanted an image, could not read it"),
        (EPS, "wanted an image, could not read it"),
    ],
    ids=["huge", "large", "much memory", "SVG", "cut", "empty", "text", "EPS"],
)
def test_a_file_that_is_no_good_image_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(RunError, match=f"^image: {message}") as refused:
        check_image(tmp_path / "x.png")
    assert str(tmp_path) not in str(refused.value)  # a visitor learns nothing of this machine


def test_a_large_file_is_refused_before_it_is_read(tmp_path: Path) -> None:
    with (tmp_path / "x.png").open("wb") as file:
        file.truncate(MAX_BYTES + 1_000_000)
    with pytest.raises(RunError, match=r"image: wanted at most 20 MB, found 21\.0 MB; choose a smaller file"):
        check_image(tmp_path / "x.png")


def test_a_device_a_pipe_and_a_folder_are_not_read(tmp_path: Path) -> None:
    """/dev/zero has a size of 0 and no end. A pipe without a writer would be waited for."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/dev/zero")
    for file in (Path("/dev/zero"), tmp_path / "pipe", tmp_path / "link", tmp_path, tmp_path / "none"):
        with pytest.raises(
            RunError, match=r"^image: wanted an image( file)?, found (a device|a pipe|a folder|no such file);"
        ):
            check_image(file)


def test_a_visitor_finds_his_own_uploads_and_examples_and_nothing_else(tmp_path: Path) -> None:
    inside, outside = tmp_path / "in", tmp_path / "in-not"
    outside.mkdir()
    (outside / "x.png").write_bytes(whole_png())
    uploads = Uploads(inside)
    mine = uploads.add("me", "x.png", io.BytesIO(whole_png()))
    example = inside / "e.png"
    example.write_bytes(whole_png())
    uploads.add_examples([str(example)])
    (inside / "link.png").symlink_to(outside / "x.png")
    assert uploads.find(str(mine), "me") == mine
    assert uploads.find(str(example), "me") == uploads.find(str(example), "you") == example
    assert uploads.holds(str(mine))
    assert uploads.holds(str(example))
    for path in (outside / "x.png", inside / "link.png", inside / ".." / "in-not" / "x.png", "x.png", "/dev/zero",
                 f"{mine}\0", f"{mine.parent}//{mine.name}", f"{mine.parent}/../{mine.parent.name}/{mine.name}", "",
                 None, 5, [str(mine)], f"file://{mine}", mine.parent, mine.parent / "other.png"):  # fmt: skip
        path = str(path) if isinstance(path, Path) else path
        assert not uploads.holds(path)
        with pytest.raises(RunError, match="wanted an image that you uploaded here, found another"):
            uploads.find(path, "me")
        if isinstance(path, str):
            with pytest.raises(RunError, match="wanted an image that you uploaded here, found another"):
                uploads.find_shown(path, "me")
    for visitor in ("you", ""):
        for find in (uploads.find, uploads.find_shown):
            with pytest.raises(RunError):
                find(str(mine), visitor)


def test_answers_are_shown_by_their_hash_and_no_other_file_of_the_folder(tmp_path: Path) -> None:
    uploads = Uploads(tmp_path)
    answer = tmp_path / ("a1" * 32) / "image.webp"
    answer.parent.mkdir()
    answer.write_bytes(b"an answer")
    assert uploads.find_shown(str(answer), "anybody") == answer
    (answer.parent / "link.webp").symlink_to("/etc/passwd")
    os.mkfifo(answer.parent / "pipe")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "image.webp").write_bytes(b"no answer")
    for path in (answer.parent / "link.webp", answer.parent / "pipe", answer.parent / "none", answer.parent,
                 tmp_path / "other" / "image.webp", f"{answer.parent}/..", f"{answer}/x"):  # fmt: skip
        with pytest.raises(RunError):
            uploads.find_shown(str(path), "anybody")


@pytest.mark.parametrize(
    "name, stored",
    [("a.PNG", "image.png"), ("a.svg", "image"), ("a.html", "image"), ("../../a.jpg", "image.jpg"), ("", "image"),
     ("x" * 300 + ".webp", "image.webp"), ("a.png\0", "image"), ("a.png/..", "image"), ("\u202e.gif", "image.gif")],
)  # fmt: skip
def test_an_upload_gets_a_name_of_the_pages_own(tmp_path: Path, name: str, stored: str) -> None:
    file = Uploads(tmp_path).add("me", name, io.BytesIO(b"content"))
    assert (file.name, file.parent.parent, file.read_bytes()) == (stored, tmp_path.resolve(), b"content")
    assert len(file.parent.name) > 32


def test_the_oldest_uploads_go_above_the_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mvlm.app.uploads.MAX_STORED_OF_ONE", 250)
    monkeypatch.setattr("mvlm.app.uploads.MAX_STORED", 550)
    uploads = Uploads(tmp_path)
    files = [uploads.add(visitor, "x.png", io.BytesIO(bytes(100))) for visitor in "aaabbccc"]
    assert [uploads.holds(str(file)) for file in files] == [False, False, True, True, True, False, True, True]
    assert [file.exists() for file in files] == [uploads.holds(str(file)) for file in files]
    assert len(list(tmp_path.iterdir())) == 5


def test_a_sweep_deletes_what_is_old_or_too_much_but_no_example(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mvlm.app.uploads.MAX_STORED", 250)
    uploads = Uploads(tmp_path)
    files = [uploads.add("me", "x.png", io.BytesIO(bytes(100))) for _ in range(2)]
    for age, name in ((KEPT + 10, "example"), (KEPT + 5, "old"), (60, "new"), (50, "newer")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "image.webp").write_bytes(bytes(100))
        os.utime(tmp_path / name / "image.webp", (time.time() - age, time.time() - age))
    uploads.add_examples([str(tmp_path / "example" / "image.webp")])
    uploads.sweep()
    assert sorted(each.name for each in tmp_path.iterdir()) == sorted(
        ["example", *(file.parent.name for file in files)]
    )
    uploads.sweep(time.time() + KEPT + 1)
    assert [each.name for each in tmp_path.iterdir()] == ["example"]
    assert not uploads.holds(str(files[0]))


def test_a_good_image_comes_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(whole_png())
    pixels = np.asarray(check_image(tmp_path / "x.png"))
    np.testing.assert_array_equal(pixels, np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8))


@pytest.mark.parametrize("text, message", [(None, "found none"), ("  ", "found none"), ("a" * 10**7, "got 10,000,000")])
def test_an_empty_and_a_long_text_are_refused(text: str | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_text(text)


def test_texts_and_lines_lose_their_blanks() -> None:
    assert check_text("  a cat ") == "a cat"
    assert check_lines(" a cat \n\n a dog", "labels") == ["a cat", "a dog"]
    assert check_lines(None, "labels") == []


@pytest.mark.parametrize(
    "lines, message",
    [
        ("a\n" * (MAX_LABELS + 1), f"wanted at most {MAX_LABELS} lines, got {MAX_LABELS + 1}"),
        ("a" * (MAX_CHARACTERS + 1), "labels: wanted at most 1000 characters"),
        ("\n" * 10**7, "got 10,000,000 characters"),
    ],
)
def test_too_many_and_too_long_lines_are_refused(lines: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_lines(lines, "labels")
