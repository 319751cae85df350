"""Tars of other tools: a scan in one sequential read.

Names are split as webdataset does: the key ends at the first dot of the last part of the path. Neighbours with the same
key are a sample.
"""

from collections.abc import Iterator, Set
from dataclasses import dataclass
from typing import Any, cast

from mvlm_dataloading.dataset.sample_index import ABSENT, BLOCK
from mvlm_dataloading.errors import DataError
from mvlm_dataloading.images.limits import TOO_LARGE
from mvlm_dataloading.tar_walk import DamagedTar, TarWalk

from .scan import MAX_IMAGE, NO_TEXT, Scan, ScanOptions, columns_of, image_fault
from .store import LinkedFile, RangeStore, SequentialFile

IMAGES = frozenset(("jpg", "jpeg", "jpe", "jfif", "png", "webp", "gif", "bmp", "tif", "tiff"))
"""Last words of the extensions of images."""
MAX_TEXT = 4 << 20
"""Largest file of captions."""
_PACKED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\x00": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


def scan_tar(store: RangeStore, linked: LinkedFile, options: ScanOptions) -> Scan:
    """Scan a tar. Of a tar that was cut, the samples before the cut are taken, with a warning.

    Raises:
        DataError: it cannot be read, is compressed, or has blocks that belong to no member.
    """
    found = Scan(columns_of(options.captions))
    head = bytes(store.read(linked, 0, min(8, linked.size)))
    for magic, name in _PACKED.items():
        if head.startswith(magic):
            raise DataError(
                f"{linked.url}: wanted an uncompressed tar, found one packed by {name}; unpack it, or convert it with "
                "`mvlm data webdataset`"
            )
    file = SequentialFile(store, linked)
    try:
        for key, members in _samples(TarWalk(cast(Any, file), MAX_IMAGE), set(options.captions.files)):
            _add(found, key, members, options)
    except DamagedTar as damage:
        if not damage.cut:
            raise DataError(
                f"{linked.url}: wanted a tar whose every block belongs to a file of it, found {damage}; restore it, or "
                "leave it out"
            ) from None
        found.left_out["tar ends early"] += 1
        found.warning = f"{linked.url}: wanted a whole tar, found its end at byte {damage.offset}; the samples before "
        found.warning += "are linked"
    finally:
        file.close()
    return found


@dataclass(slots=True)
class _Member:
    """A file of a sample: its place, the content of a text, and the fault of an image."""

    block: int
    size: int
    content: bytes | None = None
    image: bool = False
    fault: str | None = None


def _samples(walk: TarWalk, texts: Set[str]) -> Iterator[tuple[str, dict[str, _Member]]]:
    """Key and files of each sample, by extension. Of the others than images, those in `texts` are read."""
    key, members = "", dict[str, _Member]()
    images: dict[str, _Member] = {}  # by name, for hard links to them
    try:
        for member in walk:
            own, extension = split_name(member.name)
            if not extension:  # also of ._a.jpg, which macOS puts beside a.jpg
                continue
            if own != key:
                if members:
                    yield key, members
                key, members = own, {}
            if member.islnk() and member.linkname in images:
                members.setdefault(extension, images[member.linkname])
            elif member.isfile() and not member.issparse():
                one = _Member(member.offset_data // BLOCK, member.size)
                if extension in IMAGES or extension.rpartition(".")[2] in IMAGES:
                    images[member.name], one.image = one, True
                    one.fault = image_fault(walk.read(member)) if member.size <= MAX_IMAGE else TOO_LARGE
                elif extension in texts and member.size <= MAX_TEXT:
                    one.content = walk.read(member)
                members.setdefault(extension, one)
    except DamagedTar as damage:
        if damage.cut and members:  # it may be whole; without its image or its captions it is left out
            yield key, members
        raise
    if members:
        yield key, members


def split_name(name: str) -> tuple[str, str]:
    """Key and extension of a member's name, the latter in lower case, as webdataset splits them."""
    path = name.removeprefix("./")
    begin = path.rfind("/") + 1
    dot = path.find(".", begin)
    return (path[:dot], path[dot + 1 :].lower()) if dot > begin else (name, "")


def _add(found: Scan, key: str, members: dict[str, _Member], options: ScanOptions) -> None:
    for name in members:
        found.fields[name] += 1  # several times as fast as `update`
    images = [name for name, member in members.items() if member.image]
    if options.image:
        images = [name for name in (options.image.lower(),) if name in images]
    if len(images) != 1:
        found.left_out["several images (--image names one)" if images else "no image"] += 1
        return
    image, spec = members[images[0]], options.captions
    captions, _ = spec.captions({name: members[name].content for name in spec.files if name in members})
    if not captions or image.fault is not None:
        found.left_out[image.fault or "no caption"] += 1
        return
    texts = [
        (one.block, one.size) if (one := members.get(name)) is not None and one.content is not None else NO_TEXT
        for name in spec.files
    ]
    if max(image.block, *[block for block, _ in texts]) >= ABSENT:
        found.left_out["beyond 2 TiB of a tar"] += 1
        return
    found.add(key, image.block, image.size, texts, len(captions))
