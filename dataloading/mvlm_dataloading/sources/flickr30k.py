"""Flickr30k, with captions from Karpathy's JSON, the original token file, or the tables of mirrors."""

import json
import re
from pathlib import Path
from typing import Any

from mvlm_dataloading.errors import DataError

from .files import captions_in_cell, read_json, read_rows, reason_if_outside
from .record import (
    Record,
    Source,
    canonical_split,
    cut_into_pieces,
    file_sha256,
    require_file,
    require_folder,
    safe_key,
    source,
)

_IMAGES = ("flickr30k-images", "flickr30k_images", "images", "Images")
_FILES = ("dataset_flickr30k.json", "flickr_annotations_30k.csv", "results_20130124.token", "results.csv")


@source
def flickr30k(root: Path, /, captions: Path | None = None) -> Source:
    """Flickr30k, with its images in ROOT/flickr30k-images or ROOT/images.

    Args:
        root: Unpacked download with flickr30k-images.
        captions: dataset_flickr30k.json (Karpathy's splits), flickr_annotations_30k.csv (the same as a table),
            results_20130124.token or results.csv (both without splits: everything becomes train). Default: the first
            of them in ROOT.

    Raises:
        DataError: a file or folder is missing, or has another format.
    """
    images = image_folder(root)
    if captions is None:
        places = [folder / name for name in _FILES for folder in (root, images, images.parent)]
        captions = next((place for place in places if place.is_file()), root / _FILES[0])
    require_file(captions)
    if captions.suffix == ".json":
        records = _karpathy(images, captions)
    elif captions.suffix == ".token":
        records = {"train": _records(images, _token_lines(captions))}
    elif _header(captions).startswith("raw,"):
        records = _annotations(images, captions)
    else:
        records = {"train": _records(images, _table_lines(captions))}
    return Source(
        name="flickr30k",
        origin="Flickr30k, https://shannon.cs.illinois.edu/DenotationGraph",
        licence="images for non-commercial research and education, under the terms of Flickr",
        attribution="Young, Lai, Hodosh and Hockenmaier, 2014",
        recipe={"annotations": [file_sha256(captions)]},
        pieces=cut_into_pieces(records),
    )


def image_folder(root: Path) -> Path:
    """Folder of the images below `root`, or `root` itself. DataError if it is no folder."""
    images = require_folder(*(root / name for name in _IMAGES), root)
    # One mirror's archive has the folder inside another of the same name.
    return images / images.name if (images / images.name).is_dir() else images


def _header(file: Path) -> str:
    with file.open(encoding="utf-8-sig", errors="surrogateescape") as text:
        return text.readline(1000)


def _karpathy(images: Path, file: Path) -> dict[str, list[Record]]:
    records: dict[str, list[Record]] = {}
    try:
        for image in read_json(file)["images"]:
            captions = captions_in_cell([sentence["raw"] for sentence in image["sentences"]])
            records.setdefault(canonical_split(image["split"], str(file)), []).append(
                _record(images, image["filename"], captions)
            )
    except (KeyError, TypeError) as error:
        raise DataError(
            f"{file}: wanted Karpathy's dataset_flickr30k.json, found {error!r}; download it again"
        ) from None
    return records


def _annotations(images: Path, file: Path) -> dict[str, list[Record]]:
    """Records of a table with the columns `raw` (a JSON list of captions), `split` and `filename`."""
    records: dict[str, list[Record]] = {}
    for row in read_rows(file):
        try:
            captions = captions_in_cell(json.loads(row["raw"]))
            split = canonical_split(row["split"], str(file))
            records.setdefault(split, []).append(_record(images, row["filename"], captions))
        except (KeyError, TypeError, json.JSONDecodeError, RecursionError) as error:
            raise DataError(
                f"{file}: wanted columns raw, split and filename, found {error!r}; download it again"
            ) from None
    return records


def _token_lines(file: Path) -> list[tuple[str, str]]:
    """Pairs (image, caption) from lines `1000092795.jpg#0<tab>caption`."""
    found = []
    for number, line in enumerate(file.read_text(encoding="utf-8-sig", errors="surrogateescape").split("\n"), 1):
        if not line.strip():
            continue
        name, tab, caption = line.partition("\t")
        if not tab:
            raise DataError(f"{file} line {number}: wanted NAME#NUMBER, a tab and a caption, found {line[:60]!r}")
        found.append((name.partition("#")[0], caption))
    return found


def _table_lines(file: Path) -> list[tuple[str, str]]:
    """Pairs (image, caption) from lines `name| number| caption` below a header. One published row lacks a bar.

    A table with commas is a CSV file, whose first cell is the name and whose last is the caption.
    """
    if "|" not in _header(file):
        cells = [list(row.values()) for row in read_rows(file, delimiter=",")]
        return [(str(row[0]).strip(), str(row[-1] or "").strip()) for row in cells]
    found = []
    for number, line in enumerate(file.read_text(encoding="utf-8-sig", errors="surrogateescape").split("\n")[1:], 2):
        if not line.strip():
            continue
        match = re.fullmatch(r"\s*([^|]+?)\s*[|]\s*(?:(\d+)\s*[|]?\s+|(\d+)\s*[|]\s*)?(.*?)\s*", line)
        if match is None:
            raise DataError(f"{file} line {number}: wanted NAME| NUMBER| caption, found {line[:60]!r}")
        found.append((match[1], match[4]))
    return found


def _records(images: Path, lines: list[tuple[str, str]]) -> list[Record]:
    captions: dict[str, list[str]] = {}
    for name, caption in lines:
        captions.setdefault(name, []).append(caption)
    return [_record(images, name, known) for name, known in captions.items()]


def _record(images: Path, name: Any, captions: list[str]) -> Record:
    path = images / str(name)
    metadata = {"image_id": f"flickr {path.stem}"}
    return Record(safe_key(path.stem), path, captions, str(path), metadata, reason_if_outside(str(name)))
