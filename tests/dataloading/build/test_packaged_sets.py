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
from mvlm_dataloading.sources.emoji import named_emoji, split_of
from support.data import file_contents


@pytest.fixture
def few_emoji(monkeypatch):
    """Every 15th emoji: enough for two rendering processes."""
    monkeypatch.setattr(packaged_sets, "named_emoji", lambda: list(named_emoji())[::15])


@pytest.mark.slow
def test_emoji_data_set_has_images_captions_and_metadata(few_emoji, tmp_path, monkeypatch):
    out, seen = build_emoji(tmp_path / "out", size=48), []
    for split in ("train", "validation", "test"):
        dataset = open_dataset(out, split)
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
            assert (np.array(image)[[0, 0, -1, -1], [0, -1, 0, -1]] == 255).all()  # corners
            seen.append(codepoints)
    assert len(seen) == len(set(seen)) > 200
    assert json.loads((out / "dataset.json").read_text())["rejected"] == {}
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    build_emoji(out, size=48)
    with pytest.raises(DataError, match="size 48 in place of 64"):
        build_emoji(out, size=64)
    assert before == {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0})  # by one process
    assert file_contents(build_emoji(tmp_path / "again", size=48)) == file_contents(out)


@pytest.mark.slow
@pytest.mark.parametrize("build", [build_emoji, build_twemoji])
def test_sizes_that_show_nothing_are_refused(tmp_path, build):
    with pytest.raises(DataError, match="wanted size >= 16, got 8"):
        build(tmp_path / "out", 8)


@pytest.mark.extended
@pytest.mark.slow
def test_easy_vqa_has_the_published_questions_and_its_own_validation_split(tmp_path):
    import easy_vqa as package

    out = build_easy_vqa(tmp_path / "out")
    train, held, test = (open_dataset(out, split) for split in ("train", "validation", "test"))
    assert (len(train) + len(held), len(test)) == (38_575, 9_673)
    questions, answers, images = package.get_test_questions()
    paths = package.get_test_image_paths()
    for i in range(0, len(test), 997):
        record = test.metadata(i)
        number = int(record["question_id"].removeprefix("test-"))
        assert test.captions(i) == [questions[number]]
        assert {a["answer"] for a in record["answers"]} == {answers[number]}
        assert len({a["answer_id"] for a in record["answers"]}) == 10
        assert test.image_bytes(i) == Path(paths[images[number]]).read_bytes()
    others = {split.metadata(i)["image_id"] for split in (train, test) for i in range(3000)}
    known = [held.metadata(i) for i in range(len(held))]
    own = {one["image_id"] for one in known}
    assert not own & others
    assert 300 < len(own) < 500  # a tenth of 4,000
    assert len(Counter(one["answers"][0]["answer"] for one in known)) == 13


@pytest.mark.slow
def test_twemoji_has_no_train_split_and_the_emojis_captions(few_emoji, tmp_path):
    out = build_twemoji(tmp_path / "out", 32)
    description = json.loads((out / "dataset.json").read_text())
    assert set(description["splits"]) == {"seen", "validation", "test"}
    assert description["licence"] == "CC BY 4.0"
    assert description["rejected"] == {}
    test = open_dataset(out, "test")
    assert 20 < len(test) < 30  # Twemoji draws most of the emoji
    for i in range(0, len(test), 5):
        assert split_of(test.keys[i]) == "test"
        assert test.captions(i)[0] == test.metadata(i)["name"]
        image = Image.open(io.BytesIO(test.image_bytes(i)))
        assert image.size == (32, 32)
        assert np.array(image).std() > 0
