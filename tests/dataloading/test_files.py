"""Files and folders that appear whole."""

import errno
import hashlib
import json
import math
import os
import threading

import pytest

from mvlm_dataloading import files


def full_disk(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_sha256_is_that_of_the_contents(tmp_path):
    (tmp_path / "file").write_bytes(b"abc" * 100_000)
    assert files.sha256(tmp_path / "file") == hashlib.sha256(b"abc" * 100_000).hexdigest()


@pytest.mark.parametrize("shared", [False, True])
def test_a_written_file_replaces_another(tmp_path, shared):
    path = tmp_path / "file"
    for text in ("long before", "größer\udcff\n", b"\xff"):
        files.write_file(path, text, shared=shared)
        assert path.read_bytes() == (text if isinstance(text, bytes) else text.encode("utf-8", "surrogateescape"))
    assert list(tmp_path.iterdir()) == [path]


def test_json_makes_the_folder_and_has_null_for_nan(tmp_path):
    files.write_json(tmp_path / "new/values.json", {"a": [1, None, math.nan], "b": {"c": (-math.inf, 0.5)}})
    assert json.loads((tmp_path / "new/values.json").read_text()) == {"a": [1, None, None], "b": {"c": [None, 0.5]}}


def test_a_replaced_file_is_whole_or_as_before(tmp_path, monkeypatch):
    path = tmp_path / "file"
    with files.replaced(path) as aside:
        aside.write_bytes(b"one")
        assert not path.exists()
    assert path.read_bytes() == b"one"
    with pytest.raises(OSError, match="Invalid"), files.replaced(path) as aside, aside.open("wb") as file:
        os.truncate(file.fileno(), -1)
    monkeypatch.setattr(files, "sync", full_disk)
    with pytest.raises(OSError, match="No space"):
        files.write_file(path, "two")
    assert path.read_bytes() == b"one"
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_kill_left_is_replaced(tmp_path):
    path = tmp_path / "file"
    files.aside_of(path).write_text("half")
    files.write_file(path, "whole")
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_names_the_file_that_was_wanted(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        files.write_file(tmp_path / "none/file", "")
    assert caught.value.filename == str(tmp_path / "none/file")


def test_a_link_stays_and_a_pipe_is_written_to(tmp_path):
    link, target, pipe = tmp_path / "link", tmp_path / "target", tmp_path / "pipe"
    target.write_text("before")
    link.symlink_to(target)
    files.write_file(link, "after")
    assert link.is_symlink()
    assert target.read_text() == "after"
    os.mkfifo(pipe)
    found: list[str] = []
    reader = threading.Thread(target=lambda: found.append(pipe.read_text()))
    reader.start()
    files.write_file(pipe, "through")
    reader.join()
    assert found == ["through"]
    assert pipe.is_fifo()


def test_files_of_several_writers_are_whole(tmp_path):
    path = tmp_path / "file"
    texts = [str(number) * 50_000 for number in range(4)]
    writers = [
        threading.Thread(target=lambda text=text: [files.write_file(path, text, shared=True) for _ in range(20)])
        for text in texts
    ]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        assert not path.exists() or path.read_text() in texts
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_appears_with_its_files_or_not_at_all(tmp_path, monkeypatch):
    out, aside = tmp_path / "out", tmp_path / ".out.aside"
    aside.mkdir()
    (aside / "of a kill").touch()
    with files.new_folder(out, aside) as folder:
        (folder / "file").touch()
        assert not out.exists()
    assert [path.name for path in out.iterdir()] == ["file"]
    with pytest.raises(OSError, match="not empty"), files.new_folder(out, aside):
        pass
    monkeypatch.setattr(files, "sync", full_disk)
    with pytest.raises(OSError, match="No space"), files.new_folder(tmp_path / "other", aside):
        pass
    assert list(tmp_path.iterdir()) == [out]
