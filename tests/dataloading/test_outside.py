"""Annotations that name files outside of the data set's folder: nothing of this machine gets into a set that way."""

import json
from pathlib import Path

import published
import pytest

from mvlm_dataloading import DataError, build_shards, open_dataset
from mvlm_dataloading.sources.coco import coco
from mvlm_dataloading.sources.flickr30k import flickr30k
from mvlm_dataloading.sources.folder import folder
from mvlm_dataloading.sources.record import Source
from mvlm_dataloading.sources.tables import huggingface
from mvlm_dataloading.sources.visual_genome import visual_genome


def written(source: Source, out: Path) -> tuple[list[str], list[str]]:
    """Keys of the training pictures, and why the others were refused."""
    build_shards(source, out, workers=0)
    lines = (out / "rejected.jsonl").read_text().splitlines()
    return open_dataset(out, "train").keys.tolist(), [json.loads(line)["reason"] for line in lines]


def test_a_table_does_not_lead_out_of_its_folder(tmp_path):
    published.write_picture(tmp_path / "secret.jpg", 0)
    published.folder(tmp_path / "pictures", 1)
    table = tmp_path / "table.jsonl"
    names = ["../secret.jpg", str(tmp_path / "secret.jpg"), "a/0.jpg", "a/\0.jpg", "a/../../secret.jpg"]
    table.write_text("".join(json.dumps({"image": name, "caption": "x"}) + "\n" for name in names))
    keys, reasons = written(folder(tmp_path / "pictures", table), tmp_path / "out")
    assert len(keys) == 1
    assert sorted(reasons) == ["image file is missing", *3 * ["image is outside the folder"]]


def outside_of(root: Path) -> list[str]:
    """Names that lead from a folder two below `root`, as COCO's are, to a picture beside it."""
    published.write_picture(root.parent / "secret.jpg", 0)
    return ["../../secret.jpg", str(root.parent / "secret.jpg"), "a/../../../secret.jpg"]


@pytest.mark.parametrize("karpathy", [False, True])
def test_cocos_annotations_do_not_lead_out_of_its_folder(tmp_path, karpathy):
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
def test_flickrs_annotations_do_not_lead_out_of_its_folder(tmp_path, suffix):
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


def test_no_other_names_lead_out_of_a_folder(tmp_path):
    """Visual Genome's pictures are named by numbers; the splits of save_to_disk are folders."""
    published.visual_genome(tmp_path / "genome")
    file = tmp_path / "genome/region_descriptions.json"
    images = json.loads(file.read_text())
    images[0]["id"] = "../../secret"
    file.write_text(json.dumps(images))
    with pytest.raises(DataError, match="wanted Visual Genome's region descriptions, found ValueError"):
        visual_genome(tmp_path / "genome")
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved/dataset_dict.json").write_text('{"splits": ["../genome"]}')
    with pytest.raises(DataError, match=r"saved: wanted splits that are folders in it, found '\.\./genome'"):
        huggingface([tmp_path / "saved"])
