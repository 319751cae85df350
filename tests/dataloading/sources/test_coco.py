"""COCO, with the published splits and with Karpathy's."""

import json

import pytest

from mvlm_dataloading import open_dataset
from mvlm_dataloading.sources.coco import coco
from support import published
from support.data import build_source, read_json_lines


def expected(numbers) -> dict[str, list[str]]:
    return {f"{100 + i:012d}": published.captions(i) for i in numbers}


def test_coco(tmp_path):
    published.coco(tmp_path / "coco")
    assert build_source(coco(tmp_path / "coco"), tmp_path / "out") == {
        "train": expected(range(8)),
        "validation": expected(range(8, 12)),
    }
    dataset = open_dataset(tmp_path / "out", "train")
    facts = dataset.metadata(0)
    assert (facts["image_id"], facts["licence"]) == ("coco 100", "https://example.org/by/2.0/")
    assert (facts["width"], facts["height"]) == (72, 54)
    assert dataset.image_bytes(0) == (tmp_path / "coco/train2014/COCO_train2014_000000000100.jpg").read_bytes()


@pytest.mark.parametrize("year", [2014, 2017])
def test_coco_in_karpathys_splits(tmp_path, year):
    published.coco(tmp_path, year=year)
    assert build_source(coco(tmp_path, tmp_path / "dataset_coco.json"), tmp_path / "out") == {
        "train": expected(range(9)),  # restval is trained on
        "validation": expected([9]),
        "test": expected([10, 11]),
    }


def test_coco_rejects_missing_images_and_images_without_captions(tmp_path):
    published.coco(tmp_path)
    (tmp_path / "val2014/COCO_val2014_000000000109.jpg").unlink()
    file = tmp_path / "annotations/captions_train2014.json"
    annotations = json.loads(file.read_text())
    annotations["annotations"] = [a for a in annotations["annotations"] if a["image_id"] != 103]
    file.write_text(json.dumps(annotations))
    found = build_source(coco(tmp_path), tmp_path / "out")
    assert found["train"].keys() == expected([0, 1, 2, 4, 5, 6, 7]).keys()
    assert [
        (line["key"], line["split"], line["reason"]) for line in read_json_lines(tmp_path / "out/rejected.jsonl")
    ] == [
        ("000000000103", "train", "no caption"),
        ("000000000109", "validation", "image file is missing"),
    ]
    description = json.loads((tmp_path / "out/dataset.json").read_text())
    assert description["rejected"] == {"image file is missing": 1, "no caption": 1}
