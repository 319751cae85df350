"""Transfers of files from remote stores, each bounded in bytes and in time while it lasts.

Nothing is read whole and judged afterwards. A transfer ends as soon as more bytes come than it may have. A connection
that is silent ends after `SILENCE_S`, one that sends less than `LEAST_BYTES` in `WINDOW_S` too. `options` are those of
the file systems of fsspec: their answers of the web and of Google's store are `_answer_class`, which limits what they
read at once, and takes neither compressed answers nor redirects to other hosts. The hub's client has the hub's own
redirects; S3 has none.
"""

import asyncio
import functools
import io
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from mvlm_dataloading.errors import DataError, need
from mvlm_dataloading.urls import WEB, shown

SILENCE_S = 30
"""A connection that sends nothing for this long is given up, and one that is not made by then."""
ANSWER_S = 60
"""Longest time from a request to the end of the answer's head."""
WINDOW_S, LEAST_BYTES = 60, 60_000
"""A transfer that brings fewer bytes in such a time is given up."""
WHOLE_BYTES = 64 << 20
"""Most bytes of the answers that a file system reads at once: those of a page of a listing, or of one request."""
_REDIRECTS = (301, 302, 303, 307, 308)

_left: ContextVar[list[int] | None] = ContextVar("left", default=None)
"""Bytes that a server may still send in answers to a listing of a folder, a list of one number; None outside one."""


class TooLongError(Exception):
    """A remote file has more bytes than it may have. The message is the number of bytes that it may have."""


