"""Duplicates within a split, training images that an evaluation split holds, and the search for near hashes."""

import json

import numpy as np
import pytest
from PIL import Image

from mvlm_dataloading import open_dataset
from mvlm_dataloading.build.duplicates import MAX_DISTANCE, near_known, near_pairs
from support import published
from support.data import build_records, keys_of, make_record, read_json_lines


def brighter(image: Image.Image, levels: int) -> Image.Image:
    return Image.fromarray(np.minimum(np.asarray(image).astype(int) + levels, 255).astype(np.uint8))


@pytest.mark.slow
def test_evaluation_images_are_dropped_from_train(tmp_path):
    other = build_records(tmp_path / "other", {"validation": [make_record("v", published.make_image(50))],
                                       "train": [make_record("t", published.make_image(51))]})  # fmt: skip
    shown = published.make_image(1, (144, 108))
    out = build_records(
        tmp_path / "out",
        {
            "test": [make_record("a", shown), make_record("b", published.make_image(2))],
            "train": [
                make_record("same", shown),
                make_record("smaller", shown.resize((72, 54)), kind="JPEG"),
                make_record("brighter", brighter(shown, 12)),
                make_record("wider", shown.resize((216, 108))),  # another aspect ratio is no duplicate
                make_record("of-the-others-evaluation", published.make_image(50)),
                make_record("of-the-others-training", published.make_image(51)),
                make_record("alone", published.make_image(3)),
            ],
        },
        evaluation_sets=[other],
    )
    assert keys_of(out) == ["wider", "of-the-others-training", "alone"]
    assert keys_of(out, "test") == ["a", "b"]
    exact = "image is in an evaluation split"
    near = "image is a near-duplicate of one in an evaluation split"
    wanted = {"same": exact, "smaller": near, "brighter": near, "of-the-others-evaluation": exact}
    assert {line["key"]: line["reason"] for line in read_json_lines(out / "rejected.jsonl")} == wanted
    assert json.loads((out / "dataset.json").read_text())["rejected"] == {exact: 2, near: 2}
    assert read_json_lines(out / "duplicates.jsonl") == [
        {"key": "same", "split": "train", "kind": "exact", "of": "test/a"},
        {"key": "smaller", "split": "train", "kind": "near", "of": "test/a"},
        {"key": "brighter", "split": "train", "kind": "near", "of": "test/a"},
        {"key": "of-the-others-evaluation", "split": "train", "kind": "exact", "of": "validation/other/v"},
    ]


@pytest.mark.slow
def test_a_build_lists_duplicates_and_drops_them_on_request(tmp_path):
    image = published.make_image(1, (144, 108))
    records = [
        make_record("a", image, ["first"]),
        make_record("b", published.make_image(2)),
        make_record("again", image, ["second", "third"]),
        make_record("nearly", image.resize((100, 75)), kind="JPEG"),
        make_record("flat", Image.new("RGB", (40, 40), "teal")),
        make_record("flat-too", Image.new("RGB", (40, 40), "navy")),  # a flat image has no hash
    ]
    expected = [
        {"key": "again", "split": "train", "kind": "exact", "of": "train/a"},
        {"key": "nearly", "split": "train", "kind": "near", "of": "train/a"},
    ]
    kept = build_records(tmp_path / "kept", {"train": records}, each=2)
    assert keys_of(kept) == [one.key for one in records]
    assert read_json_lines(kept / "duplicates.jsonl") == expected
    dropped = build_records(tmp_path / "dropped", {"train": records}, each=2, drop_duplicates=True)
    assert keys_of(dropped) == ["a", "b", "nearly", "flat", "flat-too"]
    assert read_json_lines(dropped / "duplicates.jsonl") == expected
    # A tar from which a sample was dropped has the bytes of one built without it.
    without = build_records(tmp_path / "without", {"train": [r for r in records if r.key != "again"]}, each=3)
    assert open_dataset(dropped, "train").captions(2) == ["words"]
    read = [open_dataset(out, "train") for out in (dropped, without)]
    for i in range(5):
        assert read[0].image_bytes(i) == read[1].image_bytes(i)
        assert read[0].metadata(i) == read[1].metadata(i)
    description = json.loads((dropped / "dataset.json").read_text())
    assert description["splits"]["train"]["captions"] == 5


def test_near_pairs_match_a_loop_over_all_pairs():
    rng = np.random.default_rng(0)
    values = rng.integers(0, 2**64, 120, np.uint64)
    for i in range(0, 100, 2):  # neighbours at all distances from 0 to 6, and a few copies
        flips = rng.choice(64, rng.integers(0, 7), replace=False)
        values[i + 1] = values[i] ^ np.bitwise_or.reduce(np.uint64(1) << flips.astype(np.uint64), initial=np.uint64(0))
    found = sorted(near_pairs(values, np.ones(120)))
    assert len(set(found)) == len(found)
    wanted = [
        (i, j) for i in range(120) for j in range(i + 1, 120)
        if int(values[i] ^ values[j]).bit_count() <= MAX_DISTANCE
    ]  # fmt: skip
    assert found == wanted
    assert len(wanted) > 15
    # Each of the four bands in turn is the only one that is the same.
    for same in range(4):
        flips = sum(1 << (16 * band + 5) for band in range(4) if band != same)
        pair = np.array([values[0], values[0] ^ np.uint64(flips)])
        assert list(near_pairs(pair, np.ones(2))) == [(0, 1)]
        assert list(near_pairs(pair, np.array([1.0, 1.2]))) == []
        assert near_known(pair[:1], np.ones(1), pair[1:], np.ones(1)).tolist() == [0]
    # Equal hashes: each image with the first of its shape, also if one of another shape comes before both.
    equal, shapes = np.zeros(6, np.uint64), np.array([1.0, 1.5, 1.0, 1.6, 3.0, 1.5])
    assert sorted(near_pairs(equal, shapes)) == [(0, 2), (1, 3), (1, 5)]
    ones = np.ones(120)
    first = near_known(values[60:], ones[60:], values[:60], ones[:60])
    for i, j in enumerate(first.tolist()):
        near = [k for k in range(60) if int(values[60 + i] ^ values[k]).bit_count() <= MAX_DISTANCE]
        assert j == (near[0] if near else -1)
    for own, known in ((1, 2), (2, 1)):  # twice as wide, or as high
        assert (near_known(values, own * ones, values, known * ones) == -1).all()
