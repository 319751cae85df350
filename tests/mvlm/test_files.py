"""JSON and safetensors files, and the errors for those that do not fit."""

import itertools
import math
import os

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from mvlm.errors import RunError
from mvlm.files import FLOATS, is_finite, new_folder, read_safetensors, sort_metadata, write_safetensors


def test_safetensors_survive_the_disk_and_others_are_refused(tmp_path):
    tensors = {"a": torch.arange(6.0).view(2, 3).T, "b": torch.zeros(0)}
    write_safetensors(tmp_path / "file.safetensors", tensors)
    found = read_safetensors(tmp_path / "file.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    (tmp_path / "other.safetensors").write_bytes(b"x" * 50)
    for name in ("other.safetensors", "none.safetensors"):
        with pytest.raises(RunError, match=f"{name}: wanted a safetensors file, could not read it"):
            read_safetensors(tmp_path / name)


def test_safetensors_of_equal_content_are_equal_files_once_sorted(tmp_path):
    """The library draws the order of metadata anew for each file. Sizes and tensors stay."""
    tensors, metadata = {"a": torch.arange(6.0)}, {f"entry {i}": "é" * i for i in range(9)}
    before, after = set(), set()
    for i in range(4):
        file = tmp_path / f"{i}.safetensors"
        save_file(tensors, file, metadata)
        before.add(file.read_bytes())
        sort_metadata(file)
        after.add(file.read_bytes())
        with safe_open(file, "pt") as opened:
            assert opened.metadata() == metadata
            assert torch.equal(opened.get_tensor("a"), tensors["a"])
    assert len(before) > 1
    assert len(after) == 1
    write_safetensors(tmp_path / "plain.safetensors", tensors)  # without metadata
    content = (tmp_path / "plain.safetensors").read_bytes()
    sort_metadata(tmp_path / "plain.safetensors")
    assert (tmp_path / "plain.safetensors").read_bytes() == content


def test_the_umask_says_who_may_read_safetensors(tmp_path):
    before = os.umask(0o027)
    try:
        write_safetensors(tmp_path / "new.safetensors", {"a": torch.zeros(2)})
    finally:
        os.umask(before)
    assert (tmp_path / "new.safetensors").stat().st_mode & 0o777 == 0o640
    (tmp_path / "new.safetensors").chmod(0o604)
    write_safetensors(tmp_path / "new.safetensors", {"a": torch.ones(2)})
    assert (tmp_path / "new.safetensors").stat().st_mode & 0o777 == 0o604
    assert read_safetensors(tmp_path / "new.safetensors")["a"].tolist() == [1, 1]


@pytest.mark.parametrize("kind", FLOATS, ids=str)
def test_values_that_are_not_finite_are_found_wherever_they_are(kind):
    """Large values, whose sum is infinite in their type, are finite. Against numpy on float64."""
    largest = torch.finfo(kind).max
    for count in (1, 7, 1000):
        assert is_finite(torch.full((count,), largest, dtype=kind))
        assert is_finite(torch.tensor([largest, -largest, largest, largest], dtype=kind))
        for value, place in itertools.product((math.nan, math.inf, -math.inf), {0, count // 2, count - 1}):
            tensor = torch.linspace(-3, 3, count).to(kind)
            tensor[place] = value
            assert not np.isfinite(tensor.double().numpy()).all()
            assert not is_finite(tensor)
    assert not is_finite(torch.tensor([math.inf, -math.inf], dtype=kind))
    assert is_finite(torch.empty(0, dtype=kind))


def test_a_new_folder_is_made_beside_what_a_killed_process_left(tmp_path):
    """In a container the next process often has the same number."""
    (tmp_path / f".out.{os.getpid()}.partial").mkdir()
    with new_folder(tmp_path / "out") as folder:
        (folder / "file").touch()
    (tmp_path / "plain").mkdir()
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_new_folder_is_whole_or_absent(tmp_path):
    with new_folder(tmp_path / "deep/out") as folder:
        (folder / "file").write_text("x")
        assert not (tmp_path / "deep/out").exists()
    assert (tmp_path / "deep/out/file").read_text() == "x"
    with pytest.raises(RunError, match="out: wanted a new or empty folder, found other files"):  # noqa: SIM117
        with new_folder(tmp_path / "deep/out"):
            pass
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    with new_folder(tmp_path / "link") as folder:
        (folder / "file").touch()
    assert (tmp_path / "empty/file").exists()

    def interrupt():
        with new_folder(tmp_path / "lost") as folder:
            (folder / "file").touch()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupt()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deep", "empty", "link"]
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]
