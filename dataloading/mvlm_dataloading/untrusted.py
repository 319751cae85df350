"""Safe opening of files that may come from others: regular files, within their folder and within limits of size.

A path that a user names may be a link to anywhere. A file that is found in a folder, or that a table names, has to lie
in that folder once all links are resolved; `--follow-links` of any command lifts this. Only regular files are opened,
and never waited for. Bytes are bounded before they are read, and JSON is checked before it is used.
"""

import contextlib
import json
import math
import os
import re
import stat
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any, NoReturn

from .errors import DataError, need

FOLLOW_LINKS = "MVLM_FOLLOW_LINKS"
"""Environment variable that lets links leave their folder. `--follow-links` sets it, for child processes too."""
_MIB = 1 << 20
LIMITS = {
    "settings": 4 * _MIB,  # config.json, model.json, embedding.json, dataset parts' plan.json, tokenizer_config.json
    "manifest": 16 * _MIB,
    "state": 64 * _MIB,
    "figures": 64 * _MIB,  # eval/*.json, result.json of a trial
    "metrics": 4096 * _MIB,  # metrics.jsonl and history.jsonl, read a line at a time
    "tokenizer": 64 * _MIB,
    "dataset.json": 64 * _MIB,
    "index": 4096 * _MIB,  # X.idx, text
    "caption": 4 * _MIB,  # the .txt or .json beside an image
    "study": _MIB,
    "annotations": 2048 * _MIB,  # published tables that are parsed whole
    "predictions": 2048 * _MIB,
    "footer": 64 * _MIB,  # of a Parquet file
}
"""Most bytes of each kind of file. SECURITY.md has the table."""
MAX_LINE = 16 * _MIB
"""Most bytes of a line of a table or of JSON lines."""
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
_HALF_OF_A_CHARACTER = re.compile(rb"\\u[dD][89a-fA-F]")
"""Escape of a UTF-16 surrogate in the text of a JSON document."""
_followed: set[str] = set()


def follows_links() -> bool:
    """True if the user has asked to follow links out of their folders."""
    return os.environ.get(FOLLOW_LINKS, "") not in ("", "0")


def followed_links() -> int:
    """Number of links out of their folders that this process has followed."""
    return len(_followed)


def resolve_inside(path: Path, folder: Path) -> Path:
    """The absolute place of `path`, with all links resolved, which has to lie in `folder`. Neither has to exist.

    Files of a snapshot in the cache of the Hugging Face hub are links into ../../blobs, which belong to it.

    Raises:
        DataError: a link leads out of the folder, and the user has not asked to follow such links.
    """
    real, root = os.path.realpath(path), os.path.realpath(folder)
    inside = real == root or real.startswith(root.rstrip("/") + "/")
    above, name = os.path.split(os.path.dirname(root))
    if not inside and not (name == "snapshots" and os.path.dirname(real) == os.path.join(above, "blobs")):
        if not follows_links():
            raise DataError(
                f"{path}: wanted a file in {folder}, found that it leads elsewhere; give --follow-links if this link "
                "is yours"
            )
        _followed.add(os.path.abspath(path))
    return Path(real)


def check_links(folder: Path) -> None:
    """Check that no link in a folder, at any depth, leads out of it. Folders that links lead to are not entered.

    Raises:
        DataError: a link leads out of the folder, and the user has not asked to follow such links.
    """
    left = [os.fspath(folder)]
    while left:
        with contextlib.suppress(PermissionError), os.scandir(left.pop()) as entries:
            for entry in entries:  # their kind is known without another question to the disk
                if entry.is_symlink():
                    resolve_inside(Path(entry.path), folder)
                elif entry.is_dir(follow_symlinks=False):
                    left.append(entry.path)


def irregular(status: os.stat_result) -> str | None:
    """Kind of a file that is not regular, in words, by its status; None for a regular file."""
    return None if stat.S_ISREG(status.st_mode) else _KINDS.get(stat.S_IFMT(status.st_mode), "something else")


def require_regular(path: Path, status: os.stat_result) -> None:
    """Raise DataError if a path, whose status is given, is a folder, pipe, socket or device."""
    if found := irregular(status):
        raise DataError(f"{path}: wanted a file, found {found}; put the file there, or remove what is there")


def open_regular(path: Path, *, within: Path | None = None) -> BufferedReader:
    """Open a regular file for reading, at once. Opening a pipe would wait for ever, opening a device may act on it.

    Args:
        within: folder that the file has to lie in, once links are resolved. Default: the user has named the file.

    Raises:
        DataError: it is no regular file, or a link leads out of the folder.
        OSError: it is missing or cannot be read.
    """
    real = path if within is None else resolve_inside(path, within)
    require_regular(path, os.stat(real))
    # It may have been replaced since; O_NONBLOCK changes nothing for a regular file.
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (0 if within is None else os.O_NOFOLLOW)
    descriptor = os.open(real, flags)
    try:
        require_regular(path, os.fstat(descriptor))
    except BaseException:
        os.close(descriptor)
        raise
    return os.fdopen(descriptor, "rb")


def read_regular(path: Path, limit: str | int, *, within: Path | None = None) -> bytes:
    """Content of a regular file. One that grows while it is read is refused at its limit.

    Args:
        limit: most bytes, or a kind of `LIMITS`.

    Raises:
        DataError: as `open_regular`, or the file has more bytes than its kind may have.
        OSError: as `open_regular`.
    """
    most = LIMITS[limit] if isinstance(limit, str) else limit
    with open_regular(path, within=within) as file:
        size = os.fstat(file.fileno()).st_size
        content = b"" if size > most else file.read(most + 1)
    if size > most or len(content) > most:
        raise DataError(f"{path}: wanted at most {most} bytes, found {max(size, len(content))}; restore it")
    return content


