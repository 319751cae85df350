"""A folder of an object store at s3://BUCKET/PATH, written and read by obstore.

Endpoint, region and credentials come from AWS's environment variables, configuration files and roles, and from
fsspec's configuration. No error repeats them, or what the store answered.
"""

import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

from mvlm.errors import ConfigError
from mvlm_dataloading.errors import need
from mvlm_dataloading.links.store import s3_settings
from mvlm_dataloading.urls import normal_url

PART_BYTES = 16 << 20
"""Bytes of a part of an upload, and of what is read at a time."""
MOST_PARTS = 10_000
"""Most parts of a file at S3."""
PARTS_AT_ONCE = 4
RETRY: dict[str, Any] = {"max_retries": 3, "retry_timeout": timedelta(seconds=60)}
"""Attempts at one part, before the whole of a file is tried again."""
SILENCE_S, REQUEST_S = 20, 300
"""Longest time for a connection, and for one request."""
_KIND = re.compile(r"kind: (Connect|Request|Timeout)\b")
_STATUS = re.compile(r"status(?: code)?:? (\d{3})")


class StoreError(Exception):
    """A request to an object store has failed. Its message holds nothing that the store answered.

    `wrong_file` is True if there is no such file or it has another length, `lasting` if a repetition would fail too.
    """

    def __init__(self, words: str, *, wrong_file: bool = False, lasting: bool = False) -> None:
        super().__init__(words)
        self.wrong_file, self.lasting = wrong_file, lasting or wrong_file


class StoreFolder:
    """A folder of an object store. Names are relative to it. Requests that fail raise StoreError.

    ConfigError for a URL of another scheme, MissingPackageError without obstore.
    """

    def __init__(self, url: Path | str) -> None:
        self.url = normal_url(url)
        bucket, _, path = self.url.removeprefix("s3://").partition("/")
        if not self.url.startswith("s3://"):
            raise ConfigError(f"mirror: wanted s3://BUCKET/PATH, got {self.url}; give another place")
        self._obstore, classes = need("obstore", "remote"), need("obstore.store", "remote")
        self._prefix = f"{path}/" if path else ""
        settings = s3_settings()
        client: dict[str, Any] = {"connect_timeout": f"{SILENCE_S}s", "timeout": f"{REQUEST_S}s"}
        client["allow_http"] = str(settings.get("endpoint", "")).startswith("http://")
        self._store = classes.S3Store(bucket, client_options=client, retry_config=RETRY, **settings)

    def names(self, folder: str = "") -> list[str]:
        """Names of all files below a folder, which ends in a slash or is empty."""
        start = len(self._prefix)

        def found() -> list[str]:
            pages = self._obstore.list(self._store, f"{self._prefix}{folder}" or None)
            return [one["path"][start:] for page in pages for one in page]

        return self._do(found)

    def put(self, name: str, content: bytes | Path | Iterable[bytes], size: int) -> None:
        """Store a file of `size` bytes. It is there whole or not at all; a long one travels in parts."""
        part = max(PART_BYTES, -(-size // MOST_PARTS))
        options = {"chunk_size": part, "max_concurrency": PARTS_AT_ONCE}
        self._do(lambda: self._obstore.put(self._store, self._prefix + name, content, **options))

    def read(self, name: str, most: int) -> bytes:
        """Content of a file. StoreError if it has more than `most` bytes."""
        return b"".join(self._blocks(name, 0, most))

    def download(self, name: str, file: Path, size: int) -> str:
        """Write a file of `size` bytes to the disk. Returns the SHA-256. OSError if it cannot be written."""
        digest, count = hashlib.sha256(), 0
        with file.open("xb") as opened:
            for block in self._blocks(name, size, size):
                opened.write(block)
                digest.update(block)
                count += len(block)
            opened.flush()
            os.fsync(opened.fileno())
        if count != size:
            raise StoreError(f"{count} of {size} bytes")
        return digest.hexdigest()

    def delete(self, names: list[str]) -> None:
        """Remove files. One that does not exist is no error."""
        if names:
            self._do(lambda: self._obstore.delete(self._store, [self._prefix + name for name in names]))

    def _blocks(self, name: str, least: int, most: int) -> Iterator[bytes]:
        found = self._do(lambda: self._obstore.get(self._store, self._prefix + name))
        if not least <= (size := found.meta["size"]) <= most:
            raise StoreError(f"{size} bytes where {least} to {most} were wanted", wrong_file=True)
        blocks, left = iter(found.stream(min_chunk_size=PART_BYTES)), most
        while (block := self._do(lambda: next(blocks, None))) is not None:
            left -= len(block)
            if left < 0:
                raise StoreError("more bytes than the store says")
            yield bytes(block)

    def _do(self, request: Any) -> Any:
        try:
            return request()
        except (StoreError, OSError):
            raise  # of the disk
        except Exception as error:  # obstore's, with the answer of the store in them
            raise _judge(error) from None


def _judge(error: Exception) -> StoreError:
    """Translate an error of obstore into a message without its text, which may hold URLs or credentials."""
    kind, text = type(error).__name__, str(error)[:10_000]
    status = _STATUS.search(text)
    if kind == "NotFoundError" or (status and status[1] == "404"):
        return StoreError("no such bucket or file", wrong_file=True)
    if kind in ("PermissionDeniedError", "UnauthenticatedError") or (status and status[1] in ("401", "403")):
        return StoreError("that access is denied with these credentials", lasting=True)
    if status:
        return StoreError(f"status {status[1]}")
    found = _KIND.search(text)
    words = {"Connect": "no connection", "Request": "a connection that broke off", "Timeout": "no answer in time"}
    return StoreError(words[found[1]] if found else "an answer that could not be used")
