"""Data sets in CLIP_benchmark's layout."""

import json
import tarfile

import pytest

from mvlm_dataloading import DataError, open_dataset
from mvlm_dataloading.sources.tasks.clip_benchmark import clip_benchmark
from support import published_tasks
from support.data import build_source, read_json_lines
from support.published import add_members, encoded, make_image


def test_classification(tmp_path):
    published_tasks.clip_benchmark(tmp_path / "pets")
    found = build_source(clip_benchmark(tmp_path / "pets"), tmp_path / "out")
    assert {split: len(known) for split, known in found.items()} == {"train": 6, "test": 6}
    assert list(found["test"].values())[:2] == [["a bad photo of a alarm clock."], ["a bad photo of a café."]]
    dataset = open_dataset(tmp_path / "out", "test")
    facts = [dataset.metadata(i) for i in range(6)]
    assert [(one["label"], one["class"]) for one in facts] == [("alarm clock", 0), ("café", 1)] * 3
    description = json.loads((tmp_path / "out/dataset.json").read_text())
    assert description["name"] == "pets"
    assert description["recipe"]["classes"] == ["alarm clock", "café"]
    assert description["recipe"]["templates"] == ["a bad photo of a {c}.", "{c}"]


def test_retrieval(tmp_path):
    published_tasks.clip_benchmark(tmp_path / "set", retrieval=True)
    found = build_source(clip_benchmark(tmp_path / "set"), tmp_path / "out")
    assert list(found["test"].values())[4] == ["caption 104", "another"]
    assert len(found["train"]) == 6


def test_bad_samples_are_rejected(tmp_path):
    published_tasks.clip_benchmark(tmp_path / "set")
    image = encoded(make_image(7))
    with tarfile.open(tmp_path / "set/test/2.tar", "w") as tar:
        for key, text in (("high", b"2"), ("minus", b"-1"), ("word", b"cat"), ("good", b" 1\n"), ("bytes", b"\xff")):
            add_members(tar, [(f"{key}.jpg", image), (f"{key}.cls", text)])
        add_members(tar, [("alone.jpg", image), ("blind.cls", b"0")])
    build_source(clip_benchmark(tmp_path / "set"), tmp_path / "out")
    wrong = "class is not a number of a line of classnames.txt"
    assert [(x["key"].partition("-")[2], x["reason"]) for x in read_json_lines(tmp_path / "out/rejected.jsonl")] == [
        ("high", wrong), ("minus", wrong), ("word", wrong), ("bytes", wrong), ("alone", wrong), ("blind", "no image"),
    ]  # fmt: skip


def test_other_layouts_are_refused(tmp_path):
    with pytest.raises(DataError, match="test: wanted a folder, found none"):
        clip_benchmark(tmp_path)
    root = tmp_path / "set"
    published_tasks.clip_benchmark(root)
    (root / "zeroshot_classification_templates.txt").write_text("a photo\n")
    with pytest.raises(DataError, match=r"wanted templates with \{c\} for the class, found 'a photo'"):
        clip_benchmark(root)
    (root / "zeroshot_classification_templates.txt").unlink()
    assert clip_benchmark(root).recipe["templates"] == ["a photo of a {c}."]
    (root / "classnames.txt").write_text("\n \n")
    with pytest.raises(DataError, match=r"classnames\.txt: wanted lines of text in UTF-8, found none"):
        clip_benchmark(root)
    (root / "classnames.txt").write_text("cat\n\ndog\n")  # dog is number 2 to the tool that numbered the images
    with pytest.raises(DataError, match=r"classnames\.txt: wanted a name in every line, found line 2 blank"):
        clip_benchmark(root)
    (root / "classnames.txt").write_text("\ncat\ndog\n")
    with pytest.raises(DataError, match=r"classnames\.txt: wanted a name in every line, found line 1 blank"):
        clip_benchmark(root)
    (root / "classnames.txt").write_text("cat\ndog\n\n")
    for name in ("val", "validation"):
        (root / name).mkdir()
        (root / name / "0.tar").write_bytes((root / "test/0.tar").read_bytes())
    with pytest.raises(DataError, match="wanted one folder of the split validation, found two"):
        clip_benchmark(root)
    (root / "dataset_type.txt").write_text("multilabel\n")
    with pytest.raises(DataError, match="wanted classification or retrieval, found multilabel"):
        clip_benchmark(root)
