"""Local cache of remote data folders, of limited size. It fetches whole shards before they are read.

A folder at s3://, gs://, hf:// or https:// is read through fsspec. Opening it fetches the description and the split's
index, or the DALI indices if it has no index. A shard is fetched before a batch needs it, and the next shards while it
is in use:

    CACHE/.lock                        exclusive, held briefly while room is made and files are renamed
    CACHE/<hash of url and content>/   dataset.json, tokenizer.json, SPLIT.index or X.idx
        lock                           flock: shared while a process has the data set open, exclusive to remove its
                                       files, but for the shards
        NAME.lock                      held by the process that fetches NAME; the others wait for it
        NAME.BYTES.part -> NAME        renamed when it is whole: a shard when its sha256 is that of dataset.json
        X.tar.lock                     flock: exclusive to write or remove X.tar, shared while a process reads it

Jobs may share a cache. A job uses the shards that others have fetched, and never removes a shard that another job
reads. All files count. Room for a file is reserved before its transfer begins, by the BYTES in its name: what its
server states, or else the most that it may have. When the cache is full, what was used least recently is removed.
MVLM_CACHE names the folder (~/.cache/mvlm), MVLM_CACHE_GB its size (100).
"""

import contextlib
import fcntl
import glob
import hashlib
import json
import os
import re
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock

from mvlm_dataloading.errors import DataError
from mvlm_dataloading.files import sync, write_file
from mvlm_dataloading.untrusted import LIMITS

from .dali_index import most_bytes as most_bytes_of_dali
from .dali_index import read_head
from .description import parse_description, shard_paths
from .folders import NotThereError, RemoteFolder, require_hash
from .sample_index import map_index, most_bytes
from .transfers import Begin

LONGEST = 200
"""Bytes of a file's or folder's name. Names in the cache have up to 30 more, and file systems allow 255."""
_FOLDER = re.compile(r"[0-9a-f]{24}")
_SHARD_FILE = re.compile(r"(.+\.tar)(?:\.\d+\.part)?")
_PART = re.compile(r".+\.(\d+)\.part")
REMOTE_HINT = "open the data set again, which fetches it again; if that does not help, rebuild it at the source"
"""Advice in messages about a damaged file of the cache."""


def cache_folder() -> Path:
    """The folder on this machine for copies of remote data."""
    return Path(os.environ.get("MVLM_CACHE") or Path.home() / ".cache" / "mvlm")


def open_remote_cache(folder: str, description: bytes | None = None) -> "RemoteCache":
    """Open the cache of a remote data folder, and fetch its description unless it is given. Raises DataError."""
    size = os.environ.get("MVLM_CACHE_GB") or "100"
    try:
        limit = int(float(size) * 1e9)
    except (ValueError, OverflowError):
        limit = 0
    if limit <= 0:
        raise DataError(f"MVLM_CACHE_GB: wanted a number of gigabytes above 0, got {size!r}")
    return RemoteCache(folder, cache_folder(), limit, description)


