"""Published files: where they lie, and readers of annotations in JSON, large JSON lists, CSV and JSONL.

In JSON lists, CSV and JSONL, invalid UTF-8 bytes are read as lone surrogates (surrogateescape). `clean_captions` drops
captions that contain one. The log names the first line of a table with such bytes.
"""

import codecs
import contextlib
import csv
import io
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

from mvlm_dataloading.errors import DataError
from mvlm_dataloading.untrusted import MAX_LINE, open_regular, parse_json, read_regular

from .record import canonical_split, require_file

log = logging.getLogger(__name__)
CHUNK = 1 << 20
_BETWEEN = re.compile(r"[\s,]*")


def read_json(file: Path) -> Any:
    """Content of a JSON file. Raises DataError if the file is missing or is not JSON."""
    with read_as(file, "JSON"):
        return parse_json(read_regular(require_file(file), "annotations").removeprefix(codecs.BOM_UTF8))


def text_lines(file: Path, newline: str | None = None) -> Generator[str]:
    """Lines of a text with their ends, one in memory at a time. `newline` is as in `open`. DataError if one is huge."""
    with io.TextIOWrapper(
        open_regular(require_file(file)), encoding="utf-8-sig", errors="surrogateescape", newline=newline
    ) as text:
        while line := text.readline(MAX_LINE):
            if len(line) == MAX_LINE:
                raise DataError(f"{file}: wanted lines of less than {MAX_LINE} letters, found a longer one; restore it")
            yield line


def read_json_list(file: Path) -> Iterator[Any]:
    """Yield the elements of a JSON list one at a time. A large file does not have to fit into memory.

    Raises:
        DataError: the file is missing, is not a list, or ends early.
    """
    decoder = json.JSONDecoder()

    def damaged(what: str) -> DataError:
        return DataError(f"{file}: wanted a JSON list, found {what}; download it again")

    source = open_regular(require_file(file))
    with io.TextIOWrapper(source, encoding="utf-8-sig", errors="surrogateescape") as text:
        rest = ""
        while not rest and (more := text.read(CHUNK)):
            rest = more.lstrip()
        if not rest.startswith("["):
            raise damaged(repr(rest[:20]))
        at = 1
        while True:
            at = _BETWEEN.match(rest, at).end()  # pyright: ignore[reportOptionalMemberAccess] (the pattern matches the empty string)
            if rest.startswith("]", at):
                return
            try:
                element, end = decoder.raw_decode(rest, at)
            except (ValueError, RecursionError):
                element, end = None, len(rest)
            # An element that ends at the end of the text read, or that did not parse, may continue in the next chunk.
            if end >= len(rest):
                more = text.read(max(CHUNK, len(rest) - at)) if len(rest) - at <= 4 * MAX_LINE else ""
                if not more:
                    raise damaged(f"no end after {rest[-20:]!r}")
                rest, at = rest[at:] + more, 0
                continue
            yield element
            at = end


