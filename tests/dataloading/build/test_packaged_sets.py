"""The data sets of emoji, Twemoji and easy-VQA, built from their Python packages."""

import hashlib
import io
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mvlm_dataloading import DataError, open_dataset
from mvlm_dataloading.build import packaged_sets
from mvlm_dataloading.build.packaged_sets import build_easy_vqa, build_emoji, build_twemoji
from mvlm_dataloading.sources.drawings.emoji import named_emoji, split_of


@pytest.fixture(scope="module")
def emoji(tmp_path_factory):
    return build_emoji(tmp_path_factory.mktemp("emoji") / "out", size=48, limit=120, workers=1)


@pytest.mark.slow
def test_emoji_data_set_has_images_captions_and_metadata(emoji):
    seen = []
    for split in ("train", "validation", "test"):
        dataset = open_dataset(emoji, split)
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
    description = json.loads((emoji / "dataset.json").read_text())
    assert description["rejected"] == {}
    assert "OpenMoji" in description["attribution"]
    assert description["licence"] == "CC BY-SA 4.0"


@pytest.mark.slow
def test_emoji_data_set_is_not_built_again(emoji, caplog):
    before = {path.name: path.stat().st_mtime_ns for path in emoji.iterdir()}
    caplog.set_level("INFO")
    build_emoji(emoji, size=48, limit=120)
    assert "already holds this data set; left as it is" in caplog.text
    assert before == {path.name: path.stat().st_mtime_ns for path in emoji.iterdir()}
    with pytest.raises(DataError, match="choose another folder or remove this one"):
        build_emoji(emoji, size=64, limit=120)
    assert before == {path.name: path.stat().st_mtime_ns for path in emoji.iterdir()}


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

    monkeypatch.setattr(packaged_sets, "render_all", render)
    with pytest.raises(KeyboardInterrupt):
        build_emoji(tmp_path / "out", limit=limit)
    everything = [svg for _, svg, _, _ in named_emoji()]
    places = [everything.index(svg) for svg in chosen]
    assert len(places) == limit
    assert places[-1] >= len(everything) - 2 * len(everything) / limit
    gaps = np.diff(places)
    assert gaps.max() - gaps.min() <= 1


@pytest.fixture(scope="module")
def easy_vqa(tmp_path_factory) -> Path:
    return build_easy_vqa(tmp_path_factory.mktemp("easy_vqa") / "out")


@pytest.fixture(scope="module")
def twemoji(tmp_path_factory) -> Path:
    return build_twemoji(tmp_path_factory.mktemp("twemoji") / "out", 32)


@pytest.mark.slow
def test_easy_vqa_has_the_published_questions(easy_vqa):
    import easy_vqa as package

    train, validation, test = (open_dataset(easy_vqa, split) for split in ("train", "validation", "test"))
    assert (len(train) + len(validation), len(test)) == (38_575, 9_673)
    questions, answers, images = package.get_test_questions()
    paths = package.get_test_image_paths()
    for i in range(0, len(test), 997):
        record = test.metadata(i)
        number = int(record["question_id"].removeprefix("test-"))
        assert test.captions(i) == [questions[number]]
        assert {a["answer"] for a in record["answers"]} == {answers[number]}
        assert len({a["answer_id"] for a in record["answers"]}) == 10
        assert test.image_bytes(i) == Path(paths[images[number]]).read_bytes()


@pytest.mark.slow
def test_easy_vqa_validation_has_images_of_its_own(easy_vqa):
    train, test = open_dataset(easy_vqa, "train"), open_dataset(easy_vqa, "test")
    others = {split.metadata(i)["image_id"] for split in (train, test) for i in range(3000)}
    held = open_dataset(easy_vqa, "validation")
    own = {held.metadata(i)["image_id"] for i in range(len(held))}
    assert not own & others
    assert 300 < len(own) < 500  # a tenth of 4,000
    counts = Counter(held.metadata(i)["answers"][0]["answer"] for i in range(len(held)))
    assert len(counts) == 13


@pytest.mark.slow
def test_twemoji_has_no_train_split_and_the_emojis_captions(twemoji):
    with pytest.raises(DataError):
        open_dataset(twemoji, "train")
    description = json.loads((twemoji / "dataset.json").read_text())
    assert description["licence"] == "CC BY 4.0"
    assert description["rejected"] == {}
    test = open_dataset(twemoji, "test")
    assert 350 < len(test) < 413  # Twemoji draws most of the emoji
    for i in range(0, len(test), 37):
        assert split_of(test.keys[i]) == "test"
        assert test.captions(i)[0] == test.metadata(i)["name"]
        image = Image.open(io.BytesIO(test.image_bytes(i)))
        assert image.size == (32, 32)
        assert np.array(image).std() > 0


@pytest.mark.slow
def test_sizes_that_show_nothing_are_refused(tmp_path):
    with pytest.raises(DataError, match="twemoji: wanted size >= 16, got 8"):
        build_twemoji(tmp_path / "out", 8)
