"""The samples of a WebDataset tar of others, read from front to end."""

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from .record import TOO_LARGE

IMAGES = ("jpg", "jpeg", "png", "webp")
_KNOWN = (*IMAGES, "txt", "caption", "json", "cls", "gif", "bmp", "tif", "tiff", "npy", "tok")
_MAX_TEXT = 1 << 22
TEXTS = ("txt", "caption")


@dataclass(slots=True)
class Sample:
    """Members of a tar that follow one another under one name."""

    key: str
    parts: dict[str, bytes] = field(default_factory=dict)
    """Content by extension, in lower case."""
    fault: str | None = None


def read_samples(path: Path, max_bytes: int) -> Iterator[Sample]:
    """The samples of a tar, read once from front to end. Nothing is unpacked, and links and devices are passed over.

    A tar that is damaged ends with a sample that says so, whose key is the tar's name.
    """
    sample: Sample | None = None
    damage = None
    try:
        with tarfile.open(path, "r|*") as tar:
            for member in tar:
                if not member.isfile() or member.name.rsplit("/", 1)[-1].startswith("."):
                    continue
                key, extension = split_member(member.name)
                if extension not in _KNOWN:
                    continue
                if sample is None or sample.key != key:
                    if sample is not None:
                        yield sample
                    sample = Sample(key)
                _add(sample, tar, member, extension, max_bytes)
    except (tarfile.TarError, EOFError, OSError, ValueError) as error:
        damage = "tar is damaged from here on" if sample else f"tar cannot be read ({type(error).__name__})"
    if sample is not None:
        if damage is not None and sample.fault is None and _is_cut(sample):
            sample.fault = damage
        yield sample
    if damage is None and path.suffix == ".tar" and not has_end(path):
        damage = "tar ends early"
    if damage is not None:
        yield Sample(path.name, fault=damage)


def has_end(path: Path) -> bool:
    """Whether a tar has the empty block at its end, which one that was cut between two members has not."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - tarfile.BLOCKSIZE))
        return file.read() == bytes(tarfile.BLOCKSIZE)


def _add(sample: Sample, tar: tarfile.TarFile, member: tarfile.TarInfo, extension: str, max_bytes: int) -> None:
    if extension in sample.parts or (extension in IMAGES and any(one in sample.parts for one in IMAGES)):
        sample.fault = "key names two files of a kind"
        return
    if member.size > (max_bytes if extension in IMAGES else _MAX_TEXT):
        sample.fault = TOO_LARGE if extension in IMAGES else "caption is too long"
        return
    file = tar.extractfile(member)
    content = file.read() if file is not None else b""
    sample.parts[extension] = content
    if len(content) != member.size:
        sample.fault = "tar ends inside this sample"


def _is_cut(sample: Sample) -> bool:
    return not any(one in sample.parts for one in IMAGES) or not any(one in sample.parts for one in (*TEXTS, "json"))


def split_member(name: str) -> tuple[str, str]:
    """Key and extension of a member: by the last dot, as names with dots in them are common and `a.seg.png` is not."""
    stem, _, extension = name.rpartition(".")
    return (stem.removeprefix("./"), extension.lower()) if stem and "/" not in extension else (name, "")
