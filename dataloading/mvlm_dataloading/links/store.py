"""Ranges of files at s3://, gs://, hf://, https:// and on a disk, many in flight, each of the version that was linked.

    store = RangeStore(in_flight=32)
    file = store.stat("s3://bucket/cc12m/00000.tar")  # LinkedFile(url, size, etag); keep it in an index
    content = store.read(file, 512, 4096)             # blocks; bytes-like, exactly as many bytes as asked for
    future = store.submit(file, 0, 1 << 20)           # does not block; at most `in_flight` are read at a time
    store.close()

Every read states the file's ETag (`If-Match`), so a file that was replaced since is an error and never other bytes: a
`ChangedError`, which names the URL. A file that is missing, denied or shorter ends at once, by name. A server's error,
a lost connection, a silent one and a body of another length are repeated after pauses with jitter, `ATTEMPTS` times. A
store that is away, but has answered before, has two minutes to come back, and one line says so. All errors are
DataError of one line, without credentials, and without what the server wrote.

obstore reads s3:// and gs://. http:// and https:// go through fsspec's session with the limits of `transfers`, because
obstore follows redirects to any host. hf:// goes through the hub's own client, pinned to the commit that was linked.
Credentials come from each store's default chain and fsspec's configuration, and are never written.
"""

import errno
import logging
import os
import random
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from mvlm_dataloading.dataset import folders
from mvlm_dataloading.dataset.transfers import SILENCE_S, Meter, TooLongError, options
from mvlm_dataloading.errors import DataError, need
from mvlm_dataloading.untrusted import open_regular
from mvlm_dataloading.urls import WEB, is_remote, normal_url, with_credentials

log = logging.getLogger(__name__)

ATTEMPTS = 5
"""Attempts at a range. The pauses between them are `folders.FIRST_PAUSE_S`, doubled each time, times 0.5 to 1.5."""
OUTAGE_ATTEMPTS = 9
"""Attempts at a range of a store that is away, over some two minutes."""
OUTAGE_S = 200.0
"""A store that is away is told of once in so many seconds."""
MOST_BYTES = 256 << 20
"""Longest range."""
REQUEST_S = 300
"""Longest time of one attempt, from the request to the last byte."""
PART_BYTES = 8 << 20
"""Bytes of a range of `SequentialFile`."""

_NO_CONNECTION, _NO_ANSWER = "no connection", "a connection that ends without an answer"
_AWAY = {_NO_CONNECTION, _NO_ANSWER, "status 502", "status 503", "status 504"}
_STATUS = re.compile(r"status code: (\d{3})")
_KIND = re.compile(r"kind: (Connect|Request|Timeout)\b")
_KINDS = {"Connect": _NO_CONNECTION, "Request": _NO_ANSWER, "Timeout": "no answer in time"}
_COMMIT = re.compile(r"[0-9a-f]{40}")
_DENIED = {401, 403, 407}
_MISSING = {404, 410}
_REPEATED = {408, 425, 429}


class LinkedFile(NamedTuple):
    """A file as it was when it was linked."""

    url: str
    """URL without credentials, or an absolute path."""
    size: int
    """Bytes."""
    etag: str
    """The store's name for this content. Of a file on a disk its time and size; of a file of the hub its commit."""


class ChangedError(DataError):
    """A file is no longer the one that was linked."""


class _AnswerError(Exception):
    """An answer that is no range. `status` is 0 if it is a bad one, which `found` then describes."""

    def __init__(self, status: int, found: str = ""):
        super().__init__(found or f"status {status}")
        self.status = status


Content = bytes | bytearray | memoryview

_answered: set[str] = set()
"""Stores that have answered this process: a scheme with a bucket or host."""
_told: dict[str, float] = {}
"""Store -> the monotonic time at which it was last told to be away."""
_telling = threading.Lock()


def tell_outage(store: str) -> None:
    """Log that a store is away, once in `OUTAGE_S` seconds; of the ranks of a node, the first does."""
    if os.environ.get("LOCAL_RANK", "0") != "0":
        return
    with _telling:
        now = time.monotonic()
        if store not in _told or now - _told[store] > OUTAGE_S:
            _told[store] = now
            log.warning("%s: the store cannot be reached; it is tried again for two minutes", store)


