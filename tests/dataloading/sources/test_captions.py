"""COCO, Flickr30k and Visual Genome in each of their published forms: captions by split and key."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from mvlm_dataloading import open_dataset
from mvlm_dataloading.sources.coco import coco
from mvlm_dataloading.sources.flickr30k import flickr30k
from mvlm_dataloading.sources.record import Source
from mvlm_dataloading.sources.visual_genome import visual_genome
from support import published
from support.data import build_source, read_json_lines


def of_coco(numbers) -> dict[str, list[str]]:
    return {f"{100 + i:012d}": published.captions(i) for i in numbers}


def of_flickr(numbers) -> dict[str, list[str]]:
    return {str(1000 + i): published.captions(i) for i in numbers}


REGIONS = {str(2407000 + i): [f"part {k} of picture {i}" for k in range(4)] for i in range(6)}
KARPATHY = {"train": of_coco(range(9)), "validation": of_coco([9]), "test": of_coco([10, 11])}  # restval is trained on
SPLITS = {"train": of_flickr(range(4)), "validation": of_flickr([4]), "test": of_flickr([5])}
Form = tuple[Callable[[Path], object], Callable[[Path], Source], dict[str, dict[str, list[str]]]]
FORMS: dict[str, Form] = {
    "COCO": (published.coco, coco, {"train": of_coco(range(8)), "validation": of_coco(range(8, 12))}),
    **{
        f"COCO {year} in Karpathy's splits": (
            partial(published.coco, year=year), lambda p: coco(p, p / "dataset_coco.json"), KARPATHY
        )
        for year in (2014, 2017)
    },
    **{
        f"Flickr30k, {file}": (published.flickr30k, lambda p, file=file: flickr30k(p, p / file), wanted)
        for file, wanted in (
            ("dataset_flickr30k.json", SPLITS), ("flickr_annotations_30k.csv", SPLITS),
            ("results_20130124.token", {"train": of_flickr(range(6))}), ("results.csv", {"train": of_flickr(range(6))}),
        )
    },
    "Flickr30k, found": (published.flickr30k, flickr30k, SPLITS),
    "Visual Genome": (published.visual_genome, visual_genome, {"train": REGIONS}),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_captions_of_a_published_form(tmp_path, form):
    write, source, wanted = FORMS[form]
    write(tmp_path / "in")
    assert build_source(source(tmp_path / "in"), tmp_path / "out") == wanted
    facts = [open_dataset(tmp_path / "out", "train").metadata(i) for i in (0, 1)]
    if form == "COCO":
        assert [facts[0][name] for name in ("image_id", "licence", "width", "height")] == [
            "coco 100", "https://example.org/by/2.0/", 72, 54,
        ]  # fmt: skip
    if form == "Visual Genome":
        assert (facts[0].get("coco_id"), facts[1]["coco_id"]) == (None, 101)


def test_coco_rejects_missing_images_and_images_without_captions(tmp_path):
    published.coco(tmp_path)
    (tmp_path / "val2014/COCO_val2014_000000000109.jpg").unlink()
    file = tmp_path / "annotations/captions_train2014.json"
    annotations = json.loads(file.read_text())
    annotations["annotations"] = [a for a in annotations["annotations"] if a["image_id"] != 103]
    file.write_text(json.dumps(annotations))
    found = build_source(coco(tmp_path), tmp_path / "out")
    assert found["train"].keys() == of_coco([0, 1, 2, 4, 5, 6, 7]).keys()
    assert [
        (line["key"], line["split"], line["reason"]) for line in read_json_lines(tmp_path / "out/rejected.jsonl")
    ] == [("000000000103", "train", "no caption"), ("000000000109", "validation", "image file is missing")]
    assert open_dataset(tmp_path / "out", "train").description["rejected"] == {
        "image file is missing": 1, "no caption": 1,
    }  # fmt: skip


def test_a_table_with_commas_is_a_csv_file(tmp_path):
    published.flickr30k(tmp_path)
    for name, text, wanted in (
        ("captions", 'image,caption\n1000.jpg,2 dogs play in 3 fields\n1001.jpg,"Two dogs, one ""cat"""\n',
         {"1000": ["2 dogs play in 3 fields"], "1001": ['Two dogs, one "cat"']}),
        ("numbered", "image_name,comment_number,comment\n1000.jpg,0,A dog\n1000.jpg,1,It runs\n",
         {"1000": ["A dog", "It runs"]}),
    ):  # fmt: skip
        (tmp_path / f"{name}.csv").write_text(text)
        assert build_source(flickr30k(tmp_path, tmp_path / f"{name}.csv"), tmp_path / name) == {"train": wanted}


def test_splits_and_numbers_of_captions_of_visual_genome(tmp_path):
    published.visual_genome(tmp_path)
    two = build_source(visual_genome(tmp_path, test=0.5), tmp_path / "two", max_captions=2)
    assert two["train"].keys() | two["test"].keys() == REGIONS.keys()
    assert {len(captions) for part in two.values() for captions in part.values()} == {2}
