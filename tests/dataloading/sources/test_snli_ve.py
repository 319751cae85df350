"""SNLI-VE, on files as published."""

import json

import pytest

from mvlm_dataloading import open_dataset
from mvlm_dataloading.sources.snli_ve import snli_ve
from support import published_tasks
from support.data import build_source, read_json_lines


def test_snli_ve(tmp_path):
    published_tasks.snli_ve(tmp_path)
    found = build_source(snli_ve(tmp_path), tmp_path / "out")
    assert {split: len(known) for split, known in found.items()} == {"train": 6, "validation": 6, "test": 6}
    dataset = open_dataset(tmp_path / "out", "validation")
    assert dataset.captions(1) == ["hypothesis «1» of 1002"]  # not the premise
    facts = dataset.metadata(1)
    assert (facts["pairID"], facts["label"], facts["image_id"]) == ("1002.jpg#0r1c", "contradiction", "flickr 1002")
    assert len({int(dataset.locate("image", i)[0]) for i in range(6)}) == 2
    assert dataset.image_bytes(1) == (tmp_path / "flickr30k-images/1002.jpg").read_bytes()


def test_bad_rows_are_rejected(tmp_path):
    published_tasks.snli_ve(tmp_path / "a")
    (tmp_path / "a/flickr30k-images").rename(tmp_path / "images")
    (tmp_path / "images/1001.jpg").unlink()
    file = tmp_path / "a/snli_ve_train.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows[0]["gold_label"] = "-"
    rows.insert(1, {**rows[1], "sentence2": "n/a \u0000"})
    rows += [{**rows[2], "pairID": "x", "gold_label": "maybe"}, {**rows[2], "pairID": "y", "sentence2": " "}]
    rows.append({**rows[2], "pairID": "z", "Flickr30K_ID": "../1000"})
    published_tasks.write_lines(file, rows)
    found = build_source(snli_ve(tmp_path / "a", tmp_path / "images"), tmp_path / "out")
    assert list(found["train"].values()) == [["n/a"], ["hypothesis «2» of 1000"]]
    assert [line["reason"] for line in read_json_lines(tmp_path / "out/rejected.jsonl")] == [
        "annotators agree on no label",
        "label is not one of contradiction, neutral, entailment",
        "no caption",
        "image file is missing",
        "image file is missing",
        "image file is missing",
        "image is outside the folder",
        "key was used before",
    ]


@pytest.mark.parametrize("name", ["Flikr30kID", "Flickr30kID"])
def test_other_names_of_the_image_field(tmp_path, name):
    published_tasks.snli_ve(tmp_path)
    for file in tmp_path.glob("*.jsonl"):
        file.write_text(file.read_text().replace("Flickr30K_ID", name))
    assert sum(len(list(piece.records(1))) for piece in snli_ve(tmp_path).pieces) == 18
