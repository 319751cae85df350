"""A folder of images, with captions in a table, in COCO's JSON or in one text file per image."""

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mvlm_dataloading.captions import decode_text
from mvlm_dataloading.errors import DataError
from mvlm_dataloading.untrusted import LIMITS, read_regular

from .files import (
    COCO_CAPTIONS,
    captions_in_row,
    coco_images,
    published_files,
    read_as,
    read_rows,
    reason_if_outside,
    several_columns,
)
from .record import (
    Record,
    Source,
    canonical_split,
    check_shares,
    cut_into_pieces,
    file_sha256,
    is_evaluation,
    require_folder,
    safe_key,
    source,
    split_by_hash,
    split_in_name,
)

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp")
LISTED = (*IMAGE_EXTENSIONS, ".avif", ".bmp", ".gif", ".heic", ".jfif", ".tif", ".tiff")
"""File name extensions of images. Those of formats that cannot be used are rejected with a reason, not passed over."""
TABLES = (".csv", ".tsv", ".jsonl", ".ndjson")


@source
def folder(
    images: Path,
    /,
    captions: Path | None = None,
    *,
    image_column: str = "image",
    caption_column: tuple[str, ...] = ("caption",),
    split_column: str | None = None,
    validation: float = 0.0,
    test: float = 0.0,
    licence: str = "",
    name: str = "folder",
) -> Source:
    """A folder of images, with captions in a table, in COCO's JSON or in one text file per image.

    Images of other formats than JPEG, PNG and WebP are rejected when it is built. An image's split is that of the
    table. Without one, the images of a folder directly in it that is named as an evaluation split, such as val2017 or
    test_images, are of that split. Data sets that were built inside the folder are left out.

    Args:
        images: Folder of images, subfolders included.
        captions: Table of captions: .csv, .tsv or .jsonl; or a .json in COCO's format. Default: the captions of a/b.jpg
            are the lines of a/b.txt.
        image_column: Column of file names, relative to the folder.
        caption_column: Columns of captions. Several columns, and several rows of an image, are several captions, and a
            cell of a .jsonl may hold a list.
        split_column: Column of splits, which comes before the folders' names. Default: split, or Split, if it is there.
        validation: Share of the other images for validation, chosen by a hash of the name. 1.0 takes all.
        test: Share of the other images for test, chosen by a hash of the name. 1.0 takes all.
        licence: Licence to state in dataset.json.
        name: Name to state in dataset.json.

    Raises:
        DataError: the table lacks a column, or a split has an unknown name.
    """
    check_shares(validation, test)
    require_folder(images)
    recipe: dict[str, Any] = {"validation": validation, "test": test}
    if captions is None:
        found = _sidecars(images)
    elif captions.suffix.lower() == ".json":
        if (image_column, several_columns(caption_column), split_column) != ("image", ("caption",), None):
            raise DataError(f"{captions}: wanted a table for the names of columns, found a .json; leave them out")
        found = _coco(images, captions)
        recipe["captions"] = [file_sha256(captions)]
    else:
        columns = several_columns(caption_column)
        found = _table(images, captions, image_column, columns, split_column)
        recipe["captions"] = [file_sha256(captions)]
        recipe["columns"] = [image_column, *columns, split_column or "split"]
    stems = Counter(record.key for record, _ in found)
    records: dict[str, list[Record]] = {}
    for record, split in found:
        split = split or split_of_image(images, record.where, validation, test)
        own = record if stems[record.key] == 1 else replace(record, key=safe_key(record.where))
        records.setdefault(split, []).append(own)
    return Source(name=name, origin=str(images.name), licence=licence, recipe=recipe, pieces=cut_into_pieces(records))


def split_of_image(images: Path, name: str, validation: float, test: float) -> str:
    """Split of an image for which no table states one: by the name of its folder, else by a hash of its own name.

    validation, test: shares of the images for these splits.
    """
    # Of the stem, so that a.jpg and a.png stay together.
    return _split_of_folder(images, name) or split_by_hash(_key(name), validation, test)


def _split_of_folder(images: Path, name: str) -> str | None:
    """The evaluation split that the first folder of an image's name is named as, such as val2017 or test_images.

    A folder named train states none: its images can be divided by shares, and may be photographs of trains. Nor does a
    name with other words, such as that of an album.
    """
    first, *rest = Path(name).parts or ("",)
    named = re.fullmatch(r"([a-z]+?)[a-c]?\d*(?:[_-](?:images|imgs|photos|pictures))?", first.lower()) if rest else None
    if named is None or split_in_name(named[1]) != named[1]:
        return None
    split = canonical_split(named[1], str(images / first))
    return split if is_evaluation(split) else None


