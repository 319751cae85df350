"""Durable file writes."""

import errno
import os

import pytest

from mvlm_dataloading.dataset import durable_files


def full_disk(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_durable_write_replaces_a_file(tmp_path):
    for text in ("long before", "größer\n"):
        durable_files.write_durably(tmp_path / "file", text)
        assert (tmp_path / "file").read_text(encoding="utf-8") == text


def test_failed_durable_write_leaves_no_file(tmp_path, monkeypatch):
    monkeypatch.setattr(durable_files, "sync_file", full_disk)
    with pytest.raises(OSError, match="No space"):
        durable_files.write_durably(tmp_path / "file", "text")
    assert list(tmp_path.iterdir()) == []


def test_replaced_file_is_whole_or_as_before(tmp_path, monkeypatch):
    path = tmp_path / "file"
    with durable_files.replaced_durably(path) as file:
        file.write(b"one")
        assert not path.exists()
    assert path.read_bytes() == b"one"
    with pytest.raises(OSError, match="Invalid"), durable_files.replaced_durably(path) as file:
        os.truncate(file.fileno(), -1)
    monkeypatch.setattr(durable_files, "sync_file", full_disk)
    with pytest.raises(OSError, match="No space"), durable_files.replaced_durably(path) as file:
        file.write(b"two")
    assert path.read_bytes() == b"one"
    assert list(tmp_path.iterdir()) == [path]