class RemoteCache:
    """Cached files of one remote data folder. It fetches shards, and holds those in use.

    Args:
        limit: maximum bytes of all files in `cache`.
        description: content of the `dataset.json` of a local folder of linked data. `write_shard` then writes shards.

    Attributes:
        folder: local folder of dataset.json, the indices and the fetched shards.
        remote: the files at the URL.
        verify: called with the number of a fetched shard; raises DataError if the shard does not match its index.
        write_shard: writes the shard of a number to a path, in place of a transfer of the file of its name.

    Raises:
        DataError: a file is missing, differs from dataset.json, or does not fit into the cache.
    """

    def __init__(self, url: str, cache: Path, limit: int, description: bytes | None = None):
        self.cache, self.limit, self.url = cache, limit, url
        if description is None:
            self.remote = RemoteFolder(url)
            self.url = self.remote.url
            description = self.remote.read("dataset.json", LIMITS["dataset.json"], json.loads)
            parse_description(description, f"{self.url}/dataset.json")
        digest = hashlib.sha256(self.url.encode() + b"\0" + description).hexdigest()[:24]
        # The folder's name depends on the content, so nothing in the cache is ever out of date.
        self.folder = cache / digest
        with self._writing():
            self.folder.mkdir(parents=True, exist_ok=True)
            in_use = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT, 0o666)
            weakref.finalize(self, os.close, in_use)
            fcntl.flock(in_use, fcntl.LOCK_SH)
            os.utime(in_use)
            self._write_description(description)
        self._shards: list[dict[str, Any]] = []
        self._held: dict[int, int] = {}  # shard -> descriptor of its lock
        self._held_lock = threading.RLock()
        self.verify: Callable[[int], None] | None = None
        self.write_shard: Callable[[int, Path], None] | None = None
        self._verified: set[int] = set()

    def _write_description(self, content: bytes) -> None:
        path = self.folder / "dataset.json"
        with self._cache_lock():
            if not path.is_file() or path.read_bytes() != content:
                self._make_room(len(content))
                write_file(path, content, shared=True)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Context in which an error of the cache's disk becomes a DataError of one line that names the cache."""
        try:
            yield
        except OSError as error:
            raise DataError(
                f"{self.cache}: wanted a cache folder that can be written, found that it cannot: {error.strerror}; set "
                f"MVLM_CACHE to another folder"
            ) from None

    def register_shards(self, shards: list[dict[str, Any]]) -> None:
        """Set the shards, as dataset.json lists them. Raises DataError if a name is not that of a tar in the folder."""
        for shard in shards:
            for name, kind in ((shard["tar"], ".tar"), (shard.get("index", "x.idx"), ".idx")):
                path = Path(name)  # of a view, which has to be local, it may be anywhere
                good = not path.is_absolute() and ".." not in path.parts and path.suffix == kind
                if not good or not name.isprintable() or max(len(os.fsencode(part)) for part in path.parts) > LONGEST:
                    raise DataError(
                        f"{self.url}: wanted tars inside the folder as shards, found {name!r} in dataset.json"
                    )
        self._shards = shards

    def fetch_split_index(self, name: str, *, again: bool = False) -> Path | None:
        """Fetch the index of a split, once for all processes that share the cache.

        Returns:
            Path of the cached file; None if the remote folder has none.
        """
        path = self.folder / name

        def check(part: Path) -> None:
            try:
                map_index(part, REMOTE_HINT).check_all()
            except DataError as error:
                raise OSError(str(error)) from None  # a short read, for example: try again

        with self._sole(path):
            if again:
                path.unlink(missing_ok=True)
            if not path.is_file():
                samples = sum(shard["samples"] for shard in self._shards)
                try:
                    self._download(name, path, most_bytes(samples, len(self._shards)), check)
                except NotThereError:
                    return None
        return path

    def begin_index(self, name: str, head: bytes, size: int) -> Path:
        """Make the cached file of a split's index with its head only; the rest is a hole, to be filled later.

        Args:
            head: header and table of the index.
            size: bytes of the whole index.

        Returns its path. An index with the same head that is there is kept.
        """
        path = self.folder / name
        with self._sole(path):
            if path.is_file() and path.stat().st_size == size:
                with path.open("rb") as file:
                    if file.read(len(head)) == head:
                        return path

            def write(begin: Begin) -> Path:
                part = begin(size)
                with part.open("wb") as file:
                    file.write(head)
                    file.truncate(size)
                return part

            self._place(path, write)
        return path

    def fetch_dali_index(self, shard: dict[str, Any]) -> None:
        """Fetch a shard's index, even if it is cached: dataset.json has no hash of it, so a cached one may be old."""
        path = shard_paths(self.folder, shard)[1]

        def check(part: Path) -> None:
            text = part.read_bytes()
            head, lines = read_head(text)
            if not text.endswith(b"\n") or lines != shard["samples"]:
                raise OSError(
                    f"{head!r}, {lines} lines and {len(text)} bytes of an index of {shard['samples']} samples"
                )

        with self._sole(path):
            name = path.relative_to(self.folder).as_posix()
            self._download(name, path, most_bytes_of_dali(shard["samples"]), check)

    def fetch_tokenizer(self, sha256: str) -> None:
        """Fetch the tokenizer.json that dataset.json names, unless it is cached."""
        path = self.folder / "tokenizer.json"
        with self._sole(path):
            if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
                self._download(path.name, path, LIMITS["tokenizer"], lambda part: require_hash(part, sha256))

    @contextlib.contextmanager
    def _sole(self, path: Path) -> Iterator[None]:
        """Context in which this process alone fetches the file `path`, which is no shard."""
        with self._writing():
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(f"{path}.lock").acquire()
        with lock:
            yield

    def fetch(self, shards: Sequence[int]) -> None:
        """Fetch these shards and hold them until a `release_except` call that does not list them."""
        for shard in shards:
            with self._held_lock:
                self._forget_if_removed(shard)
                if shard not in self._held:
                    self._held[shard] = self._lock_shard(shard)

    def release_except(self, shards: Sequence[int]) -> None:
        """Release all shards except these. Released shards may be removed when the cache is full."""
        with self._held_lock:
            for shard in set(self._held) - set(shards):
                os.close(self._held.pop(shard))  # also releases the lock

    @contextlib.contextmanager
    def reading(self, shard: int) -> Iterator[None]:
        """Hold a shard inside the `with` block, independently of `fetch` and `release_except`."""
        with self._held_lock:
            self._forget_if_removed(shard)
        descriptor = self._lock_shard(shard)
        try:
            yield
        finally:
            os.close(descriptor)

    def _forget_if_removed(self, shard: int) -> None:
        """Release a held shard whose file somebody has removed. Fetching it again would wait for its lock."""
        if shard in self._held and not (self.folder / self._shards[shard]["tar"]).is_file():
            os.close(self._held.pop(shard))

    def _lock_shard(self, number: int) -> int:
        """Fetch a shard if it is not cached, and verify it. Returns the descriptor of its shared lock."""
        shard = self._shards[number]
        tar = self.folder / shard["tar"]
        # flock directly, because filelock has no shared locks. The kernel releases the locks of a killed process.
        # The umask alone decides who may share the cache, as with the other files.
        with self._writing():
            tar.parent.mkdir(parents=True, exist_ok=True)
            lock = os.open(f"{tar}.lock", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            while True:
                fcntl.flock(lock, fcntl.LOCK_SH)
                if tar.is_file():
                    os.utime(lock)  # records the time of its last use
                    if number not in self._verified and self.verify is not None:
                        self.verify(number)
                        self._verified.add(number)
                    return lock
                fcntl.flock(lock, fcntl.LOCK_EX)
                if not tar.is_file():  # else another job fetched it while this one waited
                    self._download_shard(number, tar)
        except BaseException:
            os.close(lock)
            raise

    def _download_shard(self, number: int, tar: Path) -> None:
        shard, write = self._shards[number], self.write_shard

        def write_at(begin: Begin) -> Path:
            part = begin(shard["bytes"])
            assert write is not None
            write(number, part)
            return part

        def check(part: Path) -> None:
            if (size := part.stat().st_size) != shard["bytes"]:
                raise OSError(f"{size} bytes where {shard['bytes']} were wanted")
            if shard["sha256"]:  # else not known
                require_hash(part, shard["sha256"])

        if write is None:
            self._download(shard["tar"], tar, shard["bytes"], check)
        else:
            self._place(tar, write_at)

    def _download(self, name: str, path: Path, limit: int, check: Callable[[Path], None]) -> None:
        """Fetch a file to `path`. The caller holds its lock.

        Args:
            limit: most bytes that the file may have.
            check: raises OSError for a damaged file, which is fetched again.
        """
        self._place(path, lambda begin: self.remote.fetch(name, limit, begin, check))

    def _place(self, path: Path, fetch: Callable[[Begin], Path]) -> None:
        """Make room in the cache for a file, let `fetch` write it to a temporary path, and rename it to `path`.

        Args:
            fetch: called with a function that reserves a number of bytes and returns the temporary path. Returns that
                path.

        The caller holds the lock of the file.
        """

        def begin(size: int) -> Path:
            part = Path(f"{path}.{size}.part")
            with self._writing(), self._cache_lock():
                self._remove_parts(path)
                self._make_room(size)
                part.touch()
            return part

        try:
            part = fetch(begin)
            sync(part)
            with self._cache_lock():  # so that a job that makes room sees exactly one of the two names
                part.rename(path)
        finally:
            self._remove_parts(path)

    def _remove_parts(self, path: Path) -> None:
        for part in path.parent.glob(f"{glob.escape(path.name)}.*.part"):
            part.unlink(missing_ok=True)

    def _make_room(self, wanted: int) -> None:
        """Remove what was used least recently until `wanted` more bytes fit. The caller holds the cache's lock."""
        entries = [entry for folder in self.cache.iterdir() if _FOLDER.fullmatch(folder.name) for entry in _of(folder)]
        used = sum(entry.size for entry in entries)
        for entry in sorted(entries):
            if used + wanted <= self.limit:
                return
            used -= entry.remove()
        if used + wanted > self.limit:
            raise DataError(
                f"{self.cache}: wanted room for {wanted} bytes more, found {used} of {self.limit} in use; "
                "raise MVLM_CACHE_GB or write smaller shards"
            )

    def _cache_lock(self) -> FileLock:
        return FileLock(self.cache / ".lock", poll_interval=0.01)


class _Entry(NamedTuple):
    """Files of the cache that are removed together: one shard, or all files of a data set that are no shards."""

    last_use: int
    lock: Path
    size: int
    """Bytes of the files, or those that are reserved for a file in transfer."""
    files: tuple[Path, ...]

    def remove(self) -> int:
        """Remove the files unless they are in use. Returns the bytes that are free then."""
        try:
            descriptor = os.open(self.lock, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError:  # of another user
            return 0
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for path in self.files:
                path.unlink(missing_ok=True)
            return self.size
        except OSError:  # in use
            return 0
        finally:
            os.close(descriptor)


def _of(folder: Path) -> Iterator[_Entry]:
    """Entries of one data set in the cache: all files of its `folder` but the locks."""
    others, bytes_of_others = [], 0
    for path in folder.rglob("*"):
        if path.suffix == ".lock" or path.name == "lock":
            continue
        try:
            if path.is_dir():
                continue
            reserved = _PART.fullmatch(path.name)
            size = max(path.stat().st_size, int(reserved[1]) if reserved else 0)
            if shard := _SHARD_FILE.fullmatch(path.name):
                lock = path.with_name(f"{shard[1]}.lock")
                yield _Entry(lock.stat().st_mtime_ns, lock, size, (path,))
                continue
        except FileNotFoundError:  # another job has just removed it
            continue
        others.append(path)
        bytes_of_others += size
    if others:
        lock = folder / "lock"
        last_use = lock.stat().st_mtime_ns if lock.is_file() else 0  # of a version that had no such lock
        yield _Entry(last_use, lock, bytes_of_others, tuple(others))
