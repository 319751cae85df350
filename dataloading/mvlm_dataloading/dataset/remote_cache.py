"""Local cache of remote data folders, of limited size. It fetches whole shards before they are read.

A folder at s3://, gs://, hf:// or https:// is read through fsspec. Opening it fetches the description and the split's
index, or the DALI indices if it has no index. A shard is fetched before a batch needs it, and the next shards while it
is in use:

    CACHE/.lock                        exclusive, held briefly while shards are removed or renamed
    CACHE/<hash of url and content>/   dataset.json, tokenizer.json, SPLIT.index or X.idx
        SPLIT.index.lock               held by the process that fetches SPLIT.index; the others wait for it
        X.tar.BYTES.part -> X.tar      renamed when its sha256 is that of dataset.json; BYTES is its final size
        X.tar.lock                     flock: exclusive to write or remove X.tar, shared while a process reads it

Jobs may share a cache. A job uses the shards that others have fetched, and never removes a shard that another job
reads. When the cache is full, the least recently used shards are removed. MVLM_CACHE names the folder (~/.cache/mvlm),
MVLM_CACHE_GB its size (100).
"""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock

from mvlm_dataloading.errors import DataError
from mvlm_dataloading.files import sync, write_file

from .dali_index import read_head
from .description import parse_description, shard_paths
from .folders import RemoteFolder
from .sample_index import map_index

_SHARD_FILE = re.compile(r"(.+\.tar)(?:\.(\d+)\.part)?")
REMOTE_HINT = "open the data set again, which fetches it again; if that does not help, rebuild it at the source"
"""How to get a good cached file, for messages."""


def cache_folder() -> Path:
    """The folder on this machine for copies of remote data."""
    return Path(os.environ.get("MVLM_CACHE") or Path.home() / ".cache" / "mvlm")


def open_remote_cache(folder: str) -> "RemoteCache":
    """Open the cache of a remote data folder, and fetch its description. Raises DataError."""
    size = os.environ.get("MVLM_CACHE_GB") or "100"
    try:
        limit = int(float(size) * 1e9)
    except (ValueError, OverflowError):
        limit = 0
    if limit <= 0:
        raise DataError(f"MVLM_CACHE_GB: wanted a number of gigabytes above 0, got {size!r}")
    return RemoteCache(folder, cache_folder(), limit)


