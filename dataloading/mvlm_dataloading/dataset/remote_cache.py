"""Data folders that lie elsewhere: whole shards are brought into a bounded cache on this machine before they are read.

A folder named s3://, gs://, hf:// or https:// is read through fsspec. Its description and indices come here when it is
opened; a shard comes when a batch is about to need it, and the next ones while it is in use:

    CACHE/.lock                        held for a moment while room is made
    CACHE/<hash of url and content>/   dataset.json, tokenizer.json, X.idx
        X.tar.BYTES.part -> X.tar      renamed when the sha256 of dataset.json has been found in it; BYTES are its room
        X.tar.lock                     flock: exclusive to write or remove X.tar, shared while a process reads it

So jobs may share a cache: what one brings the other reads, and what one reads the other does not remove. When the cache
is full the shards that were not used for longest go. MVLM_CACHE names the folder (~/.cache/mvlm), MVLM_CACHE_GB its
size (100).
"""

import contextlib
import fcntl
import hashlib
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from mvlm_dataloading.errors import DataError, need

log = logging.getLogger(__name__)

_URL = re.compile(r"(s3|gs|hf|https?):/+(.+)")
_KEPT = re.compile(r"(.+\.tar)(?:\.(\d+)\.part)?")
_ATTEMPTS = 4
_FIRST_PAUSE_S = 0.5


def is_remote(folder: Path | str) -> bool:
    """Whether a folder is named by a URL. A `Path` made of one, which has lost a stroke, is known too."""
    return _URL.fullmatch(str(folder)) is not None


def stage_for(folder: str) -> "Stage":
    """The stage of a remote data folder, with its description in the cache. Raises DataError."""
    found = _URL.fullmatch(folder)
    assert found is not None
    cache = Path(os.environ.get("MVLM_CACHE") or Path.home() / ".cache" / "mvlm")
    size = os.environ.get("MVLM_CACHE_GB") or "100"
    try:
        limit = int(float(size) * 1e9)
    except (ValueError, OverflowError):
        limit = 0
    if limit <= 0:
        raise DataError(f"MVLM_CACHE_GB: wanted a number of gigabytes above 0, got {size!r}")
    return Stage(f"{found[1]}://{found[2].rstrip('/')}", cache, limit)


