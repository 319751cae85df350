"""Building the emoji data set."""

import hashlib
import io
import json

import numpy as np
import pytest
from PIL import Image

from mvlm_dataloading import DataError, build_emoji, open_dataset
from mvlm_dataloading.build import emoji
from mvlm_dataloading.sources.drawings.emoji import named_emoji


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build_emoji(tmp_path_factory.mktemp("emoji") / "out", size=48, limit=120, workers=1)


@pytest.mark.slow
def test_emoji_data_set_has_images_captions_and_metadata(folder):
    seen = []
    for split in ("train", "validation", "test"):
        dataset = open_dataset(folder, split)
        for i in range(len(dataset)):
            meta = dataset.metadata(i)
            codepoints = meta["codepoints"]
            assert dataset.keys[i] == codepoints
            digit = int(hashlib.sha1(codepoints.encode()).hexdigest(), 16) % 10
            assert split == {0: "test", 1: "validation"}.get(digit, "train")
            assert meta["name"] == dataset.captions(i)[0]
            assert meta["licence"] == "CC BY-SA 4.0"
            assert "OpenMoji" in meta["attribution"]
            assert meta["base"]
            assert meta["group"]
            assert not set("_:\t") & set("".join(dataset.captions(i)))
            image = Image.open(io.BytesIO(dataset.image_bytes(i)))
            assert (image.mode, image.size, image.format) == ("RGB", (48, 48), "PNG")
            corners = np.array(image)[[0, 0, -1, -1], [0, -1, 0, -1]]
            assert (corners == 255).all()
            seen.append(codepoints)
    assert len(seen) == len(set(seen)) == 120
    description = json.loads((folder / "dataset.json").read_text())
    assert description["rejected"] == {}
    assert "OpenMoji" in description["attribution"]
    assert description["licence"] == "CC BY-SA 4.0"


@pytest.mark.slow
def test_emoji_data_set_is_not_built_again(folder, caplog):
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    caplog.set_level("INFO")
    build_emoji(folder, size=48, limit=120)
    assert "already holds this data set; left as it is" in caplog.text
    assert before == {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    with pytest.raises(DataError, match="choose another folder or remove this one"):
        build_emoji(folder, size=64, limit=120)
    assert before == {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


@pytest.mark.slow
def test_emoji_data_set_does_not_depend_on_the_number_of_processes(tmp_path):
    one = build_emoji(tmp_path / "one", size=16, limit=250, workers=1)
    two = build_emoji(tmp_path / "two", size=16, limit=250, workers=2)
    for path in one.iterdir():
        assert path.read_bytes() == (two / path.name).read_bytes()


def test_emoji_sizes_out_of_range_are_refused(tmp_path):
    for settings in ({"size": 0}, {"limit": 0}):
        with pytest.raises(DataError, match="wanted size >= 16 and limit >= 1"):
            build_emoji(tmp_path / "out", **settings)


@pytest.mark.parametrize("limit", [7, 1000, 2000, 3500])
def test_a_limit_takes_emoji_evenly_over_all(tmp_path, monkeypatch, limit):
    chosen = []

    def render(svgs, size, workers):
        chosen.extend(svgs)
        raise KeyboardInterrupt

    monkeypatch.setattr(emoji, "render_all", render)
    with pytest.raises(KeyboardInterrupt):
        build_emoji(tmp_path / "out", limit=limit)
    everything = [svg for _, svg, _, _ in named_emoji()]
    places = [everything.index(svg) for svg in chosen]
    assert len(places) == limit
    assert places[-1] >= len(everything) - 2 * len(everything) / limit
    gaps = np.diff(places)
    assert gaps.max() - gaps.min() <= 1