def regular_lines(path: Path, kind: str, *, within: Path | None = None) -> Iterator[bytes]:
    """Lines of a regular file of a kind of `LIMITS`, without their ends, one in memory at a time.

    Raises:
        DataError: as `read_regular`, or a line has more than `MAX_LINE` bytes.
        OSError: as `open_regular`.
    """
    most = LIMITS[kind]
    with open_regular(path, within=within) as file:
        if (size := os.fstat(file.fileno()).st_size) > most:
            raise DataError(f"{path}: wanted at most {most} bytes, found {size}; restore it")
        while line := file.readline(MAX_LINE + 1):
            if len(line) > MAX_LINE:
                raise DataError(f"{path}: wanted lines of at most {MAX_LINE} bytes, found a longer one; restore it")
            yield line.rstrip(b"\r\n")


def parse_json(text: str | bytes, *, half_characters: bool = False) -> Any:
    """Parse a JSON document whose numbers have to be finite and whose texts have to be Unicode.

    ValueError, with a reason of a few words, for others. half_characters: let lone UTF-16 surrogates pass.
    """
    try:
        value = json.loads(text, parse_constant=_refuse, parse_float=_finite)
        if not half_characters and _HALF_OF_A_CHARACTER.search(
            text if isinstance(text, bytes) else text.encode(errors="surrogateescape")
        ):
            json.dumps(value, ensure_ascii=False).encode()  # of two halves that belong together, json makes one
        return value
    except UnicodeEncodeError:
        raise ValueError("half of a character (a lone UTF-16 surrogate)") from None
    except UnicodeDecodeError:
        raise ValueError("bytes that are not UTF-8") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"no JSON ({error.msg} in line {error.lineno})") from None
    except RecursionError:
        raise ValueError("lists in lists beyond all measure") from None
    except ValueError as error:
        raise ValueError(str(error).split(" for integer")[0]) from None  # of a number of too many digits


def _refuse(number: str) -> NoReturn:
    raise ValueError(f"the number {number}")


def _finite(number: str) -> float:
    return value if math.isfinite(value := float(number)) else _refuse(number[:20])


def read_json(path: Path, kind: str, wanted: str, *, within: Path | None = None) -> Any:
    """The value of a JSON file of a kind of `LIMITS`. `wanted` is the noun phrase for it in the error.

    Raises:
        DataError: as `read_regular`, or the content is no JSON.
        OSError: as `open_regular`.
    """
    try:
        return parse_json(read_regular(path, kind, within=within))
    except DataError:
        raise
    except ValueError as error:
        raise DataError(f"{path}: wanted {wanted}, found {error}; restore the file") from None


def open_parquet(path: Path, *, within: Path | None = None) -> Any:
    """Open a Parquet file, a `pyarrow.parquet.ParquetFile`, whose footer is of a size that the file can have.

    pyarrow takes the memory of the footer that a file states, up to 4 GB.

    Raises:
        DataError: as `open_regular`, or the file has not the ends of a Parquet file, or a footer beyond its limit.
        OSError: as `open_regular`; pyarrow's own errors, which are some of ValueError, for other damage.
    """
    with open_regular(path, within=within) as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(4)
        file.seek(max(0, size - 8))
        end = file.read(8)
    footer = int.from_bytes(end[:4], "little")
    if start != b"PAR1" or end[4:] != b"PAR1" or not 0 < footer <= size - 12:
        raise DataError(f"{path}: wanted a Parquet file, found another or a part of one; make it again")
    if footer > LIMITS["footer"]:
        raise DataError(f"{path}: wanted a footer of at most {LIMITS['footer']} bytes, found {footer}; make it again")
    return need("pyarrow.parquet").ParquetFile(path if within is None else resolve_inside(path, within))


@contextmanager
def opened_unchanged(path: Path, *, within: Path | None = None) -> Iterator[BufferedReader]:
    """An open regular file, which must stay as it is while the `with` block reads it.

    What is read more than once inside the block, to hash it for example, is then the same each time.

    Raises:
        DataError: as `open_regular`; at the end, in place of any error of the block too: its size, its time or its
            place on the disk has changed, or another file has its name.
        OSError: it is missing or cannot be read.
    """
    with open_regular(path, within=within) as file:
        before = _state(os.fstat(file.fileno()))
        try:
            yield file
        except Exception:
            _compare(path, file, before)
            raise
        _compare(path, file, before)


def _state(status: os.stat_result) -> tuple[int, int, int, int]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _compare(path: Path, file: BufferedReader, before: tuple[int, int, int, int]) -> None:
    try:
        found = {_state(os.fstat(file.fileno())), _state(os.stat(path))}
    except OSError:
        found = set()
    if found != {before}:
        raise DataError(
            f"{path}: wanted a file that stays as it is while it is read, found that it changed; start over when "
            "nothing writes it any more"
        ) from None


_JOINERS = "\u200c\u200d"  # within words of some scripts, and within emoji


def printable(text: object) -> str:
    """A text that came from outside, for a terminal: control characters, and those that turn its direction, escaped.

    A caption or a file name could otherwise move the cursor, rename the window or hide what follows.
    """
    return "".join(
        c if c.isprintable() or c in _JOINERS or unicodedata.category(c) == "Zs"
        else c.encode("unicode_escape", "surrogatepass").decode()
        for c in str(text)
    )  # fmt: skip
