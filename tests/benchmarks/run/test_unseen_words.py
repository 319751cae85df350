"""Recall of unseen concepts by the words of their captions, on captions and ranks written here."""

import numpy as np

from mvlm_benchmarks.run.unseen_words import kind_of, recall_by_kind
from mvlm_dataloading import ShardWriter, open_dataset
from support.scenes import png

TRAIN = [("brown circle", "brown circle"), ("red square, large", "red square")]
TEST = [
    (["Red circle", "ruby"], "red circle"),  # all words of the better caption are known
    (["brown lobster"], "brown lobster"),
    (["zebra"], "zebra"),
    (["flag of Oman", "oman"], "flag of Oman"),
    (["brown circle, small"], "brown circle"),  # a known concept is no query
]


def grey(value: int) -> bytes:
    return png(np.full((8, 8, 3), value, np.uint8))


def test_the_best_caption_of_an_image_counts():
    known = {"red", "circle"}
    assert kind_of(["a ruby", "red circle"], known) == "all words known"
    assert kind_of(["Red, circle!"], known) == "all words known"
    assert kind_of(["red lobster", "zebra"], known) == "some words known"
    assert kind_of(["zebra"], known) == "no word known"


def test_recall_is_counted_by_kind_among_unseen_concepts(tmp_path):
    with ShardWriter(tmp_path / "data", name="x", source="", licence="", attribution="", recipe={}) as writer:
        for i, (caption, base) in enumerate(TRAIN):
            writer.add(f"train{i}", grey(i), [caption], {"base": base}, split="train")
        for i, (captions, base) in enumerate(TEST):
            writer.add(f"test{i}", grey(9 + i), captions, {"base": base}, split="test")
    split, train = open_dataset(tmp_path / "data", "test"), open_dataset(tmp_path / "data", "train")
    ranks = {
        "tr": {"itm": [9, 10, 3, 0, 0]},
        "ir": {"itm": [0, 99, 10, 12, 2, 50, 0]},
        "owner": [0, 0, 1, 2, 3, 3, 4],
        "unseen": [True, True, True, True, False],
    }
    found = recall_by_kind(split, train, ranks)
    assert found == {
        "all words known": {"tr_queries": 1, "tr_r10": 100.0, "ir_queries": 1, "ir_r10": 100.0},
        "some words known": {"tr_queries": 1, "tr_r10": 0.0, "ir_queries": 1, "ir_r10": 0.0},
        "no word known": {"tr_queries": 1, "tr_r10": 100.0, "ir_queries": 2, "ir_r10": 0.0},
        "flags": {"tr_queries": 1, "tr_r10": 100.0, "ir_queries": 2, "ir_r10": 50.0},
    }
