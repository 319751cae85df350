"""Debian packages for tests."""

import io
import tarfile
from collections.abc import Mapping
from pathlib import Path


def write_package(path: Path, files: Mapping[str, bytes], below: str) -> Path:
    """Write a Debian package: an `ar` archive of debian-binary, control.tar and data.tar with files in a folder."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:xz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(f"./{below}/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    out = b"!<arch>\n"
    for name, content in (("debian-binary", b"2.0\n"), ("control.tar.xz", b"odd"), ("data.tar.xz", data.getvalue())):
        out += f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(content):<10}`\n".encode() + content
        out += b"\n" * (len(content) % 2)
    path.write_bytes(out)
    return path
