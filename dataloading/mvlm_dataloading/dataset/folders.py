"""Files of a folder at s3://, gs://, hf:// or https://, or on a disk, under one interface.

Files at a URL are read and written through fsspec, with retries and checks. A connection that is silent for
`SILENCE_S`, an error of the server, a body that ends early and a body whose length or hash is wrong are the same to a
caller: the attempt is repeated after a pause, and the last one raises DataError with the URL of the file.
"""

import errno
import hashlib
import logging
import os
import re
import shutil
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from filelock import BaseFileLock, FileLock, Timeout

from mvlm_dataloading.errors import DataError, need
from mvlm_dataloading.files import replaced, write_file

log = logging.getLogger(__name__)

_URL = re.compile(r"(s3|gs|hf|https?):/+(.+)")
_ATTEMPTS = 4
FIRST_PAUSE_S = 0.5
"""Pause after a failed attempt. Each further pause is twice as long."""
SILENCE_S = 30
"""A connection that sends nothing for this long is given up. A slow transfer may take any time."""


def is_remote(folder: Path | str) -> bool:
    """True if a folder is given by its URL. Also true of a `Path` made from a URL, which has lost a slash."""
    return _URL.fullmatch(str(folder)) is not None


def normal_url(folder: Path | str) -> str:
    """The URL of a remote folder, with both slashes and without one at its end."""
    url = _URL.fullmatch(str(folder))
    assert url is not None
    return f"{url[1]}://{url[2].rstrip('/')}"


class RemoteFolder:
    """Files of one remote folder. Names are relative to it.

    Attributes:
        url: the folder.
        filesystem: the fsspec file system that reads the URL.

    Raises:
        DataError: fsspec cannot read the URL; a file is missing; all attempts at a file failed.
    """

    def __init__(self, url: Path | str):
        self.url = normal_url(url)
        try:
            self.filesystem, self._root = need("fsspec.core").url_to_fs(self.url, **_limits(self.url))
        except ImportError as error:
            raise DataError(
                f"{self.url}: wanted the package that reads it, which is not installed ({error}); "
                f"pip install 'mvlm[remote]'"
            ) from None
        except ValueError as error:
            raise DataError(f"{self.url}: wanted a URL that fsspec reads, found: {error}") from None

    def read(self, name: str, check: Callable[[bytes], None] = lambda content: None, *, exact: bool = False) -> bytes:
        """Content of a file. A damaged one is read again.

        Args:
            check: raises ValueError for a damaged one.
            exact: compare the length with the one that the store lists, which takes one more request.
        """

        def read(path: str) -> bytes:
            content = self.filesystem.cat_file(path)
            check(content)
            self._compare(len(content), path, exact)
            return content

        return self.attempt(name, read)

    def has(self, name: str) -> bool:
        """True if the folder has a file of this name."""
        self.filesystem.invalidate_cache()
        return self.attempt(name, self.filesystem.exists)

    def names(self, folder: str) -> list[str]:
        """Names of all files in a folder and its subfolders. Empty if there is no such folder."""
        self.filesystem.invalidate_cache()
        found = self.attempt(folder, self.filesystem.find)
        return [path.removeprefix(f"{self._root}/") for path in found]

    def get(self, name: str, to: Path, sha256: str | None = None, *, exact: bool = False) -> None:
        """Fetch a file, and verify its hash if it is known. A file that does not pass is left at `to`."""

        def get(path: str) -> None:
            self.filesystem.get_file(path, str(to))
            with to.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if sha256 is not None and found != sha256:
                raise OSError(f"sha256 {found} where {sha256} was wanted")
            self._compare(to.stat().st_size, path, exact)

        self.attempt(name, get)

    def put(self, path: Path, name: str) -> None:
        """Store a local file, and compare the length of what arrived."""

        def put(remote: str) -> None:
            self.filesystem.put_file(str(path), remote)
            self._compare(path.stat().st_size, remote, True)

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

    def _compare(self, size: int, path: str, exact: bool) -> None:
        if not exact:
            return
        self.filesystem.invalidate_cache()
        if (listed := self.filesystem.info(path)["size"]) != size:
            raise OSError(f"{size} bytes on this side and {listed} at the store")

    def attempt(self, name: str, action: Callable[[str], Any]) -> Any:
        """Result of `action` on a remote path, retried after pauses. Raises DataError when all attempts fail."""
        for attempt in range(_ATTEMPTS):
            try:
                return action(f"{self._root}/{name}" if name else self._root)
            except FileNotFoundError:
                raise DataError(
                    f"{self.url}/{name}: wanted a file that the data set needs, found none; check the URL"
                ) from None
            except DataError:
                raise
            except Exception as error:  # each file system has its own exceptions
                if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
                    raise DataError(
                        f"{self.url}/{name}: wanted room for it, found: {error.strerror}; make room, or, for a cache, "
                        f"lower MVLM_CACHE_GB or set MVLM_CACHE to a folder on another disk"
                    ) from None
                what = str(error) or repr(error)
                if attempt + 1 == _ATTEMPTS:
                    raise DataError(
                        f"{self.url}/{name}: wanted to read or write it, found that {_ATTEMPTS} attempts failed: "
                        f"{what}; check the URL and your credentials"
                    ) from None
                log.warning("%s/%s: trying again after: %s", self.url, name, what)
                time.sleep(FIRST_PAUSE_S * 2**attempt)
        raise AssertionError("the last attempt returns or raises")


def _limits(url: str) -> dict[str, Any]:
    """Options of the file system of a URL. What a user has set in fsspec's configuration comes first."""
    protocol = url.split(":")[0]
    limits: dict[str, Any] = {}
    if protocol in ("http", "https"):
        # By default aiohttp ends a transfer after five minutes, however well it goes.
        timeout = need("aiohttp", "remote").ClientTimeout(total=None, sock_connect=SILENCE_S, sock_read=SILENCE_S)
        limits = {"client_kwargs": {"timeout": timeout}}
    elif protocol == "s3":
        # `attempt` repeats. Without this, botocore repeats each of s3fs's repetitions.
        settings = {"connect_timeout": SILENCE_S, "read_timeout": SILENCE_S, "retries": {"max_attempts": 0}}
        limits = {"config_kwargs": settings}
    return {**limits, **need("fsspec.config").conf.get(protocol, {})}


class LocalFolder:
    """The same of a folder on a disk. With `gives_away`, `get` moves files instead of copying them."""

    def __init__(self, folder: Path, *, gives_away: bool = False):
        self.folder, self.url = folder, str(folder)
        self._gives_away = gives_away

    def read(self, name: str, *, exact: bool = True) -> bytes:
        try:
            return (self.folder / name).read_bytes()
        except FileNotFoundError:
            raise DataError(
                f"{self.folder / name}: wanted a file that the data set needs, found none; check the folder"
            ) from None

    def has(self, name: str) -> bool:
        return (self.folder / name).is_file()

    def names(self, folder: str) -> list[str]:
        return [path.relative_to(self.folder).as_posix() for path in (self.folder / folder).rglob("*")]

    def get(self, name: str, to: Path) -> None:
        """Give a file a second name, copy it where that is impossible, or move it. `to` appears complete."""
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
    """Make a folder, and lock it for this process until the context ends. The kernel drops the lock of a killed one.

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
