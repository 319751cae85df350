"""URLs of a link written out: numbers and words in braces, wildcards, and lists in files."""

import fnmatch
import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from mvlm_dataloading.errors import DataError
from mvlm_dataloading.untrusted import regular_lines
from mvlm_dataloading.urls import is_remote, normal_url, without_credentials

from .store import RangeStore

MOST = 1_000_000
"""Most files of a link."""
LINKED = (".tar", ".parquet")
"""Ends of the names of files that can be linked."""
PACKED = (".gz", ".tgz", ".bz2", ".xz", ".zst")
_BRACES = re.compile(r"\{([^{}]*)\}")
_NUMBERS = re.compile(r"(\d{1,12})\.\.(\d{1,12})")
_WILD = re.compile(r"[*?\[]")


def expand(given: Sequence[str]) -> list[str]:
    """All files that are given, in order: URLs without credentials, which this process keeps, and absolute paths.

    `{00000..01242}` stands for numbers, `{train,val}` for words; `*`, `?` and `[...]` match names in one folder. A
    path that ends in .txt is a file with a URL in each line. A data set of the hub, or a folder of it, stands for all
    tars and Parquet files below it, at the commit that it has now.

    Raises:
        DataError: a file is given twice, a wildcard matches nothing or is on the web, or there are too many.
    """
    found = list(itertools.islice((one for text in given for one in _expand(text)), MOST + 1))
    if len(found) > MOST:
        raise DataError(f"urls: wanted at most {MOST} files, found more; link them in several data sets")
    seen: set[str] = set()
    for one in found:
        if one in seen:
            raise DataError(f"{one}: wanted each file once, found it twice; leave one out")
        seen.add(one)
    if not found:
        raise DataError("urls: wanted at least one tar or Parquet file, found none; name them")
    return found


def _expand(text: str) -> Iterator[str]:
    if is_remote(text) or not text.endswith(".txt"):
        yield from _expand_one(text)
        return
    try:
        for line in regular_lines(Path(text), "annotations"):
            if (word := line.decode(errors="surrogateescape").strip()) and not word.startswith("#"):
                yield from _expand_one(word)
    except OSError as error:
        raise DataError(f"{text}: wanted a file with a URL in each line, found none ({error.strerror})") from None


def _expand_one(text: str) -> Iterator[str]:
    for word in _braces(text):
        if not is_remote(word):
            yield from _local(word)
        elif _WILD.search(word.partition("?")[0] if word.startswith("http") else word):
            yield from _listed(word)
        elif word.startswith("hf://") and not word.endswith(LINKED + PACKED):
            yield from _below(word)
        else:
            yield normal_url(word)


def _braces(text: str) -> Iterator[str]:
    found = _BRACES.search(text)
    if found is None:
        yield text
        return
    if numbers := _NUMBERS.fullmatch(found[1]):
        first, last, width = int(numbers[1]), int(numbers[2]), len(numbers[1])
        words = (f"{number:0{width}d}" for number in range(first, last + 1))
    else:
        words = iter(found[1].split(","))
    for word in words:
        yield from (f"{text[: found.start()]}{word}{rest}" for rest in _braces(text[found.end() :]))


def _local(word: str) -> Iterator[str]:
    path = Path(word)
    if not _WILD.search(path.name) or path.exists():
        yield str(path.absolute())
        return
    names = sorted(one.name for one in path.parent.glob("*") if fnmatch.fnmatchcase(one.name, path.name))
    if not names:
        raise DataError(f"{word}: wanted files that match, found none; check the folder")
    yield from (str((path.parent / name).absolute()) for name in names)


def _listed(word: str) -> Iterator[str]:
    folder, _, pattern = word.rpartition("/")
    if _WILD.search(folder):
        raise DataError(f"{without_credentials(word)}: wanted a wildcard in its last part alone; name the folder")
    store = RangeStore(1)
    try:
        place = store.pinned(folder)
        names = [name for name in store.names(place, MOST) if "/" not in name and fnmatch.fnmatchcase(name, pattern)]
    finally:
        store.close()
    if not names:
        raise DataError(f"{word}: wanted files that match, found none; check the URL")
    yield from (f"{place}/{name}" for name in names)


def _below(word: str) -> Iterator[str]:
    store = RangeStore(1)
    try:
        place = store.pinned(word)
        names = [name for name in store.names(place, MOST) if name.endswith(LINKED)]
    finally:
        store.close()
    if not names:
        raise DataError(
            f"{word}: wanted tars or Parquet files, found none below it; name the hub's own Parquet files, as in "
            "hf://datasets/OWNER/NAME@~parquet"
        )
    yield from (f"{place}/{name}" for name in names)
