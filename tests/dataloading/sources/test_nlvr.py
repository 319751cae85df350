"""NLVR2 and NLVR, on files as published."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mvlm_dataloading import open_dataset
from mvlm_dataloading.images.limits import ImageLimits
from mvlm_dataloading.sources.nlvr import nlvr, nlvr2
from mvlm_dataloading.sources.record import ImageStrip
from support import published_tasks
from support.data import build_source, read_json_lines
from support.published import encoded, make_image


def pixels(dataset, i: int) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(dataset.image_bytes(i))), int)


def test_nlvr2(tmp_path):
    published_tasks.nlvr2(tmp_path)
    found = build_source(nlvr2(tmp_path, side=48), tmp_path / "out")
    assert {split: list(known) for split, known in found.items()} == {
        split: [f"{name}-7-{i}-{s}" for i in range(3) for s in (0, 1)]
        for split, name in (("test", "test1"), ("train", "train"), ("validation", "dev"))
    }
    assert found["validation"]["dev-7-1-0"] == ["There are 0 dogs — in pair 1."]
    dataset = open_dataset(tmp_path / "out", "train")
    facts = dataset.metadata(3)
    names = ("identifier", "set_id", "images", "label", "image_id")
    assert [facts[name] for name in names] == ["train-7-1-1", "train-7", 2, "true", "nlvr2 train-7-1"]
    assert dataset.locate("image", 2)[0] == dataset.locate("image", 3)[0]  # two sentences about a pair
    strip = pixels(dataset, 2)
    assert strip.shape == (48, 96, 3)
    for k in (0, 1):  # left is img0; wide images are squeezed into a square
        image = make_image(10 + k, (80, 50)).resize((48, 48), Image.Resampling.BICUBIC)
        assert np.abs(strip[:, 48 * k : 48 * k + 48] - np.asarray(image, int)).mean() < 6


def test_bad_rows_of_nlvr2_are_rejected(tmp_path):
    published_tasks.nlvr2(tmp_path)
    (tmp_path / "images/dev/dev-7-0-img1.png").unlink()
    (tmp_path / "images/dev/dev-7-1-img0.png").write_bytes(encoded(make_image(1), "GIF"))
    file = tmp_path / "data/dev.json"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows += [dict(rows[4]), {**rows[5], "identifier": "dev-7-2-2", "label": "maybe"}]
    rows += [{**rows[5], "identifier": "dev-../../x-2-3"}, {**rows[5], "identifier": "dev-7-9"}]
    published_tasks.write_lines(file, rows)
    found = build_source(nlvr2(tmp_path, side=48), tmp_path / "out")
    assert list(found["validation"]) == ["dev-7-2-0", "dev-7-2-1"]
    reasons = [(x["key"], x["reason"]) for x in read_json_lines(tmp_path / "out/rejected.jsonl")]
    assert sorted(reasons) == [
        ("dev-../../x-2-3", "image is outside the folder"),
        ("dev-7-0-0", "image file is missing"),
        ("dev-7-0-1", "image file is missing"),
        ("dev-7-1-0", "image format is GIF, not JPEG, PNG or WebP"),
        ("dev-7-1-1", "image format is GIF, not JPEG, PNG or WebP"),
        ("dev-7-2-0", "key was used before"),
        ("dev-7-2-2", "label is neither true nor false"),
        ("dev-7-9", "identifier is not split-set-pair-sentence"),
    ]


def test_nlvr_boxes_become_three_images(tmp_path):
    published_tasks.nlvr(tmp_path)
    found = build_source(nlvr(tmp_path), tmp_path / "out")
    assert list(found["test"]) == ["test-0-0-0", "test-0-2-0", "test-1-0-0", "test-1-2-0"]
    orders = ["0", "0p1", "0p2", "0p3", "0p4", "0p5"]
    assert list(found["train"])[:6] == [f"train-0-{order}-0" for order in orders]
    assert len(found["train"]) == 24
    dataset = open_dataset(tmp_path / "out", "train")
    facts = dataset.metadata(1)
    assert [facts[name] for name in ("set_id", "images", "label")] == ["train-0", 3, "true"]
    with pytest.raises(ValueError, match=r"wanted an image with the part .*, found one of 200 x 100"):
        ImageStrip((Path("a"), Path("b")), 50, ((0, 0, 100, 100), (150, 0, 250, 100))).compose(
            [encoded(make_image(0).resize((200, 100)), "PNG")] * 2, ImageLimits()
        )
    whole = np.asarray(Image.open(tmp_path / "train/images/0/train-0-0-1.png"), int)
    wanted = np.concatenate([whole[:, 0:100], whole[:, 150:250], whole[:, 300:400]], 1)
    np.testing.assert_array_equal(pixels(dataset, 1), wanted)  # not one pixel changes
    few = nlvr(tmp_path, side=50, permutations=1)
    assert sum(len(list(piece.records(1))) for piece in few.pieces if piece.split == "train") == 4
    assert few.recipe != nlvr(tmp_path, side=50).recipe
