"""Files and folders that appear whole, files that are no files, and files that change while they are read."""

import errno
import hashlib
import json
import math
import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from mvlm_dataloading import DataError, build_shards, check_shards, files, open_dataset, rebuild_indices
from mvlm_dataloading.sources.tar_samples import read_samples
from mvlm_dataloading.sources.webdataset import webdataset
from mvlm_dataloading.tools.view import make_view
from support.data import write_dataset, write_tar


def full_disk(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("shared", [False, True])
def test_a_written_file_replaces_another(tmp_path, shared):
    path = tmp_path / "file"
    for text in ("long before", "größer\udcff\n", b"\xff"):
        files.write_file(path, text, shared=shared)
        assert path.read_bytes() == (text if isinstance(text, bytes) else text.encode("utf-8", "surrogateescape"))
    assert files.sha256(path) == hashlib.sha256(b"\xff").hexdigest()
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


def test_what_a_kill_left_is_replaced_and_an_error_names_the_wanted_file(tmp_path):
    path = tmp_path / "file"
    files.aside_of(path).write_text("half")
    files.write_file(path, "whole")
    assert list(tmp_path.iterdir()) == [path]
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


YEAR = 1_700_000_000


def make_pipe(path: Path) -> None:
    os.mkfifo(path)


def make_socket(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # the name of a socket is short
    try:
        with socket.socket(socket.AF_UNIX) as one:
            one.bind(path.name)
    finally:
        os.chdir(here)


def make_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


ODD = {"a pipe": make_pipe, "a socket": make_socket, "a device": make_device, "a folder": Path.mkdir}


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("name", ["dataset.json", "train.index", "train-000000.idx", "train-000000.tar"])
def test_what_is_no_file_in_a_data_folder_is_refused_at_once(tmp_path, monkeypatch, name, kind):
    monkeypatch.setenv("MVLM_FOLLOW_LINKS", "1")  # a device is reached by a link
    folder = write_dataset(tmp_path / "data", 3)
    if name.endswith(".idx"):
        (folder / "train.index").unlink()  # else it is not read
    (folder / name).unlink()
    ODD[kind](folder / name)
    wanted = f"{name}: wanted a file, found {kind}"
    with pytest.raises(DataError, match=wanted):
        open_dataset(folder, "train")
    if name != "dataset.json":
        assert any(wanted in problem for problem in check_shards(folder, workers=0)["train"].problems)
    with pytest.raises(DataError, match=wanted):
        check_shards(folder, workers=0) if name == "dataset.json" else make_view(tmp_path / "view", [folder])
    if name.endswith(".tar"):
        with pytest.raises(DataError, match=wanted):
            rebuild_indices(folder)


@pytest.mark.parametrize("kind", ["a pipe", "a socket", "a device"])
def test_what_is_no_file_among_tars_is_refused_at_once(tmp_path, monkeypatch, kind):
    monkeypatch.setenv("MVLM_FOLLOW_LINKS", "1")
    write_old_tar(tmp_path / "a.tar", 2)
    ODD[kind](tmp_path / "b.tar")
    for read in (rebuild_indices, lambda folder: webdataset([folder])):
        with pytest.raises(DataError, match=rf"b\.tar: wanted a file, found {kind}"):
            read(tmp_path)


def write_old_tar(path: Path, count: int) -> Path:
    """A tar that was written a year ago."""
    write_tar(path, [f"words of {i}" for i in range(count)])
    os.utime(path, (YEAR, YEAR))
    return path


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 4096)


def overwrite(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(bytes(2048))


def append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(bytes(512))


def replace(path: Path) -> None:
    path.with_name("other").write_bytes(path.read_bytes())
    os.utime(path.with_name("other"), (YEAR, YEAR))
    path.with_name("other").rename(path)


@pytest.mark.parametrize("change", [truncate, overwrite, append])
def test_a_build_reads_the_tars_that_its_recipe_states(tmp_path, change):
    """A tar is hashed when a build begins, and read later."""
    tar = tmp_path / "train.tar"
    write_old_tar(tar, 3)
    source = webdataset([tar])
    change(tar)
    with pytest.raises(DataError, match=r"train\.tar: wanted the tar that the build began with, found another"):
        build_shards(source, tmp_path / "out", workers=0)
    assert not (tmp_path / "out").exists()


def samples(tar: Path) -> str:
    with pytest.raises(DataError) as caught:
        list(read_samples(tar, 1 << 20))
    return str(caught.value)


def index(tar: Path) -> str:
    with pytest.raises(DataError) as caught:
        rebuild_indices(tar.parent)
    assert not list(tar.parent.glob("*.idx")) + list(tar.parent.glob("dataset.json"))
    return str(caught.value)


def check(tar: Path) -> str:
    return "".join(check_shards(tar.parent, workers=0)["train"].problems)


@pytest.mark.parametrize("change", [truncate, overwrite, append, replace])
@pytest.mark.parametrize(
    "read, when",
    [
        (samples, "sources.tar_samples.split_member_name"),
        (index, "tools.reindex.parse_captions"),  # while its headers are read
        (index, "tools.reindex.describe_shard"),  # while it is hashed afterwards
        (check, "tools.check.index_tar"),
    ],
)
def test_a_tar_that_changes_while_it_is_read_is_refused(tmp_path, monkeypatch, change, read, when):
    tar = write_old_tar(tmp_path / "train.tar", 30)
    if read is check:
        rebuild_indices(tmp_path)
    _change_at(monkeypatch, f"mvlm_dataloading.{when}", lambda: change(tar))
    assert "train.tar: wanted a file that stays as it is while it is read" in read(tar)


def _change_at(monkeypatch, name: str, change: Callable[[], None]) -> None:
    """Make a change when a function is called for the first time."""
    module, _, function = name.rpartition(".")
    real, changes = getattr(__import__(module, fromlist=[function]), function), [change]

    def call(*args, **settings):
        if changes:
            changes.pop()()
        return real(*args, **settings)

    monkeypatch.setattr(name, call)