class Stage:
    """Brings the shards of one remote folder into the cache, and holds those in use.

    Attributes:
        folder: where dataset.json, the indices and, when they are fetched, the shards are.
        compare: raises DataError if the shard of this number, which is here, does not fit its index.

    Raises:
        DataError: something is not there, is not what dataset.json says, or does not fit into the cache.
    """

    def __init__(self, url: str, cache: Path, limit: int):
        self.url, self.cache, self.limit = url, cache, limit
        try:
            self._files, self._root = need("fsspec.core").url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise DataError(f"{url}: wanted a place that fsspec reads, found: {error}") from None
        description = self._attempt("dataset.json", lambda path: self._files.cat_file(path))
        digest = hashlib.sha256(url.encode() + b"\0" + description).hexdigest()[:24]
        # Another content is another folder, so nothing in the cache is ever out of date.
        self.folder = cache / digest
        self.folder.mkdir(parents=True, exist_ok=True)
        _replace(self.folder / "dataset.json", description)
        self._shards: list[dict[str, Any]] = []
        self._held: dict[int, int] = {}  # shard -> descriptor of its lock
        self._guard = threading.RLock()
        self.compare: Callable[[int], None] | None = None
        self._compared: set[int] = set()

    def expect(self, shards: list[dict[str, Any]]) -> None:
        """Say which shards there are, as dataset.json lists them, and bring their indices."""
        self._shards = shards
        for shard in shards:
            for name in (shard["tar"], _index_of(shard)):
                if Path(name).is_absolute() or ".." in Path(name).parts:
                    raise DataError(f"{self.url}: wanted shards inside the folder, found {name!r} in dataset.json")
            if not (self.folder / _index_of(shard)).is_file():
                self.bring_index(shard)

    def bring_index(self, shard: dict[str, Any]) -> None:
        """Bring a shard's index, in the place of one that is here: dataset.json has no hash of it, so it may be old."""
        name = _index_of(shard)
        _replace(self.folder / name, self._attempt(name, lambda path: self._files.cat_file(path)))

    def bring_tokenizer(self, sha256: str) -> None:
        """Bring the tokenizer.json that dataset.json names, unless it is here."""
        path = self.folder / "tokenizer.json"
        if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
            _replace(path, self._attempt("tokenizer.json", lambda path: self._files.cat_file(path)))

    def fetch(self, shards: Sequence[int]) -> None:
        """Return when these shards are here. They stay until `keep` is called without them."""
        for shard in shards:
            with self._guard:
                if shard not in self._held:
                    self._held[shard] = self._bring(shard)

    def keep(self, shards: Sequence[int]) -> None:
        """Let go of all other shards: they may be removed when room is needed."""
        with self._guard:
            for shard in set(self._held) - set(shards):
                os.close(self._held.pop(shard))  # which releases the lock

    @contextlib.contextmanager
    def reading(self, shard: int) -> Iterator[None]:
        """A shard is here, inside this; what `fetch` and `keep` hold is not touched."""
        descriptor = self._bring(shard)  # a lock of its own beside theirs
        try:
            yield
        finally:
            os.close(descriptor)

    def _bring(self, number: int) -> int:
        """Make sure that a shard is in the cache and fits its index; the descriptor of its lock, shared."""
        shard = self._shards[number]
        tar = self.folder / shard["tar"]
        lock = os.open(f"{tar}.lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            while True:
                fcntl.flock(lock, fcntl.LOCK_SH)
                if tar.is_file():
                    os.utime(lock)  # the time of its last use
                    self._compare_once(number)
                    return lock
                fcntl.flock(lock, fcntl.LOCK_EX)
                if not tar.is_file():  # else another job brought it while this one waited
                    self._download(shard, tar)
        except BaseException:
            os.close(lock)
            raise

    def _compare_once(self, number: int) -> None:
        if number in self._compared or self.compare is None:
            return
        try:
            self.compare(number)
        except DataError:
            # What is open has read it. It goes, so that the next opening brings the one that is at the source by then.
            (self.folder / _index_of(self._shards[number])).unlink(missing_ok=True)
            raise
        self._compared.add(number)

    def _download(self, shard: dict[str, Any], tar: Path) -> None:
        # All its room is taken at once, so that jobs that fetch at the same time see what is left. The name says how
        # much, because fsspec begins the file anew, whatever its size was.
        part = Path(f"{tar}.{shard['bytes']}.part")

        def copy(path: str) -> None:
            with _locked(self.cache / ".lock"):
                part.unlink(missing_ok=True)
                self._make_room(shard["bytes"])
                part.touch()
            self._files.get_file(path, str(part))
            with part.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != shard["sha256"]:
                raise OSError(f"sha256 {found} where dataset.json says {shard['sha256']}")
            with part.open("rb") as file:
                os.fsync(file.fileno())
            with _locked(self.cache / ".lock"):  # who makes room finds it under one of its names
                part.rename(tar)

        try:
            self._attempt(shard["tar"], copy)
        finally:
            part.unlink(missing_ok=True)

    def _make_room(self, wanted: int) -> None:
        """Remove what was not used for longest, until so many bytes fit. The cache's lock is held."""
        entries = []
        for path in self.cache.glob("*/*.tar*"):
            if found := _KEPT.fullmatch(path.name):
                lock = path.with_name(f"{found[1]}.lock")
                with contextlib.suppress(FileNotFoundError):  # someone has just removed it
                    size = int(found[2] or path.stat().st_size)
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

    def _attempt(self, name: str, action: Any) -> Any:
        """action(path of the remote file), again after a pause when it fails. DataError when it fails for good."""
        for attempt in range(_ATTEMPTS):
            try:
                return action(f"{self._root}/{name}")
            except FileNotFoundError:
                raise DataError(f"{self.url}/{name}: wanted a file that the data set needs, found none") from None
            except DataError:
                raise
            except Exception as error:  # every kind of store has errors of its own
                if attempt + 1 == _ATTEMPTS:
                    raise DataError(
                        f"{self.url}/{name}: wanted to read it, failed {_ATTEMPTS} times: {error or repr(error)}; "
                        "is the address right, and are there credentials?"
                    ) from None
                log.warning("%s/%s: trying again after: %s", self.url, name, error or repr(error))
                time.sleep(_FIRST_PAUSE_S * 2**attempt)
        raise AssertionError("the last attempt returns or raises")


def _index_of(shard: dict[str, Any]) -> str:
    return shard.get("index", Path(shard["tar"]).with_suffix(".idx").as_posix())


def _replace(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}")
    aside.write_bytes(content)
    aside.rename(path)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
