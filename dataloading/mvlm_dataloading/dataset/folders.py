"""Files of a folder at s3://, gs://, hf:// or https://, or on a disk, under one interface.

Files at a URL are read and written through fsspec, with limits (`transfers`), retries and checks. A connection that is
silent or slow, an error of the server, a body that ends early and a body whose length or hash is wrong are the same to
a caller: the attempt is repeated after a pause, and the last one raises DataError with the URL of the file. A file that
is missing, that may not be read or that is too long is an error at once.
"""

import errno
import hashlib
import logging
import os
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from filelock import BaseFileLock, FileLock, Timeout

from mvlm_dataloading.errors import DataError, need
from mvlm_dataloading.files import replaced, write_file
from mvlm_dataloading.untrusted import read_regular
from mvlm_dataloading.urls import WEB, is_remote, normal_url, shown, with_credentials

from .transfers import Begin, Meter, TooLongError, listing, options, transfer

log = logging.getLogger(__name__)

_ATTEMPTS = 4
FIRST_PAUSE_S = 0.5
"""Pause after a failed attempt. Each further pause is twice as long."""
STALLED_S = 180
"""No attempt begins when nothing has come for this long. The clients of stores repeat by themselves, too."""
REACH_S = 5
"""Longest time in which Google's client may look for credentials, and to reach its store."""
LISTING_S, LISTED = 300, 1_000_000
"""Longest time of a listing, and the most files in it. Google's store takes a kilobyte for each."""
DEEPEST, PAGES_BYTES = 8, 16 << 20
"""Depth to which the folders of a web server are listed, and the most bytes of their pages."""
_DENIED = (401, 403, 407)


class NotThereError(DataError):
    """A remote file is missing, or may not be read.

    Some stores tell these apart only to those who may list the folder.
    """


