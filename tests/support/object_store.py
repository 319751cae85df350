"""Object stores on this machine, for tests of remote data: S3 by moto, Google's by gcp-storage-emulator."""

import contextlib
import os
import socket
from collections.abc import Iterator
from unittest.mock import patch

import fsspec
import fsspec.config
import pytest


@contextlib.contextmanager
def serve_s3(bucket: str) -> Iterator[str]:
    """Serve an empty bucket. Yields the address of the endpoint, which the environment names meanwhile."""
    moto = pytest.importorskip("moto.server")
    boto3 = pytest.importorskip("boto3")
    server = moto.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    address = "http://{}:{}".format(*server.get_host_and_port())
    keys = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_DEFAULT_REGION": "us-east-1"}
    try:
        with patch.dict(os.environ, {**keys, "AWS_ENDPOINT_URL": address}):
            forget_stores()
            boto3.client("s3").create_bucket(Bucket=bucket)
            yield address
    finally:
        forget_stores()
        server.stop()


def forget_stores() -> None:
    """Let new connections read the environment. File systems of S3 keep the endpoint that they began with."""
    pytest.importorskip("s3fs").S3FileSystem.clear_instance_cache()


@contextlib.contextmanager
def serve_gcs(bucket: str) -> Iterator[str]:
    """Serve an empty bucket. Yields the address of the endpoint, which fsspec's configuration names meanwhile."""
    emulator, core = pytest.importorskip("gcp_storage_emulator.server"), pytest.importorskip("gcsfs.core")
    # The class that gcsfs registers asks Google itself, over gRPC, of what kind a bucket is.
    fsspec.register_implementation("gs", core.GCSFileSystem, clobber=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = emulator.create_server("127.0.0.1", port, in_memory=True, default_bucket=bucket)
    server.start()
    address = f"http://127.0.0.1:{port}"
    try:
        with patch.dict(fsspec.config.conf, {"gs": {"endpoint_url": address, "token": "anon"}}):
            yield address
    finally:
        core.GCSFileSystem.clear_instance_cache()
        server.stop()
