"""WebDataset tars of others: what img2dataset made of CC3M and SBU, and any set of tars with pictures and captions."""

import json
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mvlm_dataloading.captions import decode_text
from mvlm_dataloading.errors import DataError, need
from mvlm_dataloading.records import TOO_LARGE, Piece, Record, Source, file_trace, safe_key

from .files import as_captions

IMAGES = ("jpg", "jpeg", "png", "webp")
_KNOWN = (*IMAGES, "txt", "caption", "json", "cls", "gif", "bmp", "tif", "tiff", "npy", "tok")
_MAX_TEXT = 1 << 22
_TARS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
_TEXTS = ("txt", "caption")


def cc3m(train: Sequence[Path], validation: Sequence[Path] = ()) -> Source:
    """Conceptual Captions 3M as img2dataset downloaded it: folders of 00000.tar with 00000.parquet beside each.

    Raises:
        DataError: a folder is missing or holds no tar.
    """
    return _downloaded(
        "cc3m", {"train": train, "validation": validation}, "Conceptual Captions, https://ai.google.com/research/ConceptualCaptions",
        "captions and links: free for any purpose with acknowledgement; each picture under its own licence",
        "Google LLC",
    )  # fmt: skip


def sbu(train: Sequence[Path], validation: Sequence[Path] = ()) -> Source:
    """SBU captioned photos as img2dataset downloaded them, see `cc3m`."""
    return _downloaded(
        "sbu", {"train": train, "validation": validation}, "SBU Captioned Photo Dataset, https://www.cs.rice.edu/~vo9/sbucaptions",
        "each picture under its own Flickr licence", "Ordonez, Kulkarni and Berg, 2011",
    )  # fmt: skip


def webdataset(
    train: Sequence[Path] = (),
    validation: Sequence[Path] = (),
    test: Sequence[Path] = (),
    *,
    caption_field: str = "caption",
    licence: str = "",
    name: str = "webdataset",
) -> Source:
    """Any WebDataset tars, compressed or not.

    Args:
        train, validation, test: tars, or folders of tars.
        caption_field: where a sample has no `.txt`, its captions are this field of its `.json`, a text or a list.

    Raises:
        DataError: a tar or a folder is missing.
    """
    splits = {"train": train, "validation": validation, "test": test}
    pieces, recipe = _pieces(splits, caption_field=caption_field)
    return Source(name=name, origin="WebDataset tars", licence=licence, recipe=recipe, pieces=pieces)


def _downloaded(name: str, splits: dict[str, Sequence[Path]], origin: str, licence: str, attribution: str) -> Source:
    pieces, recipe = _pieces(splits, caption_field="caption")
    return Source(name=name, origin=origin, licence=licence, recipe=recipe, pieces=pieces, attribution=attribution)


def _pieces(splits: dict[str, Sequence[Path]], caption_field: str) -> tuple[Sequence[Piece], dict[str, Any]]:
    pieces: list[_Tar] = []
    several = sum(bool(paths) for paths in splits.values()) > 1
    for split, paths in splits.items():
        # img2dataset counts the samples of every download from 0.
        prefix = f"{split}-" if several else ""
        pieces += [_Tar(split, tar, prefix, caption_field) for path in paths for tar in find_tars(path)]
    sizes: dict[str, list[Any]] = {}
    for tar in pieces:
        sizes.setdefault(tar.split, []).append(file_trace(tar.path))
    return pieces, {"tars": sizes, "caption_field": caption_field}


def find_tars(path: Path) -> list[Path]:
    """The tars in a folder, or the tar itself. Raises DataError if there is none."""
    if path.is_file():
        return [path]
    found = sorted(p for p in path.glob("*") if p.name.endswith(_TARS)) if path.is_dir() else []
    if not found:
        raise DataError(f"{path}: wanted a tar or a folder of tars, found none; give what was downloaded")
    return found


@dataclass(frozen=True, slots=True)
class _Tar:
    """One tar as a piece."""

    split: str
    path: Path
    prefix: str
    caption_field: str

    @property
    def label(self) -> str:
        return f"{self.split} {self.path.name}"

    def records(self, max_bytes: int) -> Iterator[Record]:
        sidecar = _read_sidecar(self.path.with_suffix(".parquet"))
        found: set[str] = set()
        for sample in read_samples(self.path, max_bytes):
            found.add(sample.key)
            yield self._record(sample, sidecar)
        for key, row in sidecar.items():
            if key not in found and row.get("status") not in (None, "success"):
                yield self._refusal(key, "image was not downloaded")

    def _record(self, sample: "Sample", sidecar: dict[str, dict[str, Any]]) -> Record:
        if sample.fault is not None:
            return self._refusal(sample.key, sample.fault)
        image = next((sample.parts[extension] for extension in IMAGES if extension in sample.parts), None)
        captions, fault = self._captions(sample, sidecar.get(sample.key, {}))
        metadata = _describe(sample.parts.get("json"))
        where = f"{self.path.name}:{sample.key}"
        return Record(safe_key(self.prefix + sample.key), image, captions, where, metadata, fault)

    def _captions(self, sample: "Sample", row: dict[str, Any]) -> tuple[list[str], str | None]:
        text = next((sample.parts[extension] for extension in _TEXTS if sample.parts.get(extension)), None)
        if text is not None:
            content = decode_text(text)
            return (content.split("\n"), None) if content is not None else ([], "caption is not UTF-8")
        fields = _parse_object(sample.parts.get("json"))
        return as_captions(fields.get(self.caption_field)) or as_captions(row.get("caption")), None

    def _refusal(self, key: str, reason: str) -> Record:
        return Record(safe_key(self.prefix + key), None, (), f"{self.path.name}:{key}", fault=reason)


def _describe(text: bytes | None) -> dict[str, Any]:
    """What is kept of img2dataset's metadata: where the picture comes from."""
    fields = _parse_object(text)
    return {name: fields[name] for name in ("url", "image_id", "license") if isinstance(fields.get(name), str | int)}


def _parse_object(text: bytes | None) -> dict[str, Any]:
    try:
        fields = json.loads(text or b"{}")
    except (ValueError, RecursionError):
        return {}
    return fields if isinstance(fields, dict) else {}


def _read_sidecar(file: Path) -> dict[str, dict[str, Any]]:
    """img2dataset's table of a tar by key: status and caption of every link, also of those that failed."""
    if not file.is_file():
        return {}
    parquet, arrow = need("pyarrow.parquet"), need("pyarrow")
    try:
        table = parquet.ParquetFile(file)
        columns = [name for name in ("key", "status", "caption") if name in table.schema_arrow.names]
        rows = table.read(columns=columns).to_pylist()
    except (arrow.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{file}: wanted img2dataset's table, found {error}; remove it or download again") from None
    return {str(row["key"]): row for row in rows if row.get("key") is not None}


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
    return not any(one in sample.parts for one in IMAGES) or not any(one in sample.parts for one in (*_TEXTS, "json"))


def split_member(name: str) -> tuple[str, str]:
    """Key and extension of a member: by the last dot, as names with dots in them are common and `a.seg.png` is not."""
    stem, _, extension = name.rpartition(".")
    return (stem.removeprefix("./"), extension.lower()) if stem and "/" not in extension else (name, "")
