"""NLVR2 and NLVR: is a sentence true of a pair of photographs, or of three boxes with shapes?

Suhr et al., "A Corpus for Reasoning About Natural Language Grounded in Photographs", ACL 2019, and "A Corpus of Natural
Language for Visual Reasoning", ACL 2017. https://lil.nlp.cornell.edu/nlvr
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mvlm_dataloading.errors import DataError

from .files import captions_in_cell, files_under, read_as, read_rows, reason_if_outside, split_files
from .record import ImageStrip, Record, Source, published, source

_PERMUTATIONS = 6
_BOXES = ((0, 0, 100, 100), (150, 0, 250, 100), (300, 0, 400, 100))
"""Boxes in an image of NLVR, 400 x 100 pixels."""
_SPLITS = {"train": "train", "dev": "validation"}
NO_LABEL = "label is neither true nor false"


@source
def nlvr2(root: Path, /, images: Path | None = None, side: int = 384) -> Source:
    """NLVR2, for the task pairs: two photographs side by side, and a sentence about them.

    test1 is test; test2, if it is there, a split of that name.

        ROOT/{train,dev,test1}.json, or in ROOT/data
        IMAGES/train/DIRECTORY/train-*-img0.png, IMAGES/{dev,test1}/*-img0.png and *-img1.png

    Args:
        root: Folder with train.json, dev.json and test1.json.
        images: Folder with train, dev and test1. Default: ROOT/images, or ROOT.
        side: Side in pixels to which each image is resized.
    """
    _check_side(side)
    folder = images or (root / "images" if (root / "images").is_dir() else root)
    files = split_files(
        root, _SPLITS | {"test1": "test", "test2": "test2"}, "{0}.json", "data/{0}.json", "nlvr2/data/{0}.json"
    )
    return published(
        "nlvr2",
        {
            split: [_pair(folder, part, row, side, file) for row in read_rows(file, lines=True)]
            for part, split, file in files
        },
        [file for *_, file in files],
        origin="NLVR2, https://lil.nlp.cornell.edu/nlvr",
        licence="CC BY 4.0; each image under its own licence",
        attribution="Suhr et al., 2019",
        questions=True,
        side=side,
    )


@source
def nlvr(root: Path, /, side: int = 100, permutations: int = _PERMUTATIONS) -> Source:
    """NLVR (2017), for the task pairs: three boxes with shapes, and a sentence about them.

    An image of 400 x 100 pixels has three boxes, which become three images.

        ROOT/{train,dev,test}/{train,dev,test}.json, and optionally ROOT/hidden/hidden.json
        ROOT/{train,dev,test}/images/DIRECTORY/SPLIT-N-M-K.png, K from 0 to 5: the boxes in another order

    Args:
        root: Unpacked download with train, dev and test.
        side: Side in pixels to which each box is resized. As published: 100.
        permutations: Orders of the boxes, of six, that a training sentence is shown with. Evaluation takes the first.
    """
    _check_side(side)
    if not 1 <= permutations <= _PERMUTATIONS:
        raise DataError(f"permutations: wanted 1 to {_PERMUTATIONS}, got {permutations}")
    files = split_files(root, _SPLITS | {"test": "test", "hidden": "hidden"}, "{0}/{0}.json", "nlvr/{0}/{0}.json")
    records = {}
    for part, split, file in files:
        count = permutations if split == "train" else 1
        records[split] = [one for row in _with_folders(file) for one in _boxes(file, part, row, side, count)]
    return published(
        "nlvr",
        records,
        [file for *_, file in files],
        origin="NLVR, https://lil.nlp.cornell.edu/nlvr",
        licence="CC BY 4.0",
        attribution="Suhr, Lewis, Yeh and Artzi, 2017",
        questions=True,
        side=side,
        permutations=permutations,
    )


def _check_side(side: int) -> None:
    if not 16 <= side <= 4096:
        raise DataError(f"side: wanted 16 to 4096 pixels, got {side}")


def _with_folders(file: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a file of NLVR, each with its field `directory`: the folder of its images.

    Rows of the hidden set lack the field. Theirs is found by the names of the image files.
    """
    folders: dict[str, str] = {}
    for row in read_rows(file, lines=True):
        if "directory" not in row and not folders:
            folders = {path.stem: path.parent.name for path in files_under(file.parent / "images")}
        yield {"directory": folders.get(f"{file.stem}-{row.get('identifier')}-0", ""), **row}


def _pair(folder: Path, part: str, row: dict[str, Any], side: int, file: Path) -> Record:
    with read_as(file, "rows with sentence, label, identifier and, in train, directory"):
        identifier = str(row["identifier"])
        inside = f"{part}/{row['directory']}" if part == "train" else part
        text = captions_in_cell(row["sentence"])
    name, _, _ = identifier.rpartition("-")
    paths = tuple(folder / inside / f"{name}-img{k}.png" for k in (0, 1))
    metadata, fault = _truth(row, 2, identifier, "-".join(identifier.split("-")[:2]), f"nlvr2 {name}")
    if identifier.count("-") != 3:
        fault = "identifier is not split-set-pair-sentence"
    fault = reason_if_outside(f"{inside}/{name}") or fault
    return Record(identifier, ImageStrip(paths, side), text, str(paths[0]), metadata, fault)


def _boxes(file: Path, part: str, row: dict[str, Any], side: int, count: int) -> Iterator[Record]:
    with read_as(file, "rows with sentence, label, identifier n-m and directory"):
        number, place = str(row["identifier"]).split("-")
        directory, text = str(row["directory"]), captions_in_cell(row["sentence"])
    for k in range(count):
        name = f"images/{directory}/{part}-{number}-{place}-{k}.png"
        path = file.parent / name
        # In NLVR2's form, split-set-pair-sentence: the four images of a sentence are pairs of one set.
        identifier = f"{part}-{number}-{place}-0" if k == 0 else f"{part}-{number}-{place}p{k}-0"
        metadata, fault = _truth(row, 3, identifier, f"{part}-{number}", f"nlvr {path.stem}")
        strip = ImageStrip((path,) * 3, side, _BOXES, "PNG")
        yield Record(identifier, strip, text, str(path), metadata, reason_if_outside(name) or fault)


def _truth(
    row: dict[str, Any], images: int, identifier: str, set_id: str, image_id: str
) -> tuple[dict[str, Any], str | None]:
    """Metadata of a sentence, and the reason to reject it if it has no label true or false, else None.

    Args:
        row: of the annotation file.
        images: number of images that the sentence is about.
        identifier, set_id, image_id: ids of the sentence, of the set of images that it belongs to, and of its images.
    """
    label = str(row.get("label")).strip().lower()
    known = label if label in ("true", "false") else None
    metadata = {"images": images, "identifier": identifier, "set_id": set_id, "label": known, "image_id": image_id}
    return metadata, None if known else NO_LABEL