class RemoteFolder:
    """Files of one remote folder. Names are relative to it.

    Attributes:
        url: the folder, without credentials.
        protocol: s3, gs, hf, http or https.
        filesystem: the fsspec file system that reads the URL.

    Raises:
        DataError: fsspec cannot read the URL, or its store cannot be reached; a file has more bytes than it may have;
            all attempts at a file failed.
        NotThereError: a file is missing, or may not be read.
    """

    def __init__(self, url: Path | str):
        self.url = normal_url(url)
        self.protocol = self.url.partition(":")[0]
        place, sign, query = with_credentials(self.url).partition("?" if self.protocol in WEB else "\0")
        self._query = sign + query
        try:
            self.filesystem, self._root = _open_filesystem(self.protocol, place)
        except ImportError as error:
            raise DataError(
                f"{self.url}: wanted the package that reads it, which is not installed ({error}); "
                f"pip install 'mvlm[remote]'"
            ) from None
        except Exception as error:  # each package has its own exceptions
            raise DataError(
                f"{self.url}: wanted a store that answers, found: {shown(error)}; check the URL and your credentials"
            ) from None

    def read(
        self, name: str, limit: int, check: Callable[[bytes], None] = lambda content: None, *, exact: bool = False
    ) -> bytes:
        """Content of a file. A damaged one is read again.

        Args:
            limit: bytes that it may have.
            check: raises ValueError for a damaged one.
            exact: compare the length with the one that a web server states without the file, which takes one more
                request. The length that a store lists is compared in any case.
        """
        content = b""

        def check_file(path: Path) -> None:
            nonlocal content
            check(content := path.read_bytes())

        with tempfile.TemporaryDirectory() as folder:
            self.fetch(name, limit, lambda size: Path(folder) / "file", check_file, exact=exact)
        return content

    def has(self, name: str) -> bool:
        """True if the folder has a file of this name."""
        self.filesystem.invalidate_cache()
        return self.attempt(name, self.filesystem.exists)

    def names(self, folder: str) -> list[str]:
        """Names of all files in a folder and its subfolders. Empty if there is no such folder.

        DataError if there are more than `LISTED`, or if a web server's pages or folders never end.
        """
        self.filesystem.invalidate_cache()
        with listing(PAGES_BYTES if self.protocol in WEB else LISTED << 11):
            found = self.attempt(folder, self._find)
        if len(found) > LISTED:
            raise DataError(f"{self.url}/{folder}: wanted at most {LISTED} files, found more; check the URL")
        names = [path.removeprefix(f"{self._root}/") for path in found]
        return list(map(unquote, names)) if self.protocol in WEB else names

    def _find(self, path: str) -> list[str]:
        if self.protocol == "hf":
            return self.filesystem.find(path)
        further = {"max_items": LISTED + 1} if self.protocol == "s3" else {}
        further |= {"maxdepth": DEEPEST} if self.protocol in WEB else {}
        asyn, filesystem = need("fsspec.asyn"), self.filesystem
        try:
            return asyn.sync(filesystem.loop, filesystem._find, path, timeout=LISTING_S, **further)
        except TimeoutError:
            raise DataError(
                f"{self.url}: wanted a list of its files, found that it takes more than {LISTING_S} s; check the URL"
            ) from None

    def get(self, name: str, to: Path, limit: int, sha256: str | None = None, *, exact: bool = False) -> None:
        """Fetch a file, and verify its hash if it is known. A file that does not pass is left at `to`.

        `limit` and `exact` are those of `read`.
        """

        def check(path: Path) -> None:
            if sha256 is not None:
                require_hash(path, sha256)

        self.fetch(name, limit, lambda size: to, check, exact=exact)

    def fetch(self, name: str, limit: int, begin: Begin, check: Callable[[Path], None], *, exact: bool = False) -> Path:
        """Fetch a file to a path of the caller's choice, and return that path.

        Args:
            limit: most bytes that the file may have.
            begin: called before the transfer with the most bytes that the file will have; returns the path to write to.
            check: raises OSError for a damaged file, which is then fetched again.
            exact: as for `read`.
        """

        meters: list[Meter] = []

        def fetch(path: str) -> Path:
            meters.append(Meter(limit))
            listed = self._listed(path) if exact or self.protocol not in WEB else None
            place = transfer(self.filesystem, self.protocol, path, meters[-1], listed, begin)
            _compare(place.stat().st_size, listed)
            check(place)
            return place

        return self.attempt(name, fetch, lambda: max(meter.latest for meter in meters))

    def put(self, path: Path, name: str) -> None:
        """Store a local file, and compare the length of what arrived."""

        def put(remote: str) -> None:
            self.filesystem.put_file(str(path), remote)
            _compare(path.stat().st_size, self._listed(remote))

        self.attempt(name, put)

    def write(self, name: str, content: bytes) -> None:
        """Store a file. It appears complete, or not at all."""
        self.attempt(name, lambda path: self.filesystem.pipe_file(path, content))

    def copy_to(self, name: str, other: "RemoteFolder", new: str) -> None:
        """Copy a file to another folder of the same store. The store does it, and no byte passes this machine."""
        self.attempt(name, lambda path: self.filesystem.copy(path, f"{other._root}/{new}"))

    def remove(self) -> None:
        """Remove the folder and all its files."""
        self.filesystem.invalidate_cache()
        if self.names(""):
            self.attempt("", lambda path: self.filesystem.rm(self._root, recursive=True))

    def _listed(self, path: str) -> int | None:
        """Bytes of a file as the store lists them; None if it does not say."""
        self.filesystem.invalidate_cache()
        return self.filesystem.info(path)["size"]

    def _path(self, name: str) -> str:
        """Path of a file in the form that the fsspec file system takes."""
        if self.protocol in WEB:
            name = quote(name, safe="/!$&'()*+,;=:@~")
        return (f"{self._root}/{name}" if name else self._root) + self._query

    def attempt(self, name: str, action: Callable[[str], Any], heard: Callable[[], float] = lambda: 0) -> Any:
        """Result of `action` on the remote path of a file, retried after pauses. DataError when all attempts fail.

        Args:
            name: file in the folder; empty for the folder itself.
            heard: returns the monotonic time at which data last came from the store. If that is more than `STALLED_S`
                ago, a failure is not retried.
        """
        place, began, said = f"{self.url}/{name}" if name else self.url, time.monotonic(), ""
        for attempt in range(_ATTEMPTS):
            try:
                return action(self._path(name))
            except FileNotFoundError:
                raise NotThereError(
                    f"{place}: wanted a file that the data set needs, found none; check the URL"
                ) from None
            except DataError:
                raise
            except TooLongError as error:
                raise DataError(f"{place}: wanted at most {error} bytes, found more; check the URL") from None
            except Exception as error:  # each file system has its own exceptions
                if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
                    raise DataError(
                        f"{place}: wanted room for it, found: {error.strerror}; make room, or, for a cache, "
                        f"lower MVLM_CACHE_GB or set MVLM_CACHE to a folder on another disk"
                    ) from None
                what = shown(error) or shown(repr(error))
                if isinstance(error, PermissionError) or _status(error) in _DENIED:
                    raise NotThereError(
                        f"{place}: wanted to read or write it, found that it is denied ({what}); give the URL with its "
                        "user and password again, or set credentials as docs/guides/data.md says"
                    ) from None
                if attempt + 1 == _ATTEMPTS or time.monotonic() - max(began, heard()) > STALLED_S:
                    raise DataError(
                        f"{place}: wanted to read or write it, found that {attempt + 1} attempts failed: "
                        f"{what}; check the URL and your credentials"
                    ) from None
                if what != said:  # without a network all attempts fail alike
                    log.warning("%s: trying again after: %s", place, what)
                said = what
                time.sleep(FIRST_PAUSE_S * 2**attempt)
        raise AssertionError("the last attempt returns or raises")


