"""Durable file writes."""

import errno

import pytest

from mvlm_dataloading.dataset import durable_files


def test_durable_write_replaces_a_file(tmp_path):
    for text in ("long before", "größer\n"):
        durable_files.write_durably(tmp_path / "file", text)
        assert (tmp_path / "file").read_text(encoding="utf-8") == text


def test_failed_durable_write_leaves_no_file(tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("mvlm_dataloading.dataset.durable_files.sync_file", full)
    with pytest.raises(OSError, match="No space"):
        durable_files.write_durably(tmp_path / "file", "text")
    assert list(tmp_path.iterdir()) == []
