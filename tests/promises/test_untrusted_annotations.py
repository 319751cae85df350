"""Annotation files that are damaged, or that name files outside of the data set's folder."""

import json
import tarfile
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


def test_a_caption_table_cannot_name_files_outside_its_folder(tmp_path):
    published.write_image(tmp_path / "secret.jpg", 0)
    published.folder(tmp_path / "images", 1)
    table = tmp_path / "table.jsonl"
    names = ["../secret.jpg", str(tmp_path / "secret.jpg"), "a/0.jpg", "a/\0.jpg", "a/../../secret.jpg"]
    table.write_text("".join(json.dumps({"image": name, "caption": "x"}) + "\n" for name in names))
    keys, reasons = written(folder(tmp_path / "images", table), tmp_path / "out")
    assert len(keys) == 1
    assert sorted(reasons) == ["image file is missing", *2 * ["image is outside the folder"]]  # two name one file


def outside_of(root: Path) -> list[str]:
    """File names that lead from a folder two levels below `root`, as in COCO, to an image outside it."""
    published.write_image(root.parent / "secret.jpg", 0)
    return ["../../secret.jpg", str(root.parent / "secret.jpg"), "a/../../../secret.jpg"]


@pytest.mark.parametrize("karpathy", [False, True])
def test_coco_annotations_cannot_name_files_outside_the_folder(tmp_path, karpathy):
    root = tmp_path / "coco"
    published.coco(root)
    file, field = (
        (root / "dataset_coco.json", "filename")
        if karpathy
        else (root / "annotations/captions_train2014.json", "file_name")
    )
    content = json.loads(file.read_text())
    for image, name in zip(content["images"], outside_of(root), strict=False):
        image[field] = name
    if karpathy:
        content["images"][3]["filepath"] = "../secret.jpg/.."
    file.write_text(json.dumps(content))
    keys, reasons = written(coco(root, file if karpathy else None), tmp_path / "out")
    assert reasons == (3 + karpathy) * ["image is outside the folder"]
    assert keys == [f"{100 + i:012d}" for i in range(3 + karpathy, 9 if karpathy else 8)]


@pytest.mark.parametrize("suffix", ["json", "annotations.csv", "token", "results.csv"])
def test_flickr30k_annotations_cannot_name_files_outside_the_folder(tmp_path, suffix):
    root = tmp_path / "flickr"
    published.flickr30k(root)
    names = outside_of(root)
    file = root / f"captions.{suffix.rpartition('.')[2]}"
    if suffix == "json":
        images = [{"filename": name, "split": "train", "sentences": [{"raw": "x"}]} for name in (*names, "1000.jpg")]
        file.write_text(json.dumps({"images": images}))
    elif suffix == "annotations.csv":
        rows = [f'"[""x""]",train,{name}' for name in (*names, "1000.jpg")]
        file.write_text("\n".join(["raw,split,filename", *rows]) + "\n")
    elif suffix == "token":
        file.write_text("".join(f"{name}#0\tx\n" for name in (*names, "1000.jpg")))
    else:
        file.write_text("image_name| comment_number| comment\n" + "".join(f"{n}| 0| x\n" for n in (*names, "1000.jpg")))
    keys, reasons = written(flickr30k(root, file), tmp_path / "out")
    assert keys == ["1000"]
    assert reasons == 3 * ["image is outside the folder"]


@pytest.mark.slow
def test_only_strings_are_captions_in_every_source(tmp_path):
    """Nulls, numbers and objects are skipped in every format that can hold them."""
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
    published.coco(tmp_path / "coco")
    published.flickr30k(tmp_path / "flickr")
    published.visual_genome(tmp_path / "genome")
    for file, caption in (
        ("coco/annotations/captions_train2014.json", "caption"),
        ("coco/dataset_coco.json", "raw"),
        ("flickr/dataset_flickr30k.json", "raw"),
        ("genome/region_descriptions.json", "phrase"),
    ):
        text = (tmp_path / file).read_text()
        (tmp_path / file).write_text(text.replace(f'"{caption}": "', f'"{caption}": null, "was": "', 1))
    table = tmp_path / "flickr/flickr_annotations_30k.csv"
    table.write_text(table.read_text().replace('[""soft colours, number 0""]', "[null]"))
    for source in (
        coco(tmp_path / "coco"),
        coco(tmp_path / "coco", tmp_path / "coco/dataset_coco.json"),
        flickr30k(tmp_path / "flickr"),
        flickr30k(tmp_path / "flickr", table),
        visual_genome(tmp_path / "genome"),
    ):
        first = next(record for piece in source.pieces if piece.split == "train" for record in piece.records(1))
        assert list(first.captions) == [f"part {k} of picture 0" for k in (1, 2, 3, 0)][: len(first.captions)]
        assert len(first.captions) == (4 if source.name == "visual-genome" else 0)


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
