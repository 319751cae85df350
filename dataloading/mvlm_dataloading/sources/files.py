"""Reading annotation files: JSON, large JSON lists, CSV and JSONL, with the mistakes that downloads have.

Bytes that are not UTF-8 become halves of surrogate pairs, for which `clean_captions` rejects a caption.
"""

import csv
import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from mvlm_dataloading.errors import DataError

from .record import need_file

_CHUNK = 1 << 20
_BETWEEN = re.compile(r"[\s,]*")


def read_json(file: Path) -> Any:
    """A JSON file. Raises DataError if it is none."""
    try:
        return json.loads(need_file(file).read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file}: wanted JSON, found {error}; download it again") from None


def read_json_list(file: Path) -> Iterator[Any]:
    """The elements of a JSON list one after another, so that a file of a gigabyte need not be held at once.

    Raises:
        DataError: the file is no list, or ends early.
    """
    decoder = json.JSONDecoder()

    def damaged(what: str) -> DataError:
        return DataError(f"{file}: wanted a JSON list, found {what}; download it again")

    with need_file(file).open(encoding="utf-8-sig", errors="surrogateescape") as text:
        rest = ""
        while not rest and (more := text.read(_CHUNK)):
            rest = more.lstrip()
        if not rest.startswith("["):
            raise damaged(repr(rest[:20]))
        at = 1
        while True:
            at = _BETWEEN.match(rest, at).end()  # pyright: ignore[reportOptionalMemberAccess] (it matches nothing too)
            if rest.startswith("]", at):
                return
            try:
                element, end = decoder.raw_decode(rest, at)
            except (ValueError, RecursionError):
                element, end = None, len(rest)
            # A number, or a word, at the very end of what was read may go on; so may everything that did not parse.
            if end >= len(rest):
                more = text.read(max(_CHUNK, len(rest) - at))
                if not more:
                    raise damaged(f"no end after {rest[-20:]!r}")
                rest, at = rest[at:] + more, 0
                continue
            yield element
            at = end


def read_rows(file: Path, delimiter: str | None = None) -> Iterator[dict[str, Any]]:
    """The rows of a table: `.jsonl` (or `.ndjson`) with an object a line, else CSV or TSV with a header.

    Raises:
        DataError: a line is not what it should be.
    """
    with need_file(file).open(encoding="utf-8-sig", errors="surrogateescape", newline="") as text:
        if file.suffix.lower() in (".jsonl", ".ndjson"):
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
        delimiter = delimiter or ("\t" if file.suffix.lower() == ".tsv" else ",")
        try:
            # NUL bytes are no reason to lose a table: in captions they are cleaned away.
            yield from csv.DictReader(text, delimiter=delimiter)
        except csv.Error as error:
            raise DataError(f"{file}: wanted a table, found {error}; repair it") from None


def files_under(folder: Path) -> list[Path]:
    """The files in a folder and the folders in it, sorted, also in folders that are links."""
    found: list[Path] = []
    seen: set[str] = set()
    starts = [str(folder)]
    for start in starts:  # which grows by the links: what lies in the folder itself keeps its own name
        for place, folders, names in os.walk(start):
            real = os.path.realpath(place)
            if real in seen:  # a link may lead back to where it lies
                folders.clear()
                continue
            seen.add(real)
            folders.sort()
            found += [Path(place, name) for name in names]
            starts += [path for name in folders if os.path.islink(path := os.path.join(place, name))]
    return sorted(found)


def outside(name: str) -> str | None:
    """Why a file that a table names is not read; None if it lies in the table's folder.

    A table from elsewhere must not make us read files of this machine that are no part of the data set.
    """
    path = Path(name)
    return "image is outside the folder" if path.is_absolute() or ".." in path.parts else None


def refuse_repeated(files: Iterable[Path]) -> None:
    """Raises DataError if a file is given twice: an epoch would have its samples twice, or two splits would."""
    seen: set[Path] = set()
    for file in files:
        if (real := file.resolve()) in seen:
            raise DataError(f"{file}: wanted each file once, found it twice; name it, or its folder, once")
        seen.add(real)


def as_captions(value: Any) -> list[str]:
    """The captions in a cell of a table: a text, or the texts in a list."""
    if isinstance(value, str):
        return [value]
    # A null or an object among them is no caption: nobody means "None".
    return [one for one in value if isinstance(one, str)] if isinstance(value, list | tuple) else []
