"""A folder of pictures, with captions in a table or in a text file beside each."""

from pathlib import Path
from typing import Any

from mvlm_dataloading.captions import decode_text
from mvlm_dataloading.errors import DataError

from .files import as_captions, files_under, outside, read_rows
from .record import Record, Source, cut, file_sha256, hash_split, need_folder, safe_key, split_name

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp")
_MAX_TEXT = 1 << 22


def folder(
    images: Path,
    captions: Path | None = None,
    *,
    image_column: str = "image",
    caption_column: str = "caption",
    split_column: str = "split",
    validation: float = 0.0,
    test: float = 0.0,
    licence: str = "",
    name: str = "folder",
) -> Source:
    """Pictures (jpg, jpeg, png, webp, in any case) in a folder and the folders in it.

    Args:
        captions: a table, `.csv`, `.tsv` or `.jsonl`, whose image column names a file relative to the folder; rows of
            the same image are its captions, and a cell of a `.jsonl` may hold a list. Not given: the captions of
            `a/b.jpg` are the lines of `a/b.txt`.
        split_column: where the table has it, its splits are taken.
        validation, test: shares of the pictures, chosen by a hash of the name, where no split is given.

    Raises:
        DataError: the folder or the table is missing, or the table has not these columns.
    """
    if not 0 <= validation + test < 1 or min(validation, test) < 0:
        raise DataError(f"validation and test: wanted shares that leave some for train, got {validation} and {test}")
    need_folder(images)
    recipe: dict[str, Any] = {"validation": validation, "test": test}
    if captions is None:
        found = _sidecars(images)
    else:
        found = _table(images, captions, image_column, caption_column, split_column)
        recipe["captions"] = [file_sha256(captions)]
        recipe["columns"] = [image_column, caption_column, split_column]
    records: dict[str, list[Record]] = {}
    for record, split in found:
        records.setdefault(split or hash_split(record.key, validation, test), []).append(record)
    return Source(name=name, origin=str(images.name), licence=licence, recipe=recipe, pieces=cut(records))


def _sidecars(images: Path) -> list[tuple[Record, str | None]]:
    # Sorted by the name inside the folder: the order must not depend on the file system.
    paths = [path for path in files_under(images) if path.suffix.lower() in EXTENSIONS]
    return [(_beside(images, path), None) for path in paths]


def _beside(images: Path, path: Path) -> Record:
    name = str(path.relative_to(images))
    texts = [path.with_suffix(suffix) for suffix in (".txt", ".TXT")]
    text = next((text for text in texts if text.is_file()), None)
    captions, fault = [], None
    if text is not None:
        if text.stat().st_size > _MAX_TEXT:
            fault = "caption is too long"
        else:
            content = decode_text(text.read_bytes())
            captions, fault = (content.split("\n"), None) if content is not None else ([], "caption is not UTF-8")
    return _record(images, name, captions, fault)


def _table(
    images: Path, file: Path, image_column: str, caption_column: str, split_column: str
) -> list[tuple[Record, str | None]]:
    captions: dict[str, list[str]] = {}
    splits: dict[str, str | None] = {}
    for row in read_rows(file):
        missing = [name for name in (image_column, caption_column) if name not in row]
        if missing:
            raise DataError(
                f"{file}: wanted a column named {missing[0]}, found {', '.join(map(str, row))}; name the columns with "
                f"--image-column and --caption-column"
            )
        name = str(row[image_column])
        captions.setdefault(name, []).extend(as_captions(row[caption_column]))
        if row.get(split_column):
            splits[name] = split_name(str(row[split_column]), str(file))
    return [(_record(images, name, known, outside(name)), splits.get(name)) for name, known in captions.items()]


def _record(images: Path, name: str, captions: list[str], fault: str | None) -> Record:
    key = safe_key(name if Path(name).suffix.lower() not in EXTENSIONS else name[: -len(Path(name).suffix)])
    return Record(key, images / name, captions, name, {"file": name}, fault)
