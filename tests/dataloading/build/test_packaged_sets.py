"""easy-VQA and Twemoji, built from their Python packages."""

import io
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mvlm_dataloading import DataError, build_easy_vqa, build_twemoji, open_dataset
from mvlm_dataloading.sources.drawings.emoji import split_of


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
