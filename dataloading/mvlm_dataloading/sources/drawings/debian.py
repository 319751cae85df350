"""Files of a Debian package, read from the package file as it is: nothing is installed."""

import io
import lzma
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from mvlm_dataloading.errors import DataError


def package_files(package: Path, wanted: Callable[[str, int], bool], name: str) -> Iterator[tuple[str, bytes]]:
    """Yield path and content of the files of a package, by path.

    Args:
        wanted: says whether to read a file of this path and size.
        name: name of the package, for messages.

    Raises:
        DataError: the file is no Debian package, or a damaged one.
    """
    content, found = _data_archive(package, name), {}
    try:
        with tarfile.open(fileobj=io.BytesIO(content)) as archive:
            for member in archive:  # in the archive's order: a compressed one cannot be read backwards
                path = member.name.removeprefix("./")
                if member.isfile() and wanted(path, member.size):
                    file = archive.extractfile(member)
                    assert file is not None
                    found[path] = file.read()
    except (tarfile.TarError, EOFError, OSError, lzma.LZMAError, zlib.error) as error:
        raise DataError(
            f"{package}: wanted a Debian package ({name}_*.deb) packed with xz or gzip, found {type(error).__name__}; "
            f"fetch Debian's, Ubuntu packs with zstd"
        ) from None
    yield from sorted(found.items())


def _data_archive(package: Path, name: str) -> bytes:
    """The archive data.tar.* of a Debian package, which is an `ar` archive of three members."""
    wanted = f"{package}: wanted a Debian package ({name}_*.deb), found"
    with package.open("rb") as file:
        if file.read(8) != b"!<arch>\n":
            raise DataError(f"{wanted} another file; fetch it with `apt-get download {name}`")
        while len(head := file.read(60)) == 60:
            member, size = head[:16].decode("ascii", "replace").strip(" /"), head[48:58].strip()
            if not size.isdigit():
                break
            if member.startswith("data.tar"):
                content = file.read(int(size))
                if len(content) < int(size):
                    break
                return content
            file.seek(int(size) + int(size) % 2, io.SEEK_CUR)
    raise DataError(f"{wanted} a damaged one; fetch it again with `apt-get download {name}`")