class RangeStore:
    """Reads ranges on its own threads. Several threads may use it; a forked process makes its own.

    Args:
        in_flight: ranges that are read at a time.
        tell: called with the name of a store that is away after each failed attempt, by one thread at a time.
    """

    def __init__(self, in_flight: int = 32, tell: Callable[[str], Any] = tell_outage):
        self._tell, self._telling = tell, threading.Lock()
        self._pool = ThreadPoolExecutor(in_flight, thread_name_prefix="mvlm-ranges")

    def stat(self, url: Path | str) -> LinkedFile:
        """Size and ETag of a file, with the URL as a link keeps it.

        Raises:
            DataError: it is missing, denied or cannot be reached, or its server sends no ranges.
        """
        if not is_remote(url):
            return _stat_local(Path(url))
        place = normal_url(url)
        reader = _reader_of(place)
        return self._attempt(place, lambda: reader.stat(place))

    def pinned(self, url: str) -> str:
        """The URL at the commit that it stands for now, on the hub. Any other one as it is. DataError as of `stat`."""
        place = normal_url(url)
        pin = _reader_of(place).pin
        return place if pin is None else self._attempt(place, lambda: pin(place))

    def names(self, folder: str, most: int) -> list[str]:
        """Paths of all files below a remote folder, sorted, relative to it.

        Raises:
            DataError: it has more than `most` files, its store has no list of them, or cannot be reached.
        """
        place = normal_url(folder)
        names_of = _reader_of(place).names
        if names_of is None:
            raise DataError(
                f"{place}: wanted a folder whose store lists its files, found one of a web server, which does not; "
                "write the names out, with numbers as {00000..01242}"
            )
        found = self._attempt(place, lambda: list(islice(names_of(place), most + 1)))
        if len(found) > most:
            raise DataError(f"{place}: wanted at most {most} files, found more; name a smaller folder")
        return sorted(name.removeprefix(f"{place}/") for name in found)

    def read(self, file: LinkedFile, begin: int, end: int) -> memoryview:
        """The bytes `begin` to `end` - 1 of a file. At most `MOST_BYTES`; none of them lies beyond its end.

        Raises:
            ChangedError: the file was replaced since it was linked.
            DataError: it is missing, denied, or all attempts failed.
        """
        if not 0 <= begin <= end <= file.size or end - begin > MOST_BYTES:
            raise DataError(
                f"{file.url}: wanted a range of at most {MOST_BYTES} bytes in {file.size}, found {begin} to {end}; "
                "link it again"
            )
        if begin == end:
            return memoryview(b"")
        if not is_remote(file.url):
            return memoryview(_read_local(file, begin, end))
        reader = _reader_of(file.url)

        def read() -> memoryview:
            content = memoryview(reader.read(file, begin, end))
            if len(content) != end - begin:
                raise _AnswerError(0, f"{len(content)} of {end - begin} bytes")
            return content

        return self._attempt(file.url, read, linked=True)

    def submit(self, file: LinkedFile, begin: int, end: int) -> "Future[memoryview]":
        """`read` on a thread of the store. The future has its result or its error."""
        return self._pool.submit(self.read, file, begin, end)

    def call(self, action: Callable[[], Any]) -> "Future[Any]":
        """Result of an action that reads one range after another, on a thread of the store."""
        return self._pool.submit(action)

    def close(self) -> None:
        """Wait for the ranges in flight, and give up those that wait."""
        self._pool.shutdown(cancel_futures=True)

    def _attempt(self, place: str, action: Callable[[], Any], linked: bool = False) -> Any:
        """Result of an action, which is repeated after errors that may pass. DataError when it fails for good.

        Args:
            linked: True if the store is known to be there, because a file of it is linked.
        """
        began, found, attempt, store = time.monotonic(), "", -1, "/".join(place.split("/")[:3])
        patient = linked or store in _answered
        while (attempt := attempt + 1) < (OUTAGE_ATTEMPTS if patient and found in _AWAY else ATTEMPTS):
            if attempt:
                if time.monotonic() - began > folders.STALLED_S:
                    break
                time.sleep(folders.FIRST_PAUSE_S * 2 ** (attempt - 1) * random.uniform(0.5, 1.5))
            try:
                result = action()
            except DataError:
                raise
            except Exception as error:  # each package has its own exceptions
                found = _judge(place, error)
                if patient and attempt and found in _AWAY:  # twice, so it is more than a hitch
                    with self._telling:
                        self._tell(store)
            else:
                _answered.add(store)
                return result
        raise DataError(
            f"{place}: wanted its bytes, found that {attempt} attempts failed, the last with {found}; try again later, "
            "or check the URL"
        )


