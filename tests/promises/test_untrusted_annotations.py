"""Annotation files that are damaged, or that name files outside of the data set's folder."""

import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from mvlm_dataloading import DataError, build_shards
from mvlm_dataloading.sources.coco import coco
from mvlm_dataloading.sources.flickr30k import flickr30k
from mvlm_dataloading.sources.folder import folder
from mvlm_dataloading.sources.huggingface import huggingface
from mvlm_dataloading.sources.record import Source
from mvlm_dataloading.sources.visual_genome import visual_genome
from mvlm_dataloading.sources.webdataset import webdataset
from support import published
from support.data import build_source, keys_of, read_json_lines


def written(source: Source, out: Path) -> tuple[list[str], list[str]]:
    """Keys of the training images, and reasons for rejection of the others."""
    build_shards(source, out, workers=0)
    return keys_of(out), [line["reason"] for line in read_json_lines(out / "rejected.jsonl")]


FLICKR30K: dict[str, Callable[[list[str]], str]] = {
    "a.json": lambda names: json.dumps(
        {"images": [{"filename": name, "split": "train", "sentences": [{"raw": "x"}]} for name in names]}
    ),
    "a.csv": lambda names: "\n".join(["raw,split,filename", *(f'"[""x""]",train,{name}' for name in names)]),
    "a.token": lambda names: "\n".join(f"{name}#0\tx" for name in names),
    "results.csv": lambda names: "\n".join(["image_name| comment_number| comment", *(f"{n}| 0| x" for n in names)]),
}
"""Annotations of these images, by the name of their file."""
COCO = {"annotations/captions_train2014.json": "file_name", "dataset_coco.json": "filename"}
"""Files, and their fields with names of images."""


@pytest.mark.parametrize("file", ["table.jsonl", *COCO, *FLICKR30K])
def test_annotations_cannot_name_files_outside_the_folder(tmp_path, file):
    root = tmp_path / "in"
    published.write_image(tmp_path / "secret.jpg", 0)
    # From a folder two levels below, as in COCO.
    names = ["../../secret.jpg", str(tmp_path / "secret.jpg"), "a/../../../secret.jpg"]
    outside = 3 * ["image is outside the folder"]
    if file in COCO:
        published.coco(root)
        content = json.loads((root / file).read_text())
        for image, name in zip(content["images"], names, strict=False):
            image[COCO[file]] = name
        splits = file == "dataset_coco.json"
        if splits:
            content["images"][3]["filepath"] = "../secret.jpg/.."
        (root / file).write_text(json.dumps(content))
        found = written(coco(root, root / file if splits else None), tmp_path / "out")
        assert found == ([f"{100 + i:012d}" for i in range(3 + splits, 8 + splits)], outside + outside[:splits])
    elif file in FLICKR30K:
        published.flickr30k(root)
        (root / file).write_text(FLICKR30K[file]([*names, "1000.jpg"]) + "\n")
        assert written(flickr30k(root, root / file), tmp_path / "out") == (["1000"], outside)
    else:
        published.folder(root, 1)
        rows = [json.dumps({"image": name, "caption": "x"}) for name in (*names, "a/\0.jpg", "a/0.jpg")]
        (root / file).write_text("\n".join(rows))
        keys, reasons = written(folder(root, root / file), tmp_path / "out")
        assert len(keys) == 1
        assert sorted(reasons) == ["image file is missing", *outside[:2]]  # two name one file


@pytest.mark.slow
def test_only_strings_are_captions(tmp_path):
    """Nulls, numbers and objects are skipped in tables, tars and rows."""
    cells = [["words", None], [None], [{"raw": "words", "id": 1}], [float("nan")], 7, None, "None"]
    numbers = range(len(cells))
    for i in numbers:
        published.write_image(tmp_path / "folder" / f"{i}.jpg", i)
    rows = "\n".join(json.dumps({"image": f"{i}.jpg", "caption": cells[i]}) for i in numbers)
    (tmp_path / "folder/captions.jsonl").write_text(rows)
    source = folder(tmp_path / "folder", tmp_path / "folder/captions.jsonl")
    assert build_source(source, tmp_path / "a")["train"] == {"0": ["words"], "6": ["None"]}
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for i in numbers:
            told = json.dumps({"caption": cells[i]}).encode()
            published.add_members(tar, [(f"{i}.jpg", published.encoded(published.make_image(i))), (f"{i}.json", told)])
    assert build_source(webdataset([tmp_path / "0.tar"]), tmp_path / "b")["train"] == {"0": ["words"], "6": ["None"]}
    images = [published.encoded(published.make_image(i)) for i in range(3)]
    parquet.write_table(
        pyarrow.table({"image": images, "caption": [["x", None], [None], ["y"]]}), tmp_path / "0.parquet"
    )
    assert [*build_source(huggingface(tmp_path / "0.parquet"), tmp_path / "c")["train"].values()] == [["x"], ["y"]]


@pytest.mark.parametrize("number", ["a", 1e999, None, [1], {}])
def test_malformed_image_numbers_are_refused(tmp_path, number):
    published.coco(tmp_path / "coco")
    published.visual_genome(tmp_path / "genome")
    for name, open_source, field in (
        ("coco/annotations/captions_train2014.json", lambda: coco(tmp_path / "coco"), "id"),
        ("coco/dataset_coco.json", lambda: coco(tmp_path / "coco", tmp_path / "coco/dataset_coco.json"), "cocoid"),
        ("genome/region_descriptions.json", lambda: visual_genome(tmp_path / "genome"), "id"),
    ):
        content = json.loads((tmp_path / name).read_text())
        (content if isinstance(content, list) else content["images"])[1][field] = number
        (tmp_path / name).write_text(json.dumps(content))
        with pytest.raises(
            DataError, match=r"\.json: wanted .*, found (Value|Type|Overflow)Error.*; download it again"
        ):
            open_source()


def test_captions_nested_too_deeply_are_refused(tmp_path):
    published.flickr30k(tmp_path)
    file = tmp_path / "flickr_annotations_30k.csv"
    file.write_text(f"raw,split,filename\n{'[' * 100_000},train,1000.jpg\n")
    with pytest.raises(DataError, match="wanted columns raw, split and filename, found RecursionError"):
        flickr30k(tmp_path, file)
