"""Whose an image is, and which images are kept."""

import errno
import io
import os
import time
from pathlib import Path

import pytest

from mvlm.app import uploads as module
from mvlm.app.shares import Visitor
from mvlm.app.uploads import KEPT, Uploads
from mvlm.errors import RunError

ME = Visitor("192.0.2.1", "me")


def test_a_visitor_finds_his_own_uploads_and_examples_and_nothing_else(tmp_path: Path) -> None:
    inside, outside = tmp_path / "in", tmp_path / "in-not"
    outside.mkdir()
    (outside / "x.png").write_bytes(b"an image")
    uploads = Uploads(inside)
    mine = uploads.add(ME, "x.png", io.BytesIO(b"an image"))
    example = inside / "e.png"
    example.write_bytes(b"an image")
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
    file = Uploads(tmp_path).add(ME, name, io.BytesIO(b"content"))
    assert (file.name, file.parent.parent, file.read_bytes()) == (stored, tmp_path.resolve(), b"content")
    assert len(file.parent.name) > 32


def test_an_upload_that_fails_half_way_leaves_nothing(tmp_path: Path) -> None:
    class Full(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            if self.tell():
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().read(size)

    with pytest.raises(OSError, match="No space"):
        Uploads(tmp_path).add(ME, "x.png", Full(bytes(3_000_000)))
    assert list(tmp_path.iterdir()) == []


def test_the_oldest_uploads_of_the_greediest_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 600 bytes, 300 at most for an address, whatever its cookies are. A small file counts for 100."""
    monkeypatch.setattr(module, "MAX_STORED", 600)
    monkeypatch.setattr(module, "LEAST_COUNTED", 100)
    uploads = Uploads(tmp_path)
    for name, kept in (("a", "a"), ("b", "ab"), ("b", "abb"), ("b", "abbb"), ("B", "abbB"), ("c", "abbBc"),
                       ("c", "abbBcc"), ("d", "abBccd")):  # fmt: skip
        uploads.add(Visitor(name.lower(), name), f"{name}.png", io.BytesIO(bytes(ord(name))))
        assert sorted(f.stat().st_size for f in tmp_path.glob("*/*")) == sorted(ord(each) for each in kept)
    assert len(list(tmp_path.iterdir())) == 6


def test_a_sweep_deletes_old_files_and_oldest_answers_but_no_upload(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_ANSWERS", 250)
    uploads = Uploads(tmp_path)
    files = [uploads.add(ME, "x.png", io.BytesIO(bytes(1000))) for _ in range(2)]
    os.utime(files[0], (time.time() - 100, time.time() - 100))
    answers = ((KEPT + 10, "example"), (KEPT + 5, "old"), (60, "third"), (50, "second"), (40, "new"))
    for age, name in answers:
        (tmp_path / name).mkdir()
        (tmp_path / name / "image.webp").write_bytes(bytes(100))
        os.utime(tmp_path / name / "image.webp", (time.time() - age, time.time() - age))
    uploads.add_examples([str(tmp_path / "example" / "image.webp")])
    uploads.sweep()
    assert sorted(each.name for each in tmp_path.iterdir()) == sorted(
        ["example", "second", "new", *(file.parent.name for file in files)]
    )
    uploads.sweep(time.time() + KEPT + 1)
    assert [each.name for each in tmp_path.iterdir()] == ["example"]
    assert not uploads.holds(str(files[0]))