class SequentialFile:
    """A linked file that is read in order, with ranges fetched ahead. It seeks forwards alone.

    Args:
        ahead: ranges of `PART_BYTES` that are read before they are wanted.
    """

    def __init__(self, store: RangeStore, file: LinkedFile, ahead: int = 4):
        self._store, self._file, self._ahead = store, file, ahead
        self._parts: deque[Future[memoryview]] = deque()
        self._asked = self._at = self._begin = 0  # the end of all parts; this place; the place of `_part`
        self._part = memoryview(b"")

    def read(self, size: int) -> bytes:
        """The next bytes: fewer than `size` only at the end of the file."""
        begin, end = self._at - self._begin, self._at - self._begin + size
        if end <= len(self._part):  # as nearly always
            self._at += size
            return bytes(self._part[begin:end])
        found = []
        while size > 0 and self._at < self._file.size:
            while self._at >= self._begin + len(self._part):
                self._next()
            taken = self._part[self._at - self._begin :][:size]
            found.append(taken)
            self._at += len(taken)
            size -= len(taken)
        return bytes(found[0]) if len(found) == 1 else b"".join(found)

    def seek(self, place: int) -> None:
        assert place >= self._begin, "seeks forwards"
        self._at = place

    def tell(self) -> int:
        return self._at

    def close(self) -> None:
        for part in self._parts:
            part.cancel()

    def _next(self) -> None:
        while self._asked < self._file.size and len(self._parts) <= self._ahead:
            end = min(self._asked + PART_BYTES, self._file.size)
            self._parts.append(self._store.submit(self._file, self._asked, end))
            self._asked = end
        self._begin += len(self._part)
        self._part = self._parts.popleft().result()


class _Reader(NamedTuple):
    """Functions that read files of one bucket, scheme or hub, with errors that `_judge` understands."""

    stat: Callable[[str], LinkedFile]
    read: Callable[[LinkedFile, int, int], Content]
    names: Callable[[str], Iterator[str]] | None
    """URLs of all files below a folder."""
    pin: Callable[[str], str] | None = None
    """The URL of a file or a folder at its commit."""


def _reader_of(url: str) -> _Reader:
    scheme, _, rest = url.partition("://")
    try:
        if scheme in WEB:
            return _web_reader(scheme, os.getpid())
        return _hub_reader(os.getpid()) if scheme == "hf" else _bucket_reader(scheme, rest.split("/")[0], os.getpid())
    except ImportError as error:
        raise DataError(
            f"{url}: wanted the package that reads it, found none ({str(error).partition(':')[0]}); "
            "pip install 'mvlm[remote]'"
        ) from None
    except DataError:
        raise
    except Exception:  # each package has its own exceptions, with credentials in them
        raise DataError(
            f"{url}: wanted a store that can be opened with your settings, found that it cannot; check the URL, the "
            "endpoint and your credentials"
        ) from None


def _judge(place: str, error: Exception) -> str:
    """An error that may pass, in words. Raises DataError for one that will not."""
    status, found = _status_of(error), "an answer that breaks off"
    if status == 412:
        raise changed(place)
    if status in _DENIED:
        raise DataError(
            f"{place}: wanted to read it, found that it is denied (status {status}); set the credentials of its store, "
            "see docs/guides/data.md"
        )
    if status in _MISSING:
        raise DataError(f"{place}: wanted a file, found none (status {status}); check the URL, or link again")
    if status == 416:
        raise ChangedError(
            f"{place}: wanted the file that was linked, found a shorter one (status 416); link it again with "
            "`mvlm data link`"
        )
    if 300 <= status < 400:
        raise DataError(
            f"{place}: wanted its bytes, found a redirect (status {status}); give the URL that it leads to if you "
            "trust it, or the bucket's region as AWS_DEFAULT_REGION"
        )
    if 400 <= status < 500 and status not in _REPEATED:
        raise DataError(f"{place}: wanted its bytes, found status {status}; check the URL")
    if isinstance(error, TooLongError):
        found = "more bytes than asked for"
    elif isinstance(error, _AnswerError):
        found = str(error)
    elif status:
        found = f"status {status}"
    elif isinstance(error, TimeoutError):
        found = "no answer in time"
    elif kind := _KIND.search(str(error)):
        found = _KINDS[kind[1]]
    elif isinstance(error, OSError) and error.errno in (errno.ECONNREFUSED, errno.EHOSTUNREACH, errno.ENETUNREACH):
        found = _NO_CONNECTION
    elif isinstance(error, ConnectionResetError) or type(error).__name__ == "ServerDisconnectedError":  # of aiohttp
        found = _NO_ANSWER
    return found