def _status(error: Exception) -> Any:
    """HTTP status code that an error of a remote file system has, or None.

    aiohttp calls it `status`, Google's client `code`.
    """
    return error.status if hasattr(error, "status") else getattr(error, "code", None)  # pyright: ignore[reportAttributeAccessIssue]


def _compare(size: int, listed: int | None) -> None:
    if listed is not None and listed != size:
        raise OSError(f"{size} bytes on this side and {listed} at the store")


def require_hash(path: Path, sha256: str) -> None:
    """Raise OSError if a file's sha256 is another one."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise OSError(f"sha256 {found} where {sha256} was wanted")


def _open_filesystem(protocol: str, place: str) -> tuple[Any, str]:
    """The file system of a URL, and the path of the folder in it. OSError if Google's store cannot be reached soon.

    Google's client by itself looks for credentials for up to a minute, asks over gRPC of what kind a bucket is for two,
    repeats a failed request for half a minute, and logs each of these errors with its stack.
    """
    given, url_to_fs = options(protocol), need("fsspec.core").url_to_fs
    if protocol != "gs":
        return url_to_fs(place, **given)
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # read when gcsfs is imported
    need("gcsfs", "remote")
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
    try:
        found = in_time(lambda: url_to_fs(place, **given))
    except TimeoutError:
        log.warning("%s: no credentials in %d s, so it is read without", place, REACH_S)
        found = url_to_fs(place, **{**given, "token": "anon"})
    store = urlsplit(found[0].base)
    if not {"connector", "proxy", "trust_env"} & set(given["session_kwargs"]):
        address = (store.hostname, store.port or 443)
        try:
            in_time(lambda: socket.create_connection(address, REACH_S).close())
        except OSError as error:
            raise OSError(f"no answer of {store.hostname} ({error})") from None
    return found


def in_time(function: Callable[[], Any]) -> Any:
    """Result of a function. TimeoutError if it takes longer than `REACH_S`; it is then left alone."""
    result: Future[Any] = Future()

    def run() -> None:
        try:
            result.set_result(function())
        except Exception as error:
            result.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    try:
        return result.result(REACH_S)
    except TimeoutError as error:
        raise TimeoutError(str(error) or f"none in {REACH_S} s") from None


class LocalFolder:
    """Folder on a disk, with the methods of `RemoteFolder`.

    gives_away: `get` moves files out of the folder instead of linking or copying them.
    """

    def __init__(self, folder: Path, *, gives_away: bool = False):
        self.folder, self.url = folder, str(folder)
        self._gives_away = gives_away

    def read(self, name: str, limit: int, *, exact: bool = True) -> bytes:
        try:
            return read_regular(self.folder / name, limit, within=self.folder)
        except FileNotFoundError:
            raise DataError(
                f"{self.folder / name}: wanted a file that the data set needs, found none; check the folder"
            ) from None

    def has(self, name: str) -> bool:
        return (self.folder / name).is_file()

    def names(self, folder: str) -> list[str]:
        return [path.relative_to(self.folder).as_posix() for path in (self.folder / folder).rglob("*")]

    def get(self, name: str, to: Path) -> None:
        """Put a file at the path `to`, complete or not at all: by a hard link or else a copy, or by moving it."""
        path = self.folder / name
        if self._gives_away:
            path.rename(to)
            return
        try:
            os.link(path, to)
        except OSError:  # another disk, or a file system without links
            with replaced(to) as aside:
                shutil.copyfile(path, aside)

    def write(self, name: str, content: bytes) -> None:
        write_file(self.folder / name, content)


def open_folder(place: Path | str) -> LocalFolder | RemoteFolder:
    """The files of a folder that is given by its path or by its URL."""
    return RemoteFolder(place) if is_remote(place) else LocalFolder(Path(place))


def discard(folder: Path) -> None:
    """Remove a folder that another process may be writing. That process cannot finish it any more."""
    gone = folder.with_name(f"{folder.name}.old")
    try:
        folder.rename(gone)  # at once, so that nobody renames a half-removed folder to its final name
    except OSError:  # it has been finished or removed meanwhile
        return
    shutil.rmtree(gone, ignore_errors=True)


LOCK = "lock"


def lock_folder(folder: Path) -> AbstractContextManager[BaseFileLock]:
    """Make a folder if there is none, and lock it for this process until the returned context ends.

    The operating system drops the lock of a killed process.

    Raises:
        DataError: another process has locked it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        return FileLock(folder / LOCK, thread_local=False).acquire(timeout=0)
    except Timeout:
        raise DataError(
            f"{folder}: wanted to be the only process that writes there, found another; wait for it or stop it"
        ) from None


def empty_folder(folder: Path) -> None:
    """Remove all but the lock of a folder."""
    for path in folder.iterdir():
        if path.is_dir():
            discard(path)
        elif path.name != LOCK:
            path.unlink()
