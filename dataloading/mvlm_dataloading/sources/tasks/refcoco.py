"""RefCOCO+: phrases that name one object in an image of COCO, with the object's box.

Yu et al., "Modeling Context in Referring Expressions", ECCV 2016. https://github.com/lichengunc/refer
"""

from pathlib import Path
from typing import Any

from mvlm_dataloading.errors import DataError
from mvlm_dataloading.sources.files import captions_in_cell, read_json
from mvlm_dataloading.sources.record import Record, Source, cut_into_pieces, file_sha256, with_images_together

from .places import coco_folder, find_file, wrong_format
from .plain_pickle import read_plain_pickle

_SPLITS = {"train": "train", "val": "validation", "testA": "testA", "testB": "testB", "test": "test"}
_NAMES = ("refcoco+", "refcoco", "refcocog")


def refcoco(
    root: Path,
    images: Path | None = None,
    name: str = "refcoco+",
    split_by: str = "unc",
    candidates: Path | None = None,
) -> Source:
    """RefCOCO+, RefCOCO or RefCOCOg from an unpacked download. testA shows people, testB other objects.

        ROOT/refs(unc).p, ROOT/instances.json, or both in ROOT/refcoco+
        IMAGES/train2014/COCO_train2014_*.jpg

    A sample is one expression. `box` is [x, y, width, height] in pixels of the published image, whose [width, height]
    is `size`; an image that is stored smaller has the box scaled by stored over published size.

    Args:
        images: parent of train2014. Default: ROOT.
        split_by: author of the splits, as in the file's name: unc, google or umd.
        candidates: JSON object with the boxes that a detector found in each image, by its id, such as MAttNet's as
            ALBEF gives them. They become `candidates`.

    Raises:
        DataError: a file or folder is missing or has another format, or the pickle holds more than plain containers.
    """
    if name not in _NAMES:
        raise DataError(f"name: wanted {', '.join(_NAMES)}, got {name!r}")
    refs = find_file(root, f"refs({split_by}).p", f"{name}/refs({split_by}).p")
    if refs is None:
        raise DataError(f"{root / f'refs({split_by}).p'}: wanted a file, found none; give the folder that holds it")
    if refs.parent.name in _NAMES and refs.parent.name != name:
        raise DataError(f"name: wanted {refs.parent.name}, the name of {refs.parent}, got {name}; give it by --name")
    instances = refs.with_name("instances.json")
    folder = coco_folder([images or root, root, root.parent], "train2014")
    records: dict[str, list[Record]] = {}
    detected = None if candidates is None else _detected(candidates)
    try:
        boxes, sizes, categories = _instances(instances)
        for ref in read_plain_pickle(refs):
            split = _SPLITS.get(ref["split"])
            if split is None:
                raise ValueError(f"a split named {ref['split']}")
            records.setdefault(split, []).extend(_records(ref, folder, boxes, sizes, categories, detected))

    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        if isinstance(error, DataError):
            raise
        raise wrong_format(refs, f"{name}'s expressions beside its instances.json", error) from None
    used = [refs, instances] if candidates is None else [refs, instances, candidates]
    recipe = {"annotations": [file_sha256(file) for file in used], "split_by": split_by}
    return Source(
        name=name,
        origin=f"{name}, https://github.com/lichengunc/refer",
        licence="each image under its own Flickr licence; expressions without a stated licence",
        attribution="Yu, Poirson, Yang, Berg and Berg, 2016; COCO Consortium",
        recipe=recipe,
        pieces=cut_into_pieces({split: with_images_together(listed) for split, listed in records.items()}),
        questions=True,
    )


def _detected(file: Path) -> dict[int, list[list[float]]]:
    """Boxes by the id of their image."""
    try:
        return {int(i): [[float(x) for x in box[:4]] for box in boxes] for i, boxes in read_json(file).items()}
    except (TypeError, ValueError, AttributeError) as error:
        raise wrong_format(file, "an object of lists of boxes [x, y, width, height] by image id", error) from None


def _instances(file: Path) -> tuple[dict[int, list[float]], dict[int, list[int]], dict[int, str]]:
    """Box of each annotation, size of each image, name of each category, by their ids."""
    content = read_json(file)
    return (
        {one["id"]: [float(x) for x in one["bbox"]] for one in content["annotations"]},
        {one["id"]: [int(one["width"]), int(one["height"])] for one in content["images"]},
        {one["id"]: one["name"] for one in content["categories"]},
    )


def _records(
    ref: dict[str, Any],
    folder: Path,
    boxes: dict[int, list[float]],
    sizes: dict[int, list[int]],
    categories: dict[int, str],
    detected: dict[int, list[list[float]]] | None,
) -> list[Record]:
    number = int(ref["image_id"])
    path = folder / f"COCO_train2014_{number:012d}.jpg"
    box, size = boxes.get(ref["ann_id"]), sizes.get(ref["image_id"])
    fault = None
    if box is None or size is None:
        fault = "object has no box"
    elif len(box) != 4 or min(box[2:]) <= 0 or box[0] + box[2] > size[0] + 1 or box[1] + box[3] > size[1] + 1:
        fault = "box is empty or outside the image"
    found = []
    for sentence in ref["sentences"]:
        metadata: dict[str, Any] = {
            "id": str(int(sentence["sent_id"])),
            "image_id": f"coco {number}",
            "box": box,
            "size": size,
            "ref_id": int(ref["ref_id"]),
            "category": categories.get(ref["category_id"], ""),
        } | ({} if detected is None else {"candidates": detected.get(number, [])})
        text = captions_in_cell(sentence.get("sent") or sentence.get("raw"))
        found.append(Record(metadata["id"], path, text, str(path), metadata, fault))
    return found
