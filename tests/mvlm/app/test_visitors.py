"""Whose a session and an image are, what is kept of them, and for whom a question is still answered."""

import io
import os
import time
from pathlib import Path

import pytest

from mvlm.app import visitors
from mvlm.app.visitors import GRACE, KEPT, MAX_WAIT, Uploads, Visitors
from mvlm.errors import RunError


def test_a_visitor_finds_his_own_uploads_and_examples_and_nothing_else(tmp_path: Path) -> None:
    inside, outside = tmp_path / "in", tmp_path / "in-not"
    outside.mkdir()
    (outside / "x.png").write_bytes(b"an image")
    uploads = Uploads(inside)
    mine = uploads.add("me", "x.png", io.BytesIO(b"an image"))
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
    file = Uploads(tmp_path).add("me", name, io.BytesIO(b"content"))
    assert (file.name, file.parent.parent, file.read_bytes()) == (stored, tmp_path.resolve(), b"content")
    assert len(file.parent.name) > 32


def test_the_oldest_uploads_go_above_the_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mvlm.app.visitors.MAX_STORED_OF_ONE", 250)
    monkeypatch.setattr("mvlm.app.visitors.MAX_STORED", 550)
    uploads = Uploads(tmp_path)
    files = [uploads.add(visitor, "x.png", io.BytesIO(bytes(100))) for visitor in "aaabbccc"]
    assert [uploads.holds(str(file)) for file in files] == [False, False, True, True, True, False, True, True]
    assert [file.exists() for file in files] == [uploads.holds(str(file)) for file in files]
    assert len(list(tmp_path.iterdir())) == 5


def test_a_sweep_deletes_what_is_old_or_too_much_but_no_example(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mvlm.app.visitors.MAX_STORED", 250)
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


def test_a_session_is_its_first_visitors() -> None:
    known = Visitors()
    known.join("s", "me")
    known.join("s", "me")
    with pytest.raises(RunError, match="session: wanted your own"):
        known.join("s", "you")
    assert known.owns("s", "me")
    assert not known.owns("s", "you")
    assert not known.owns("t", "me")


def test_only_the_newest_sessions_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(visitors, "MAX_SESSIONS", 3)
    known = Visitors()
    for session in "abcad":
        known.join(session, "me")
    assert [known.owns(session, "me") for session in "abcd"] == [True, False, True, True]
    assert [known.knows(session) for session in "abcd"] == [True, False, True, True]


def test_a_question_is_answered_while_its_visitor_waits() -> None:
    known, now = Visitors(), time.monotonic()
    known.check_waiting("s", now)  # the browser opens its stream after it has asked
    with pytest.raises(RunError, match="wanted a visitor who waits"):
        known.check_waiting("s", now - GRACE - 0.1)
    with known.listening("s"):
        known.check_waiting("s", now - GRACE - 0.1)
        with known.listening("s"):
            pass
        known.check_waiting("s", now - MAX_WAIT + 5)
        with pytest.raises(RunError, match="the page is busy"):
            known.check_waiting("s", now - MAX_WAIT - 0.1)
    with pytest.raises(RunError, match="wanted a visitor who waits"):
        known.check_waiting("s", now - GRACE - 0.1)