class Meter:
    """Guard of one transfer: counts its bytes, and ends it if it has more than `limit` bytes or is too slow.

    Attributes:
        latest: monotonic time at which bytes last came; 0 before the first.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self.latest = 0.0
        self._since, self._before = time.monotonic(), 0

    def expect(self, size: int | None) -> None:
        """Raise TooLongError for a size that a store states, if it is too large."""
        if size is not None and size > self.limit:
            raise TooLongError(self.limit)

    def begin(self, size: int | None, begin: "Begin") -> Path:
        """Check the size that a store states, if any, and return the path to write to, which `begin` gives.

        A stated size becomes the limit of the transfer. begin: called with the most bytes that the file will have.
        """
        self.expect(size)
        self.limit = self.limit if size is None else size
        return begin(self.limit)

    def reach(self, count: int) -> None:
        """Record that the first `count` bytes have come. TooLongError for too many, OSError if they are slow."""
        self.expect(count)
        self.latest = now = time.monotonic()
        if now - self._since >= WINDOW_S:
            if count - self._before < LEAST_BYTES:
                raise OSError(f"only {count - self._before} bytes in {now - self._since:.0f} s")
            self._since, self._before = now, count


class _MeteredFile(io.BufferedWriter):
    """A new file, whose bytes are counted before they are written."""

    def __init__(self, path: Path, meter: Meter):
        super().__init__(io.FileIO(path, "wb"))
        self._meter = meter

    def write(self, content: Any, /) -> int:
        self._meter.reach(self.tell() + len(content))
        return super().write(content)


Begin = Callable[[int], Path]
"""Called with the most bytes that a file will have, before it is transferred. Returns the path to write it to."""


def transfer(filesystem: Any, protocol: str, path: str, meter: Meter, listed: int | None, begin: Begin) -> Path:
    """Transfer a remote file to the path that `begin` returns.

    Args:
        filesystem: of fsspec, for the protocol (s3, gs, hf, http or https) and the path.
        meter: new, with the limit of the file.
        listed: size in bytes that the store lists, if it is known.

    Raises:
        TooLongError: the file has more bytes than its limit. A part of it may be left on the disk.
    """
    if protocol in WEB:
        return need("fsspec.asyn").sync(filesystem.loop, _stream, filesystem, path, meter, begin)
    place = meter.begin(listed, begin)
    if protocol == "hf":
        with _MeteredFile(place, meter) as file:
            filesystem.get_file(path, file)
    else:
        filesystem.get_file(path, str(place), callback=_callback_class()(meter))
    return place


async def _stream(filesystem: Any, url: str, meter: Meter, begin: Begin) -> Path:
    session = await filesystem.set_session()
    async with session.get(filesystem.encode_url(url), **filesystem.kwargs) as answer:
        if answer.status == 404:
            raise FileNotFoundError(url)
        answer.raise_for_status()
        if answer.status != 200:  # a part, for example, which nobody asked for
            raise OSError(f"status {answer.status} in place of 200")
        place = meter.begin(answer.content_length, begin)
        with _MeteredFile(place, meter) as file:
            async for part in answer.content.iter_any():
                file.write(part)
    return place


@functools.cache
def _callback_class() -> type:
    class Progress(need("fsspec.callbacks").Callback):
        """Callback of an fsspec transfer that reports its bytes to a `Meter`."""

        def __init__(self, meter: Meter):
            super().__init__()
            self._meter, self._count = meter, 0

        def set_size(self, size: int | None) -> None:
            self._meter.expect(size)

        def relative_update(self, inc: int = 1) -> None:
            self._count += inc
            self._meter.reach(self._count)

    return Progress


@contextmanager
def listing(limit: int) -> Iterator[None]:
    """Context in which the HTTP answers that are read whole, as a listing, have at most `limit` bytes together."""
    before = _left.set([limit])
    try:
        yield
    finally:
        _left.reset(before)


@functools.cache
def _answer_class() -> type:
    class Answer(need("aiohttp", "remote").ClientResponse):
        """HTTP answer that is refused if it is late, redirects to another host, or is compressed on the way."""

        async def start(self, connection: Any) -> Any:
            try:
                async with asyncio.timeout(ANSWER_S):
                    await super().start(connection)
            except TimeoutError as error:
                raise OSError(str(error) or f"no answer in {ANSWER_S} s") from None
            location = self.headers.get("Location") or self.headers.get("URI")
            if self.status in _REDIRECTS and location is not None:
                _require_same_host(self.url, location)
            encoding = self.headers.get("Content-Encoding", "identity").lower()
            if self.status < 300 and encoding not in ("identity", ""):
                raise DataError(
                    f"{shown(self.url)}: wanted the bytes of the file, found them compressed ({shown(encoding)}); let "
                    "the server send them as they are"
                )
            return self

        async def read(self) -> bytes:
            if self._body is None:
                left, mine, parts = _left.get() or [WHOLE_BYTES], WHOLE_BYTES, []
                async for part in self.content.iter_any():
                    left[0], mine = left[0] - len(part), mine - len(part)
                    if min(left[0], mine) < 0:
                        self.close()
                        raise DataError(
                            f"{shown(self.url)}: wanted a short answer, found one of many megabytes; check the URL"
                        )
                    parts.append(part)
                self._body = b"".join(parts)
            return await super().read()

    return Answer


def _require_same_host(url: Any, location: str) -> None:
    """Raise DataError for a redirect of a yarl.URL to another host or port. From http to https of the host is allowed.

    aiohttp reads the location by the same package, so that it goes where this looks.
    """
    try:
        new = url.join(type(url)(location))
        upgraded = (url.scheme, new.scheme) == ("http", "https") and new.port in (url.port, 443)
        good = url.host == new.host and ((url.scheme, url.port) == (new.scheme, new.port) or upgraded)
        where = f"{new.scheme}://{new.host}:{new.port}"
    except ValueError:
        good, where = False, "no URL"
    if not good:
        raise DataError(
            f"{shown(url)}: wanted its files on this host, found a redirect to {shown(where)}; give the URL of that "
            "host if you trust it"
        )


def options(protocol: str) -> dict[str, Any]:
    """Options of fsspec's file system of a protocol. What a user has set in its configuration is added, and wins.

    A user's options of requests of the web keep the limits of this module.
    """
    given = dict(need("fsspec.config").conf.get(protocol, {}))
    if protocol in WEB:
        return {**given, "client_kwargs": _session(given.get("client_kwargs"), trust_env=True)}
    if protocol == "gs":
        session = _session(given.get("session_kwargs"))
        return {"requests_timeout": session["timeout"], **given, "session_kwargs": session}
    if protocol == "s3":
        # `attempt` repeats. Without this, botocore repeats each of s3fs's repetitions.
        settings = {"connect_timeout": SILENCE_S, "read_timeout": SILENCE_S, "retries": {"max_attempts": 0}}
        return {"config_kwargs": settings, **given}
    return given


def _session(given: Any, **further: Any) -> dict[str, Any]:
    """Arguments of an aiohttp session: `given` by the user and `further` ones, with the limits of this module.

    Nothing is decompressed: a small answer could else be as large as it likes. By default aiohttp would also end a
    transfer after five minutes, however well it goes.
    """
    given = dict(given) if isinstance(given, dict) else {}
    wait = {"connect": SILENCE_S, "sock_connect": SILENCE_S, "sock_read": SILENCE_S}
    timeout = need("aiohttp", "remote").ClientTimeout(total=None, **wait)
    fixed = {"auto_decompress": False, "response_class": _answer_class()}
    headers = {**(given.get("headers") or {}), "Accept-Encoding": "identity"}
    return {"timeout": timeout, **further, **given, **fixed, "headers": headers}
