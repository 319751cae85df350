"""Dry checks of published files: what they count, and what is off."""

import json
from pathlib import Path

import pytest

from mvlm_dataloading import DataError
from mvlm_dataloading.tools import published_check
from mvlm_dataloading.tools.published_check import READERS, check_published, published_table
from mvlm_dataloading.tools.published_sizes import SIZES, Size
from support import published, published_tasks

WRITERS = {
    "coco": published.coco,
    "flickr30k": published.flickr30k,
    "vqa-v2": published_tasks.vqa_v2,
    "visual-genome-qa": published_tasks.visual_genome_qa,
    "nlvr2": published_tasks.nlvr2,
    "nlvr": published_tasks.nlvr,
    "snli-ve": published_tasks.snli_ve,
    "refcoco": published_tasks.refcoco,
    "clip-benchmark": published_tasks.clip_benchmark,
}
VQA = {"train": Size(12, 4), "validation": Size(12, 4), "test": Size(6, 2)}


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_sizes_add_up_as_their_authors_say():
    def total(name: str, what: str) -> int:
        return sum(getattr(size, what) for size in SIZES[name].values())

    assert total("coco, Karpathy's splits", "texts") == total("coco, 2014", "texts") == 616_767
    assert total("coco, 2017", "texts") == 616_767
    assert total("coco, Karpathy's splits", "rows") == total("coco, 2014", "rows") == 123_287
    assert total("coco, 2017", "rows") == 123_287
    assert total("flickr30k, Karpathy's splits", "texts") == 5 * total("flickr30k, Karpathy's splits", "rows")
    assert total("vqa-v2", "rows") == 1_105_904
    assert total("nlvr2", "rows") == 107_292
    assert SIZES["nlvr"]["train"].rows == 6 * 12_410
    assert SIZES["snli-ve"]["train"].rows == 176_932 + 176_045 + 176_550
    assert SIZES["snli-ve"]["validation"].rows == 5_959 + 5_960 + 5_939
    assert SIZES["snli-ve"]["test"].rows == 5_973 + 5_964 + 5_964
    assert (total("refcoco+", "rows"), total("refcoco+", "images")) == (141_564, 19_992)


@pytest.mark.parametrize("name", READERS)
def test_a_small_set_is_a_subset_and_not_the_published_one(tmp_path, name):
    WRITERS[name](tmp_path / "set")
    before = contents(tmp_path)
    if name == "visual-genome-qa":  # its last question has no answer
        assert check_published(name, tmp_path / "set", subset=True).problems == [
            "train: 1 rows are unusable: question has no answers"
        ]
    else:
        found = check_published(name, tmp_path / "set", subset=True)
        assert found.problems == []
        assert all(count.rows and count.images for count in found.splits.values())
    if name != "clip-benchmark":  # any data set may have the layout, so its size is not known
        problems = check_published(name, tmp_path / "set").problems
        assert any(f"wanted {SIZES_OF[name]:,} rows as published, found" in problem for problem in problems)
    assert contents(tmp_path) == before


SIZES_OF = {
    "coco": 113_287, "flickr30k": 29_000, "vqa-v2": 443_757, "visual-genome-qa": 1_445_322, "nlvr2": 86_373,
    "nlvr": 74_460, "snli-ve": 529_527, "refcoco": 120_191,
}  # fmt: skip


@pytest.fixture
def vqa(tmp_path, monkeypatch) -> Path:
    """VQA v2 with four images a split, whose published size is just that."""
    published_tasks.vqa_v2(tmp_path / "vqa")
    monkeypatch.setattr(published_check, "SIZES", {"vqa-v2": VQA})
    return tmp_path / "vqa"


def test_the_whole_published_set_has_no_problem(vqa):
    found = check_published("vqa-v2", vqa)
    assert found.problems == []
    assert {split: (count.rows, len(count.images)) for split, count in found.splits.items()} == {
        "train": (12, 4), "validation": (12, 4), "test": (6, 2),
    }  # fmt: skip
    lines = [line.split() for line in published_table(found).splitlines()]
    assert lines[0] == ["split", "rows", "published", "images", "published", "missing", "repeated", "unusable"]
    assert ["train", "12", "12", "4", "4", "0", "0", "0"] in lines


def test_what_is_off_is_said(vqa):
    (vqa / "val2014/COCO_val2014_000000000104.jpg").unlink()
    file = vqa / "v2_OpenEnded_mscoco_train2014_questions.json"
    content = json.loads(file.read_text())
    content["questions"][0]["question"] = ""
    content["questions"].append(dict(content["questions"][1]))
    file.write_text(json.dumps(content))
    (vqa / "v2_OpenEnded_mscoco_test2015_questions.json").unlink()
    problems = check_published("vqa-v2", vqa).problems
    missing = vqa / "val2014/COCO_val2014_000000000104.jpg"
    assert sorted(problems) == [
        "test: wanted the split, found none",
        "train: 1 rows are unusable: no caption",
        "train: wanted 12 rows as published, found 13",
        "train: wanted unique keys, found 1 further rows, as of 101000",
        f"validation: wanted all image files, found 1 missing, as {missing}",
    ]
    # Of a subset, splits, rows and images may be missing. Too many rows and unusable ones are still off.
    assert sorted(check_published("vqa-v2", vqa, subset=True).problems) == sorted(problems)[1:4]


def test_images_in_two_splits_are_said(tmp_path, monkeypatch):
    published_tasks.snli_ve(tmp_path)
    train, dev = tmp_path / "snli_ve_train.jsonl", tmp_path / "snli_ve_dev.jsonl"
    row = json.loads(train.read_text().splitlines()[0])
    dev.write_text(dev.read_text() + json.dumps({**row, "pairID": "new"}) + "\n")
    assert check_published("snli-ve", tmp_path, subset=True).problems == [
        "train and validation: wanted different images, found 1 in both"
    ]


def test_missing_tars_are_said(tmp_path):
    published_tasks.clip_benchmark(tmp_path / "set")
    (tmp_path / "set/test/1.tar").unlink()
    problems = check_published("clip-benchmark", tmp_path / "set").problems
    assert problems == ["test: wanted 2 tars as in nshards.txt, found 1"]


def test_an_unknown_name_is_refused(tmp_path):
    with pytest.raises(DataError, match="vqa: wanted one of coco, flickr30k, vqa-v2, "):
        check_published("vqa", tmp_path)


@pytest.mark.parametrize("name", ["coco", "flickr30k", "visual-genome-qa", "nlvr", "clip-benchmark"])
def test_another_folder_of_images_is_refused_where_none_is_read(tmp_path, name):
    WRITERS[name](tmp_path / "set")
    with pytest.raises(DataError, match=rf"^{name}: its images lie in .*set itself, got --images .*other; leave it"):
        check_published(name, tmp_path / "set", tmp_path / "other", subset=True)
