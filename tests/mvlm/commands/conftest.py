"""Fixtures of the tests of `mvlm data ...`: a folder of images, and a data set and a view built from it."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mvlm.commands import data
from support.commands import Outcome


@pytest.fixture
def run_data(run_mvlm, monkeypatch) -> Callable[..., Outcome]:
    """Runs `mvlm data WORDS` in this process, without worker processes."""
    monkeypatch.setattr(data, "processes", lambda given, pieces=None: 0)
    return lambda *words: run_mvlm("data", *words)


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory) -> Path:
    """Six images with captions in text files, and a file that is not an image. Read only."""
    folder = tmp_path_factory.mktemp("commands") / "images"
    folder.mkdir()
    for i in range(6):
        small = np.random.default_rng(i).integers(0, 256, (6, 8, 3), np.uint8)
        Image.fromarray(small).resize((64, 48), Image.Resampling.BICUBIC).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"image {i}")
    (folder / "6.png").write_bytes(b"not an image")
    return folder


@pytest.fixture
def data_set(image_folder, tmp_path, run_data) -> Path:
    """A data set of several shards, in `tmp_path/set`."""
    assert run_data("folder", image_folder, tmp_path / "set", "--shard-bytes", 20000).code == 0
    return tmp_path / "set"


@pytest.fixture
def view(data_set, tmp_path, run_data) -> Path:
    """A view of the data set, in `tmp_path/view`."""
    assert run_data("view", tmp_path / "view", "--sources", data_set).code == 0
    return tmp_path / "view"