def _sidecars(images: Path) -> list[tuple[Record, str | None]]:
    # `published_files` sorts, so the order does not depend on the file system.
    paths = [path for path in published_files(images) if path.suffix.lower() in LISTED]
    return [(_with_text_file(images, path), None) for path in paths]


def _with_text_file(images: Path, path: Path) -> Record:
    name = str(path.relative_to(images))
    texts = [path.with_suffix(suffix) for suffix in (".txt", ".TXT")]
    text = next((text for text in texts if text.is_file()), None)
    captions, fault = [], None
    if text is not None:
        if text.stat().st_size > LIMITS["caption"]:
            fault = "caption is too long"
        else:
            content = decode_text(read_regular(text, "caption", within=images))
            captions, fault = (content.split("\n"), None) if content is not None else ([], "caption is not UTF-8")
    return _record(images, name, captions, fault)


def _table(
    images: Path, file: Path, image_column: str, caption_columns: Sequence[str], split_column: str | None
) -> list[tuple[Record, str | None]]:
    captions: dict[str, list[str]] = {}
    splits: dict[str, str | None] = {}
    columns = {"image": image_column, "caption": caption_columns}
    for name, row, split in table_rows(images, file, columns, split_column):
        captions.setdefault(name, []).extend(captions_in_row(row, caption_columns))
        splits[name] = split or splits.get(name)
    return [(_record(images, name, known, reason_if_outside(name)), splits[name]) for name, known in captions.items()]


def _coco(images: Path, file: Path) -> list[tuple[Record, str | None]]:
    captions: dict[str, list[str]] = {}
    with read_as(file, COCO_CAPTIONS):
        for image, texts, _ in coco_images(file):
            captions.setdefault(_name_here(images, image["file_name"]), []).extend(texts)
    return [(_record(images, name, known, reason_if_outside(name)), None) for name, known in captions.items()]


def table_rows(
    images: Path, file: Path, columns: Mapping[str, str | Sequence[str]], split_column: str | None = None
) -> Iterator[tuple[str, dict[str, Any], str | None]]:
    """Yield (name of the image relative to the folder, row, split or None) of each row of a table.

    Args:
        columns: Names of the columns that are read, one or several, keyed by what they hold. `image`, a single name,
            comes first. Rows of a .jsonl may lack the others.
        split_column: Column of splits. Default: split, or Split, if it is there.

    Raises:
        DataError: the file is no table, it lacks a column, or an image has two splits.
    """
    if file.suffix.lower() not in TABLES:
        raise DataError(f"{file}: wanted a table with the ending {', '.join(TABLES)}, found {file.suffix or 'none'}")
    splits: dict[str, str] = {}
    known: set[str] = set()
    wanted = [name for names in columns.values() for name in several_columns(names)]
    for row in read_rows(file):
        known |= row.keys()  # a row of JSON may leave out what is null
        missing = [name for name in wanted if name not in known]
        if missing or wanted[0] not in row:
            raise DataError(
                f"{file}: wanted a column named {[*missing, wanted[0]][0]}, found {', '.join(map(str, row))}; "
                f"name the columns with {' and '.join(f'--{flag}-column' for flag in columns)}"
            )
        name = _name_here(images, str(row[wanted[0]]))
        split = row.get(split_column) if split_column else next((row[c] for c in row if c.lower() == "split"), None)
        found = canonical_split(str(split), str(file)) if split else None
        if found and splits.setdefault(name, found) != found:
            raise DataError(f"{file}: wanted one split for {name}, found {splits[name]} and {found}; correct the table")
        yield name, row, found
    if split_column and known and split_column not in known:
        raise DataError(
            f"{file}: wanted a column named {split_column}, found {', '.join(sorted(known))}; name it with "
            f"--split-column"
        )


def _name_here(images: Path, name: str) -> str:
    """Name of an image file in a table, relative to the folder and in one spelling: a.jpg for ./a.jpg."""
    path = Path(os.path.normpath(name))
    if path.is_absolute() and path.is_relative_to(images.absolute()):
        path = path.relative_to(images.absolute())
    found = str(path)
    # Of another system: backslashes, and letters whose accents are signs of their own.
    others = [found.replace("\\", "/"), *(unicodedata.normalize(form, found) for form in ("NFC", "NFD"))]
    others = [os.path.normpath(other) for other in others if other != found]
    return next((name for name in (found, *others) if (images / name).is_file()), found) if others else found


def _record(images: Path, name: str, captions: list[str], fault: str | None) -> Record:
    return Record(_key(name), images / name, captions, name, {"file": name}, fault)


def _key(name: str) -> str:
    """Key of an image: its name without the extension."""
    return safe_key(name if Path(name).suffix.lower() not in IMAGE_EXTENSIONS else name[: -len(Path(name).suffix)])
