"""Embeddings of the small data set and of a folder of images."""

from pathlib import Path

import pytest

from mvlm.search.collection import open_collection
from mvlm.search.embed import embed
from support.models import ALONE
from support.scenes import png, scene


@pytest.fixture(scope="session")
def embedded(model, scenes, tmp_path_factory) -> Path:
    """Embeddings of all splits of the data set. Read only."""
    out = tmp_path_factory.mktemp("embedded") / "out"
    embed(model, open_collection(scenes, ["train", "validation", "test"]), out, ALONE, "the run")
    return out


@pytest.fixture
def pictures(tmp_path) -> Path:
    """A folder of ten images, some with captions and metadata, and a file that is no image."""
    folder = tmp_path / "pictures"
    for number in range(10):
        path = folder / ("deep" if number % 3 else "") / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels, caption = scene(number)
        path.write_bytes(png(pixels))
        if number % 2:
            path.with_suffix(".txt").write_text(f"{caption}\n\n a square \n")
            path.with_suffix(".json").write_text(f'{{"number": {number}, "colour": "{caption.split()[0]}"}}')
    (folder / "notes.md").write_text("not an image")
    return folder