def _status_of(error: Exception) -> int:
    """Status of the answer that an error tells of; 0 if it tells of none."""
    if isinstance(error, FileNotFoundError):  # the hub's client raises it of an answer with another status too
        return getattr(getattr(error.__cause__, "response", None), "status_code", None) or 404
    if isinstance(error, PermissionError):
        return 403
    for one in (error, getattr(error, "response", None)):
        for name in ("status", "status_code"):
            if isinstance(found := getattr(one, name, None), int):
                return found
    found = _STATUS.search(str(error)[:4096])
    return int(found[1]) if found else 0


def changed(place: str) -> ChangedError:
    """The error for a file that was replaced since it was linked."""
    return ChangedError(
        f"{place}: wanted the file that was linked, found another in its place (its ETag or size differs); link it "
        "again with `mvlm data link`, or restore it"
    )


def _compare(file: LinkedFile, size: int, etag: str | None) -> None:
    if size != file.size or (file.etag and etag != file.etag):
        raise changed(file.url)


# ---- files on a disk


def _local_state(status: os.stat_result) -> tuple[int, str]:
    return status.st_size, f"{status.st_mtime_ns:x}-{status.st_size:x}"


def _stat_local(path: Path) -> LinkedFile:
    try:
        with open_regular(path) as file:
            return LinkedFile(str(path.absolute()), *_local_state(os.fstat(file.fileno())))
    except OSError as error:
        raise DataError(f"{path}: wanted a file, found that it cannot be read: {error.strerror}; check it") from None


def _read_local(file: LinkedFile, begin: int, end: int) -> bytes:
    try:
        with open_regular(Path(file.url)) as opened:
            _compare(file, *_local_state(os.fstat(opened.fileno())))
            content = os.pread(opened.fileno(), end - begin, begin)
            _compare(file, *_local_state(os.fstat(opened.fileno())))
    except OSError as error:
        raise DataError(
            f"{file.url}: wanted a file, found that it cannot be read: {error.strerror}; restore it"
        ) from None
    if len(content) != end - begin:
        raise changed(file.url)
    return content


# ---- buckets, by obstore

# NOTE: clients have threads and connections, which a forked process must not share. So each process has its own.


@cache
def _bucket_reader(scheme: str, bucket: str, process: int) -> _Reader:
    obstore, classes = need("obstore", "remote"), need("obstore.store", "remote")
    settings = s3_settings() if scheme == "s3" else _gs_settings()
    client: dict[str, Any] = {
        "connect_timeout": f"{SILENCE_S}s",
        "read_timeout": f"{SILENCE_S}s",
        "timeout": f"{REQUEST_S}s",
    }
    client["allow_http"] = str(settings.get("endpoint") or settings.get("base_url") or "").startswith("http://")
    store = (classes.S3Store if scheme == "s3" else classes.GCSStore)(
        bucket,
        client_options=client,
        retry_config={"max_retries": 0, "retry_timeout": timedelta(seconds=REQUEST_S)},  # `_attempt` repeats
        **settings,
    )
    start = len(f"{scheme}://{bucket}/")

    def stat(url: str) -> LinkedFile:
        found = obstore.head(store, url[start:])
        return LinkedFile(url, found["size"], found["e_tag"] or "")

    def read(file: LinkedFile, begin: int, end: int) -> Content:
        wanted = {"range": (begin, end), **({"if_match": file.etag} if file.etag else {})}
        found = obstore.get(store, file.url[start:], options=wanted)
        _compare(file, found.meta["size"], found.meta["e_tag"])
        if tuple(found.range) != (begin, end):
            raise _AnswerError(0, "another range")
        return memoryview(found.bytes())

    def names(folder: str) -> Iterator[str]:
        for page in obstore.list(store, folder[start:] or None):
            yield from (f"{scheme}://{bucket}/{one['path']}" for one in page)

    return _Reader(stat, read, names)


