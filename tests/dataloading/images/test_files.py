"""Files of images: regular ones alone, with a bounded number of bytes."""

import os
from pathlib import Path

import pytest

from mvlm_dataloading.images.decode import read_image_file
from mvlm_dataloading.images.limits import ImageRefusedError
from support.hostile_images import places


def test_a_regular_file_is_read_whole(tmp_path: Path) -> None:
    content = os.urandom(3 << 20)
    (tmp_path / "a").write_bytes(content)
    (tmp_path / "link").symlink_to(tmp_path / "a")
    assert read_image_file(tmp_path / "a", len(content)) == content
    assert read_image_file(str(tmp_path / "link"), len(content)) == content
    (tmp_path / "empty").touch()
    assert read_image_file(tmp_path / "empty", 10) == b""


def test_what_is_no_regular_file_is_never_read(tmp_path: Path) -> None:
    wanted = {"a pipe": "a pipe", "a socket": "a socket", "a folder": "a folder", "an endless device": "a device"}
    opened = len(os.listdir("/proc/self/fd"))
    for name, path in places(tmp_path):
        if name in wanted:
            with pytest.raises(ImageRefusedError, match=f"wanted an image file, found {wanted.pop(name)}") as refused:
                read_image_file(path, 100)
            assert refused.value.kind == "file"
    assert not wanted
    assert len(os.listdir("/proc/self/fd")) == opened


@pytest.mark.parametrize("name", ["gone", "a\0b", "a/b", "\ud800"])
def test_a_file_that_is_not_there(tmp_path: Path, name: str) -> None:
    (tmp_path / "a").touch()
    with pytest.raises(ImageRefusedError, match="found no such file") as refused:
        read_image_file(f"{tmp_path}/{name}", 100)
    assert refused.value.kind == "missing"


def test_bytes_are_counted_as_they_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the size that a file states, and by what comes: one may grow, and those of /proc state nothing."""
    (tmp_path / "a").write_bytes(bytes(101))
    with pytest.raises(ImageRefusedError, match=r"wanted at most 0\.0001 MB, found 0\.0 MB; choose a smaller file"):
        read_image_file(tmp_path / "a", 100)
    assert Path("/proc/self/status").stat().st_size == 0
    with pytest.raises(ImageRefusedError, match="found more") as refused:
        read_image_file("/proc/self/status", 100)
    assert refused.value.kind == "bytes"