class RemoteCache:
    """Cached files of one remote data folder. It fetches shards, and holds those in use.

    Args:
        limit: maximum bytes of all shards in `cache`.

    Attributes:
        folder: local folder of dataset.json, the indices and the fetched shards.
        remote: the files at the URL.
        verify: called with the number of a fetched shard; raises DataError if the shard does not match its index.

    Raises:
        DataError: a file is missing, differs from dataset.json, or does not fit into the cache.
    """

    def __init__(self, url: str, cache: Path, limit: int):
        self.remote, self.cache, self.limit = RemoteFolder(url), cache, limit
        self.url = self.remote.url
        description = self.remote.read("dataset.json", json.loads)
        parse_description(description, f"{self.url}/dataset.json")
        digest = hashlib.sha256(self.url.encode() + b"\0" + description).hexdigest()[:24]
        # The folder's name depends on the content, so nothing in the cache is ever out of date.
        self.folder = cache / digest
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_file(self.folder / "dataset.json", description, shared=True)
        except OSError as error:
            raise DataError(
                f"{cache}: wanted a cache folder that can be written, found that it cannot: {error.strerror}; set "
                f"MVLM_CACHE to another folder"
            ) from None
        self._shards: list[dict[str, Any]] = []
        self._held: dict[int, int] = {}  # shard -> descriptor of its lock
        self._held_lock = threading.RLock()
        self.verify: Callable[[int], None] | None = None
        self._verified: set[int] = set()

    def register_shards(self, shards: list[dict[str, Any]]) -> None:
        """Set the shards, as dataset.json lists them. Raises DataError if a name leads out of the folder."""
        for name in (shard["tar"] for shard in shards):
            if Path(name).is_absolute() or ".." in Path(name).parts:  # as in a view, which has to be local
                raise DataError(f"{self.url}: wanted shards inside the folder, found {name!r} in dataset.json")
        self._shards = shards

    def fetch_split_index(self, name: str, *, again: bool = False) -> Path | None:
        """Fetch the index of a split, once for all processes that share the cache.

        Returns:
            Path of the cached file; None if the remote folder has none.
        """
        path = self.folder / name
        with FileLock(f"{path}.lock"):
            if again:
                path.unlink(missing_ok=True)
            if path.is_file():
                return path
            part = Path(f"{path}.part")

            def copy(remote: str) -> bool:
                try:
                    self.remote.filesystem.get_file(remote, str(part))
                except (FileNotFoundError, PermissionError):  # S3 refuses a missing file to those who may not list
                    return False
                except Exception as error:
                    if getattr(error, "status", None) == 403:  # the same, over https
                        return False
                    raise
                try:
                    map_index(part, REMOTE_HINT).check_all()
                except DataError as error:
                    raise OSError(str(error)) from None  # a short read, for example: try again
                return True

            try:
                if not self.remote.attempt(name, copy):
                    return None
                sync(part)
                part.rename(path)
            finally:
                part.unlink(missing_ok=True)
        return path

    def fetch_dali_index(self, shard: dict[str, Any]) -> None:
        """Fetch a shard's index, even if it is cached: dataset.json has no hash of it, so a cached one may be old."""
        path = shard_paths(self.folder, shard)[1]

        def check(text: bytes) -> None:
            head, lines = read_head(text)
            if not text.endswith(b"\n") or lines != shard["samples"]:
                raise OSError(
                    f"{head!r}, {lines} lines and {len(text)} bytes of an index of {shard['samples']} samples"
                )

        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, self.remote.read(path.relative_to(self.folder).as_posix(), check), shared=True)

    def fetch_tokenizer(self, sha256: str) -> None:
        """Fetch the tokenizer.json that dataset.json names, unless it is cached."""
        path = self.folder / "tokenizer.json"

        def check(content: bytes) -> None:
            if (found := hashlib.sha256(content).hexdigest()) != sha256:
                raise OSError(f"sha256 {found} where {sha256} was wanted")

        if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
            write_file(path, self.remote.read("tokenizer.json", check), shared=True)

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
        """Give up the lock of a held shard that somebody has removed: the lock that fetches it again waits for it."""
        if shard in self._held and not (self.folder / self._shards[shard]["tar"]).is_file():
            os.close(self._held.pop(shard))

    def _lock_shard(self, number: int) -> int:
        """Fetch a shard if it is not cached, and verify it. Returns the descriptor of its shared lock."""
        shard = self._shards[number]
        tar = self.folder / shard["tar"]
        # flock directly, because filelock has no shared locks. The kernel releases the locks of a killed process.
        # The umask alone decides who may share the cache, as with the other files.
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
                    self._download(shard, tar)
        except BaseException:
            os.close(lock)
            raise

    def _download(self, shard: dict[str, Any], tar: Path) -> None:
        # Reserve the room first, so that other jobs see how much is left. The file name states the size, because fsspec
        # truncates the file when it starts to write.
        part = Path(f"{tar}.{shard['bytes']}.part")
        try:
            with self._cache_lock():
                part.unlink(missing_ok=True)
                self._make_room(shard["bytes"])
                part.touch()
            self.remote.get(shard["tar"], part, shard["sha256"])
            sync(part)
            with self._cache_lock():  # so that a job that makes room sees exactly one of the two names
                part.rename(tar)
        finally:
            part.unlink(missing_ok=True)

    def _make_room(self, wanted: int) -> None:
        """Remove the least recently used shards until `wanted` more bytes fit. The caller holds the cache's lock."""
        entries = []
        for path in self.cache.glob("*/*.tar*"):
            if name := _SHARD_FILE.fullmatch(path.name):
                lock = path.with_name(f"{name[1]}.lock")
                with contextlib.suppress(FileNotFoundError):  # another job has just removed it
                    size = int(name[2] or path.stat().st_size)
                    entries.append((lock.stat().st_mtime_ns, path, size, lock))
        used = sum(size for _, _, size, _ in entries)
        for _, path, size, lock in sorted(entries):
            if used + wanted <= self.limit:
                return
            descriptor = os.open(lock, os.O_RDWR)
            with contextlib.suppress(BlockingIOError):  # in use
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink(missing_ok=True)
                used -= size
            os.close(descriptor)
        if used + wanted > self.limit:
            raise DataError(
                f"{self.cache}: wanted room for {wanted} bytes more, found {used} of {self.limit} in use; "
                "raise MVLM_CACHE_GB or write smaller shards"
            )

    def _cache_lock(self) -> FileLock:
        return FileLock(self.cache / ".lock", poll_interval=0.01)