def s3_settings() -> dict[str, Any]:
    """Endpoint, region and credentials: fsspec's configuration first, then botocore's chain; anonymous without any."""
    given = dict(need("fsspec.config").conf.get("s3", {}))
    client = dict(given.get("client_kwargs") or {})
    session = need("botocore.session", "remote").get_session()
    names = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
    endpoint = given.get("endpoint_url") or client.get("endpoint_url")
    endpoint = endpoint or next(filter(None, map(os.environ.get, names)), None)
    region = client.get("region_name") or session.get_config_variable("region") or "us-east-1"
    settings: dict[str, Any] = {"region": region, **({"endpoint": endpoint} if endpoint else {})}
    if given.get("key") and given.get("secret"):
        token = {"session_token": given["token"]} if given.get("token") else {}
        return {**settings, "access_key_id": given["key"], "secret_access_key": given["secret"], **token}
    credentials = None if given.get("anon") else session.get_credentials()
    if credentials is None:
        return {**settings, "skip_signature": True}

    def current() -> dict[str, Any]:  # botocore renews them itself
        frozen = credentials.get_frozen_credentials()
        keys = {"access_key_id": frozen.access_key, "secret_access_key": frozen.secret_key, "token": frozen.token}
        return {**keys, "expires_at": datetime.now(UTC) + timedelta(minutes=5)}

    return {**settings, "credential_provider": current}


def _gs_settings() -> dict[str, Any]:
    """Endpoint of fsspec's configuration and Google's default credentials; anonymous without any."""
    given = dict(need("fsspec.config").conf.get("gs", {}))
    settings = {"base_url": given["endpoint_url"]} if given.get("endpoint_url") else {}
    if given.get("token") != "anon":
        try:
            provider = folders.in_time(need("obstore.auth.google", "remote").GoogleCredentialProvider)
            return {**settings, "credential_provider": provider}
        except ImportError:
            raise
        except Exception:  # there are none
            pass
    return {**settings, "skip_signature": True}


# ---- the web, by fsspec's session


@cache
def _web_reader(scheme: str, process: int) -> _Reader:
    filesystem = need("fsspec").filesystem(scheme, **options(scheme))
    sync = need("fsspec.asyn").sync

    async def get(url: str, begin: int, end: int, etag: str) -> tuple[bytearray, int, str]:
        """The content of a range, the size of the file, and its ETag."""
        session = await filesystem.set_session()
        headers = {"Range": f"bytes={begin}-{end - 1}", "Accept-Encoding": "identity"}
        if etag and not etag.startswith("W/"):  # If-Match takes strong ones alone; others are compared here
            headers["If-Match"] = etag
        place = filesystem.encode_url(with_credentials(url))
        async with session.get(place, headers=headers, **filesystem.kwargs) as answer:
            if answer.status == 200:
                raise DataError(
                    f"{url}: wanted a server that sends parts of files, found one that sends them whole; copy the "
                    "files to a store or a disk"
                )
            if answer.status != 206:
                raise _AnswerError(answer.status)
            found = re.fullmatch(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})", answer.headers.get("Content-Range", ""))
            if found is None or int(found[1]) != begin or int(found[2]) >= end:
                raise _AnswerError(0, "another range")
            content, meter = bytearray(), Meter(end - begin)
            async for part in answer.content.iter_any():
                meter.reach(len(content) + len(part))
                content += part
        return content, int(found[3]), answer.headers.get("ETag", "")

    def stat(url: str) -> LinkedFile:
        _, size, etag = sync(filesystem.loop, get, url, 0, 1, "")
        return LinkedFile(url, size, etag)

    def read(file: LinkedFile, begin: int, end: int) -> Content:
        content, size, etag = sync(filesystem.loop, get, file.url, begin, end, file.etag, timeout=REQUEST_S)
        _compare(file, size, etag)
        return content

    return _Reader(stat, read, None)


# ---- the hub, by its own client


@cache
def _hub_reader(process: int) -> _Reader:
    filesystem = need("fsspec").filesystem("hf", **options("hf"))

    def pin(url: str) -> str:
        path, commit = filesystem.resolve_path(url), ""
        if not _COMMIT.fullmatch(path.revision):
            commit = filesystem._api.repo_info(path.repo_id, repo_type=path.repo_type, revision=path.revision).sha
        return f"hf://{path.repo_type}s/{path.repo_id}@{commit or path.revision}/{path.path_in_repo}".rstrip("/")

    def stat(url: str) -> LinkedFile:
        pinned = pin(url)
        return LinkedFile(pinned, filesystem.info(pinned)["size"], filesystem.resolve_path(pinned).revision)

    def read(file: LinkedFile, begin: int, end: int) -> Content:
        with filesystem.open(file.url, "rb", cache_type="none") as opened:
            opened.seek(begin)
            return opened.read(end - begin)

    def names(folder: str) -> Iterator[str]:
        return (f"hf://{path}" for path in filesystem.find(folder))

    return _Reader(stat, read, names, pin)