def read_rows(file: Path, delimiter: str | None = None, lines: bool = False) -> Iterator[dict[str, Any]]:
    """Yield the rows of a table: `.jsonl` or `.ndjson` with one object per line, else CSV or TSV with a header.

    Args:
        delimiter: what separates cells. Default: the comma (of .tsv the tab), the semicolon or the tab, whichever the
            header has most of.
        lines: one JSON object per line, whatever the name of the file.

    Raises:
        DataError: the file is missing, or a line has another format.
    """
    with open_regular(require_file(file)) as start:
        if start.read(2) in (b"\xff\xfe", b"\xfe\xff"):
            raise DataError(f"{file}: wanted a table in UTF-8, found UTF-16; save it as UTF-8")
    with contextlib.closing(text_lines(file, newline="")) as opened:
        text = _lines_of(opened, file)
        if lines or file.suffix.lower() in (".jsonl", ".ndjson"):
            for number, line in enumerate(text, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise DataError(f"{file} line {number}: wanted JSON, found {error}; repair the line") from None
                if not isinstance(row, dict):
                    raise DataError(f"{file} line {number}: wanted a JSON object, found {type(row).__name__}")
                yield row
            return
        csv.field_size_limit(1 << 24)
        line = 0
        header = next(text, "")
        text = chain([header], text)
        if delimiter is None:
            usual = "\t" if file.suffix.lower() == ".tsv" else ","
            delimiter = max((usual, ",", ";", "\t"), key=header.count)
            if delimiter != usual:
                log.info("%s: cells are separated by %r, as in the header", file, delimiter)
        try:
            # Rows may contain NUL bytes: `clean_captions` removes them. Without `strict`, a cell with a stray quote
            # would take in the rows after it.
            rows = csv.DictReader(text, delimiter=delimiter, strict=True)
            names = Counter(rows.fieldnames or ())
            if twice := [name for name, count in names.items() if count > 1]:
                raise DataError(f"{file}: wanted columns of different names, found {twice[0]!r} twice; rename one")
            for row in rows:
                if None in row:
                    raise DataError(
                        f"{file} line {rows.line_num}: wanted {len(row) - 1} cells as in the header, found more; quote "
                        f"cells that hold {delimiter!r}"
                    )
                line = rows.line_num
                yield row
        except csv.Error as error:
            raise DataError(
                f"{file} line {line + 1}: wanted a table, found {error}; a quote within a cell is written twice, in a "
                f"cell that is quoted"
            ) from None


def _lines_of(text: Iterable[str], file: Path) -> Iterator[str]:
    """Yield the lines of a table. A warning names the first line that is not UTF-8."""
    said = False
    for number, line in enumerate(text, 1):
        if not (said or line.isascii()) and re.search("[\udc80-\udcff]", line):
            log.warning(
                "%s line %d: wanted UTF-8, found other bytes, as in a table that a spreadsheet saved in Latin-1; "
                "captions with such letters are rejected: save it as CSV UTF-8",
                file, number,
            )  # fmt: skip
            said = True
        yield line


def files_under(folder: Path) -> list[Path]:
    """All files under a folder, sorted. Links to folders are followed.

    Raises:
        DataError: the folder, or one inside it, cannot be read. `lost+found` of a disk may be unreadable.
    """

    def refuse(error: OSError) -> None:
        if os.path.basename(error.filename) == "lost+found":  # of the file system: root's alone
            return
        raise DataError(
            f"{error.filename}: wanted a folder that can be read, found {error.strerror}; give yourself the right to "
            "read it, or move it away"
        )

    found: list[Path] = []
    seen: set[str] = set()
    starts = [str(folder)]
    # Links are visited last, so that a file inside the folder gets its own path, not the path through a link.
    for start in starts:
        for place, folders, names in os.walk(start, onerror=refuse):
            real = os.path.realpath(place)
            if real in seen:  # a link may point to a parent folder
                folders.clear()
                continue
            seen.add(real)
            folders.sort()
            found += [Path(place, name) for name in names]
            starts += [path for name in folders if os.path.islink(path := os.path.join(place, name))]
    return sorted(found)


def published_files(folder: Path) -> list[Path]:
    """All files under a folder as in `files_under`, but for data sets and parts that were built inside it."""
    files = files_under(folder)
    marks = [file for file in files if file.name in ("dataset.json", "plan.json") and file.parent != folder]
    built = [file.parent for file in marks if _has_recipe(file)]
    return [file for file in files if not any(map(file.is_relative_to, built))]


def _has_recipe(file: Path) -> bool:
    """True if a dataset.json describes the result of a build: its recipe is empty for tars that are used in place."""
    try:
        content = parse_json(read_regular(file, "dataset.json", within=file.parent))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and isinstance(content.get("recipe"), dict) and bool(content["recipe"])


def reason_if_outside(name: str) -> str | None:
    """Reason to reject a file name in a table that points outside the data set's folder, or None.

    A downloaded table must not be able to add other files of this machine to the data set.
    """
    path = Path(name)
    return "image is outside the folder" if path.is_absolute() or ".." in path.parts else None


def refuse_repeated_files(files: Iterable[Path]) -> None:
    """Raise DataError if a file is given twice. Its samples would be repeated, or be in two splits."""
    seen: set[Path] = set()
    for file in files:
        if (real := file.resolve()) in seen:
            raise DataError(f"{file}: wanted each file once, found it twice; name it, or its folder, once")
        seen.add(real)


def captions_in_cell(value: Any) -> list[str]:
    """Captions in a cell of a table: the cell if it is a string, or the strings of a list; none for other values."""
    if isinstance(value, str):
        return [value]
    # Nulls and objects in a list are skipped. Converted to text, a null would be the caption "None".
    return [one for one in value if isinstance(one, str)] if isinstance(value, list | tuple) else []


def several_columns(names: str | Sequence[str]) -> tuple[str, ...]:
    """Names of columns, given as one name or several."""
    return (names,) if isinstance(names, str) else tuple(names)


def captions_in_row(row: Mapping[str, Any], columns: Sequence[str]) -> list[str]:
    """Captions of a row: those of each of the columns, in their order."""
    return [caption for column in columns for caption in captions_in_cell(row.get(column))]


_COCO_FOLDERS = ("", "images", "coco", "coco/images", "mscoco", "images/mscoco/images")


def find_file(root: Path, *names: str) -> Path | None:
    """The first of the files, whose names are relative to `root`, that exists; None if none does."""
    return next((path for name in names if (path := root / name).is_file()), None)


def split_files(root: Path, splits: Mapping[str, str], *names: str) -> list[tuple[str, str, Path]]:
    """Files of a published data set's splits that exist: (published name, name in mvlm, file) of each split.

    Args:
        splits: published name -> name in mvlm.
        names: possible names of a split's file, relative to `root`, with {0} for the published name.

    Raises:
        DataError: no file is there.
    """
    known = ((part, split, find_file(root, *(name.format(part) for name in names))) for part, split in splits.items())
    found = [(part, split, file) for part, split, file in known if file is not None]
    if not found:
        require_file(root / names[0].format(next(iter(splits))))
    return found


def coco_folder(roots: Iterable[Path], name: str) -> Path:
    """Folder `name`, such as train2014, of COCO's images. DataError if it is in none of the usual places."""
    places = [root / folder / name for root in roots for folder in _COCO_FOLDERS]
    found = next((place for place in places if place.is_dir()), None)
    if found is None:
        raise DataError(f"{places[0]}: wanted the folder of COCO's images, found none; name its parent with --images")
    return found


@contextmanager
def read_as(file: Path, wanted: str) -> Iterator[None]:
    """Context that parses the content of a file. Content in another form than `wanted` becomes a DataError."""
    try:
        yield
    except DataError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError) as error:
        raise DataError(f"{file}: wanted {wanted}, found {error!r}; download it again") from None


def karpathy_images(file: Path) -> Iterator[tuple[str, list[str], dict[str, Any]]]:
    """Yield (split, captions, all fields) of each image in one of Karpathy's JSON files."""
    with read_as(file, f"Karpathy's {file.name}"):
        for image in read_json(file)["images"]:
            captions = captions_in_cell([sentence["raw"] for sentence in image["sentences"]])
            yield canonical_split(image["split"], str(file)), captions, image


COCO_CAPTIONS = "COCO captions (images, annotations)"


def coco_images(file: Path) -> Iterator[tuple[dict[str, Any], list[str], str | None]]:
    """Yield (fields, captions, licence or None) of each image in a file of captions in COCO's format."""
    with read_as(file, COCO_CAPTIONS):
        content = read_json(file)
        captions: dict[int, list[str]] = {}
        for annotation in content["annotations"]:
            captions.setdefault(annotation["image_id"], []).extend(captions_in_cell(annotation["caption"]))
        licences = {licence["id"]: licence.get("url") for licence in content.get("licenses") or ()}
        for image in content["images"]:
            yield image, captions.get(image["id"], []), licences.get(image.get("license"))
