"""A stand-in for the Hugging Face hub, for its own client, that serves a folder as a data set."""

import contextlib
import hashlib
import http.server
import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import patch
from urllib.parse import parse_qs, unquote, urlsplit

import fsspec.config

from mvlm_dataloading.links import store

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Handler(http.server.BaseHTTPRequestHandler):
    """Sends JSON."""

    protocol_version = "HTTP/1.1"

    def send(self, content: Any, status: int = 200, kind: str = "application/json") -> None:
        """Send bytes, or a value as JSON."""
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        if status == 404:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextlib.contextmanager
def serving(handler: type[Handler]) -> Iterator[str]:
    """Serve from a thread. Yields the address."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class DataHandler(Handler):
    """The requests that `HfFileSystem` makes to read a public data set: its info, its files, and their content."""

    folder: ClassVar[Path]
    name: ClassVar[str]
    token: ClassVar[str]
    asked: ClassVar[list[str]]

    def refuses(self) -> bool:
        """Note the request, and refuse it without the token of a private data set."""
        self.asked.append(unquote(urlsplit(self.path).path))
        if refused := self.token != "" and self.headers.get("Authorization") != f"Bearer {self.token}":
            self.send({"error": "Invalid username or password."}, 401)
        return refused

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if self.refuses():
            return None
        if re.fullmatch(rf"/api/datasets/{self.name}(?:/revision/\w+)?", path):
            return self.send({"id": self.name, "sha": COMMIT, "siblings": [], "tags": [], "private": False})
        if found := re.fullmatch(rf"/api/datasets/{self.name}/tree/\w+/?(.*)", path):
            inside = self.folder / found[1]
            if not inside.is_dir():
                return self.send(b"", 404)
            deep = parse_qs(urlsplit(self.path).query).get("recursive") == ["true"]
            return self.send([self._entry(file) for file in sorted(inside.rglob("*") if deep else inside.iterdir())])
        found = re.fullmatch(rf"/datasets/{self.name}/resolve/\w+/(.+)", path)
        if found and (self.folder / found[1]).is_file():
            content = (self.folder / found[1]).read_bytes()
            if part := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):
                return self.send(content[int(part[1]) : int(part[2]) + 1], 206, kind="application/octet-stream")
            return self.send(content, kind="application/octet-stream")
        return self.send(b"", 404)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        path = urlsplit(self.path).path
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.refuses():
            return None
        names = parse_qs(content.decode()).get("paths", [])
        if not path.startswith(f"/api/datasets/{self.name}/paths-info/"):
            return self.send(b"", 404)
        return self.send([self._entry(self.folder / n) for n in names if n and (self.folder / n).is_file()])

    def _entry(self, file: Path) -> dict[str, Any]:
        content = file.read_bytes() if file.is_file() else b""
        digest = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        kind = {"type": "file", "size": len(content)} if file.is_file() else {"type": "directory"}
        return {**kind, "path": str(file.relative_to(self.folder)), "oid": digest}


@contextlib.contextmanager
def serve_data(folder: Path, name: str, token: str = "") -> Iterator[tuple[str, list[str]]]:
    """Serve a folder as a data set of a hub, private with a token. Yields the address and the paths asked for."""
    asked: list[str] = []
    names = {"folder": folder, "name": name, "token": token, "asked": asked}
    with serving(type("Hub", (DataHandler,), names)) as address:
        yield address, asked


@contextlib.contextmanager
def serve_hub(folder: Path, name: str, token: str = "") -> Iterator[list[str]]:
    """`serve_data` as the hub that fsspec's configuration names, without a token. Yields the paths asked for."""
    from huggingface_hub import HfFileSystem

    with serve_data(folder, name, token) as (address, asked):
        try:
            with patch.dict(fsspec.config.conf, {"hf": {"endpoint": address, "token": False}}):
                yield asked
        finally:
            HfFileSystem.clear_instance_cache()
            store._hub_reader.cache_clear()
