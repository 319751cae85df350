"""Flickr30k, with captions from Karpathy's JSON, the original token file, or the tables of mirrors."""

import json
import re
from collections.abc import Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from mvlm_dataloading.errors import DataError

from .files import captions_in_cell, karpathy_images, read_as, read_rows, reason_if_outside, text_lines
from .record import (
    Record,
    Source,
    canonical_split,
    published,
    require_file,
    require_folder,
    require_one_of,
    safe_key,
    source,
)

Row = tuple[str, Any, list[str]]
"""An image of an annotation file: split, file name, and captions."""

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
    """
    images = image_folder(root)
    if captions is None:
        captions = require_one_of(*(folder / name for name in _FILES for folder in (root, images, images.parent)))
    require_file(captions)
    if captions.suffix == ".json":
        with read_as(captions, "Karpathy's dataset_flickr30k.json"):
            rows = [(split, image["filename"], texts) for split, texts, image in karpathy_images(captions)]
    elif captions.suffix == ".token":
        rows = _by_image(_token_lines(captions))
    elif _header(captions).startswith("raw,"):
        rows = _annotations(captions)
    else:
        rows = _by_image(_table_lines(captions))
    records: dict[str, list[Record]] = {}
    for split, name, texts in rows:
        path, fault = images / str(name), reason_if_outside(str(name))
        metadata = {"image_id": f"flickr {path.stem}"}
        records.setdefault(split, []).append(Record(safe_key(path.stem), path, texts, str(path), metadata, fault))
    return published(
        "flickr30k",
        records,
        [captions],
        origin="Flickr30k, https://shannon.cs.illinois.edu/DenotationGraph",
        licence="images for non-commercial research and education, under the terms of Flickr",
        attribution="Young, Lai, Hodosh and Hockenmaier, 2014",
    )


def image_folder(root: Path) -> Path:
    """Folder of the images: the first that exists of the usual names below `root`, else `root`.

    Raises DataError if there is no such folder.
    """
    images = require_folder(*(root / name for name in _IMAGES), root)
    # One mirror's archive has the folder inside another of the same name.
    return images / images.name if (images / images.name).is_dir() else images


def _header(file: Path) -> str:
    with closing(text_lines(file)) as lines:
        return next(lines, "")


def _annotations(file: Path) -> list[Row]:
    """Rows of a table with the columns `raw` (a JSON list of captions), `split` and `filename`."""
    with read_as(file, "columns raw, split and filename"):
        return [
            (canonical_split(row["split"], str(file)), row["filename"], captions_in_cell(json.loads(row["raw"])))
            for row in read_rows(file)
        ]


def _by_image(lines: Iterable[tuple[str, str]]) -> list[Row]:
    """Group pairs (image, caption) by image. The rows have the split train, as the files state none."""
    captions: dict[str, list[str]] = {}
    for name, caption in lines:
        captions.setdefault(name, []).append(caption)
    return [("train", name, known) for name, known in captions.items()]


def _lines(file: Path, pattern: str, wanted: str, header: int = 0) -> Iterator[tuple[str, str]]:
    """Yield the groups `image` and `caption` of a regular expression for each line that is not empty.

    Args:
        pattern: matches a whole line, else DataError.
        wanted: form of a line in words, for messages.
        header: number of lines at the beginning to pass over.
    """
    for number, line in enumerate(text_lines(file), 1):
        line = line.rstrip("\n")
        if number > header and line.strip():
            match = re.fullmatch(pattern, line, re.DOTALL)
            if match is None:
                raise DataError(f"{file} line {number}: wanted {wanted}, found {line[:60]!r}")
            yield match["image"], match["caption"]


def _token_lines(file: Path) -> Iterator[tuple[str, str]]:
    """Pairs (image, caption) from lines `1000092795.jpg#0<tab>caption`."""
    return _lines(file, r"(?P<image>[^#\t]*)[^\t]*\t(?P<caption>.*)", "NAME#NUMBER, a tab and a caption")


def _table_lines(file: Path) -> Iterator[tuple[str, str]]:
    """Pairs (image, caption) from lines `name| number| caption` below a header. One published row lacks a bar.

    A table with commas is a CSV file, whose first cell is the name and whose last is the caption.
    """
    if "|" not in _header(file):
        cells = (list(row.values()) for row in read_rows(file, delimiter=","))
        return ((str(row[0]).strip(), str(row[-1] or "").strip()) for row in cells)
    pattern = r"\s*(?P<image>[^|]+?)\s*[|]\s*(?:\d+\s*[|]?\s+|\d+\s*[|]\s*)?(?P<caption>.*?)\s*"
    return _lines(file, pattern, "NAME| NUMBER| caption", header=1)
