"""Tux Paint's stamps: photographs and drawings, cut out, with an English sentence each, from a Debian package.

The package `tuxpaint-stamps-default` (GPL-2) is read as it is; nothing is installed. Letters and other symbols
are left out, and so are stamps without a sentence. About two thirds of the others are photographs.
"""

import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mvlm_dataloading.errors import DataError, need
from mvlm_dataloading.sources.record import (
    Record,
    Source,
    check_shares,
    file_sha256,
    require_file,
    safe_key,
    split_by_hash,
)

from .debian import package_files
from .rendered import rendered_pieces
from .svg import cut_out

LICENCE = "GPL-2"
PACKAGE = "tuxpaint-stamps-default"
_REVISION = 1  # increment when captions, images or splits change
_STAMPS = "usr/share/tuxpaint/stamps/"
_PIECE = 128


@dataclass(frozen=True, slots=True)
class Stamp:
    """A stamp and its first English sentence, "" if it has none."""

    name: str
    """Path below the folder of stamps, without its ending."""
    png: bytes
    sentence: str


def stamps(package: Path, *, size: int = 144, validation: float = 0.2, test: float = 0.2) -> Source:
    """Stamps with their sentences.

    Args:
        package: the file tuxpaint-stamps-default_*.deb.
        size: side of the square images in pixels.
        validation, test: shares of the stamps, chosen by a hash of the name without numbers, so that series such as
            rocket1 to rocket5 stay together.

    Raises:
        DataError: the file is missing or no such package.
    """
    if size < 16:
        raise DataError(f"stamps: wanted size >= 16, got {size}")
    check_shares(validation, test)
    records: dict[str, list[Record]] = {"test": [], "train": [], "validation": []}
    for stamp in read_stamps(package):
        if stamp.name.startswith("symbols/") or not stamp.sentence:
            continue
        series = re.sub(r"[\d_-]+$", "", stamp.name)
        metadata = {
            "base": _subject(stamp.sentence),
            "category": stamp.name.rpartition("/")[0],
            "cartoon": "/cartoon/" in stamp.name,
            "licence": LICENCE,
        }
        record = Record(safe_key(stamp.name), stamp.png, [stamp.sentence], stamp.name, metadata)
        records[split_by_hash(series, validation, test)].append(record)
    if not any(records.values()):
        raise DataError(f"{package}: wanted stamps with sentences, found none; give Debian's {PACKAGE}_*.deb")
    return Source(
        name="stamps",
        origin=f"Tux Paint stamps, {package.name}",
        licence=LICENCE,
        attribution="Tux Paint stamps, Bill Kendrick and contributors",
        recipe={
            "revision": _REVISION,
            "package": file_sha256(package),
            "size": size,
            "validation": validation,
            "test": test,
        },
        pieces=rendered_pieces(records, size, _on_white, _PIECE),
    )


def read_stamps(package: Path) -> Iterator[Stamp]:
    """Yield the stamps of a package, by name, without the mirrored ones. DataError for another file."""
    require_file(package)

    def wanted(name: str, size: int) -> bool:
        return name.startswith(_STAMPS) and name.endswith((".png", ".txt"))

    files = {name.removeprefix(_STAMPS): content for name, content in package_files(package, wanted, PACKAGE)}
    for name, content in files.items():
        if name.endswith(".png") and not name.endswith("_mirror.png"):
            stem = name.removesuffix(".png")
            lines = files.get(f"{stem}.txt", b"").decode("utf-8", "replace").splitlines()
            yield Stamp(stem, content, " ".join(lines[0].split()) if lines else "")


def _subject(sentence: str) -> str:
    """Words of a sentence's first clause, without article: "frog" of "A frog."."""
    clause = re.split(r"[.!?(,]", sentence.lower())[0]
    return re.sub(r"^(an?|the) ", "", " ".join(clause.split()))


def _on_white(png: bytes, size: int) -> bytes:
    """A stamp as large as fits a white square with a margin of a 16th, never enlarged, as a PNG."""
    pil = need("PIL.Image")
    cutout = pil.open(io.BytesIO(cut_out(png, size - 2 * (size // 16))))
    canvas = pil.new("RGB", (size, size), "white")
    canvas.paste(cutout, ((size - cutout.width) // 2, (size - cutout.height) // 2), cutout)
    out = io.BytesIO()
    canvas.save(out, "PNG")
    return out.getvalue()
