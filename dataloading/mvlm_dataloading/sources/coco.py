"""COCO captions, with the published splits or Karpathy's."""

import re
from pathlib import Path
from typing import Any

from mvlm_dataloading.errors import DataError

from .files import COCO_CAPTIONS, coco_images, karpathy_images, read_as, reason_if_outside
from .record import Record, Source, canonical_split, published, require_folder, source

_FOLDERS = ("train2014", "val2014", "train2017", "val2017")


@source
def coco(root: Path, /, karpathy: Path | None = None, year: int | None = None) -> Source:
    """COCO captions, with Karpathy's splits or the published ones.

        ROOT/annotations/captions_train2017.json, captions_val2017.json (or of 2014)
        ROOT/train2017/*.jpg, ROOT/val2017/*.jpg (or of 2014)

    Args:
        root: Unpacked download with annotations, train2014 and val2014, or those of 2017.
        karpathy: Karpathy's dataset_coco.json, which gives the splits train (with restval), validation and test for
            the images of either year. Default: train and val of the year become train and validation.
        year: 2014 or 2017, needed if the annotations of both are there.
    """
    if karpathy is not None:
        files, records = [karpathy], _karpathy(root, karpathy)
    else:
        files = _annotations(root, year)
        records = {}
        for file in files:
            split = canonical_split(_name(file)[0], str(file))
            records.setdefault(split, []).extend(_captions(root, file))
    return published(
        "coco",
        records,
        files,
        origin="COCO captions, https://cocodataset.org" + (", splits by A. Karpathy" if karpathy else ""),
        licence="annotations CC BY 4.0; each image under its own Flickr licence",
        attribution="COCO Consortium",
    )


def _annotations(root: Path, year: int | None) -> list[Path]:
    folder = require_folder(root / "annotations")
    found = sorted(file for file in folder.iterdir() if re.fullmatch(r"captions_(train|val)20\d\d\.json", file.name))
    years = {_name(file)[1] for file in found}
    if year is None and len(years) > 1:
        raise DataError(f"{folder}: wanted the captions of one year, found {', '.join(sorted(years))}; give --year")
    found = [file for file in found if year is None or _name(file)[1] == str(year)]
    if not found:
        raise DataError(f"{folder}: wanted captions_train*.json and captions_val*.json, found none; download them")
    return found


def _name(file: Path) -> tuple[str, str]:
    word = file.stem.removeprefix("captions_")
    return word[:-4], word[-4:]


def _captions(root: Path, file: Path) -> list[Record]:
    """Records of all images of a file of captions, one for each image."""
    folder = root / file.stem.removeprefix("captions_")
    with read_as(file, COCO_CAPTIONS):
        return [
            _record(folder, image["file_name"], image["id"], captions, licence)
            for image, captions, licence in coco_images(file)
        ]


def _karpathy(root: Path, file: Path) -> dict[str, list[Record]]:
    images = list(karpathy_images(file))
    require_folder(*(root / name for name in _FOLDERS))
    records: dict[str, list[Record]] = {}
    for split, captions, image in images:
        with read_as(file, "Karpathy's dataset_coco.json"):
            name = str(Path(image["filepath"], image["filename"]))
            if not (root / name).parent.is_dir():  # the 2017 download has the images of 2014 under shorter names
                short = f"{int(image['cocoid']):012d}.jpg"
                name = next((f"{one}/{short}" for one in _FOLDERS if (root / one / short).is_file()), name)
            records.setdefault(split, []).append(_record(root, name, image["cocoid"], captions, None))
    return records


def _record(folder: Path, name: str, number: Any, captions: list[str], licence: str | None) -> Record:
    path, metadata = folder / name, {"image_id": f"coco {number}"} | ({"licence": licence} if licence else {})
    return Record(f"{int(number):012d}", path, captions, str(path), metadata, reason_if_outside(name))
