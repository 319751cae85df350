"""WebDataset tars that other tools wrote: CC3M and SBU by img2dataset, and any tars with images and captions."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from mvlm_dataloading.captions import decode_text, is_visible
from mvlm_dataloading.errors import DataError, need
from mvlm_dataloading.untrusted import read_regular

from .files import captions_in_cell, published_files, refuse_repeated_files
from .record import (
    Record,
    Source,
    check_shares,
    file_fingerprint,
    file_sha256,
    is_evaluation,
    looks_like_evaluation,
    safe_key,
    source,
    split_by_hash,
)
from .tar_samples import CAPTION_EXTENSIONS, IMAGE_EXTENSIONS, TarSample, read_samples

_TARS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
_COMPARED = 16
"""Number of a tar's first samples whose keys are compared with those of other tars."""


_LISTS = {
    "cc3m": (
        "Conceptual Captions, https://ai.google.com/research/ConceptualCaptions",
        "captions and links: free for any purpose with acknowledgement; each image under its own licence",
        "Google LLC",
    ),
    "sbu": (
        "SBU Captioned Photo Dataset, https://www.cs.rice.edu/~vo9/sbucaptions",
        "each image under its own Flickr licence",
        "Ordonez, Kulkarni and Berg, 2011",
    ),
}
"""Origin, licence and attribution of the published lists of image links that `cc3m` builds."""


@source
def cc3m(
    train: Sequence[Path], validation: float | tuple[Path, ...] = (), *, name: Literal["cc3m", "sbu"] = "cc3m"
) -> Source:
    """Conceptual Captions 3M, or SBU's table of captions, as img2dataset downloads them.

    Args:
        train: Folders of img2dataset's tars and tables: 00000.tar with 00000.parquet, and so on.
        validation: Folders of the validation split, or a share of the train split, chosen by a hash of the image.
        name: Which of the two lists it is: dataset.json states its origin and licence.
    """
    origin, licence, attribution = _LISTS[name]
    pieces, recipe = tar_pieces({"train": train, "validation": validation})
    return Source(name=name, origin=origin, licence=licence, recipe=recipe, pieces=pieces, attribution=attribution)


@source
def webdataset(
    train: Sequence[Path] = (),
    validation: float | tuple[Path, ...] = (),
    test: float | tuple[Path, ...] = (),
    *,
    caption_field: str = "caption",
    prefix_keys: bool = False,
    licence: str = "",
    name: str = "webdataset",
) -> Source:
    """Any WebDataset tars. (`mvlm data index` uses tars in place, with images unchecked.)

    Args:
        train: Tars, or folders of tars, of the train split. They may be compressed.
        validation: Tars, or folders of tars, of the validation split, or a share of train, chosen by a hash of the
            image.
        test: Tars, or folders of tars, of the test split, or a share of train, chosen by a hash of the image.
        caption_field: Field of a sample's .json with its captions, if it has no .txt.
        prefix_keys: Put the tar's name before all keys. For tars whose first 16 keys differ and later ones do not.
        licence: Licence to state in dataset.json.
        name: Name to state in dataset.json.

    Raises:
        DataError: a tar or a folder is missing, or a folder of `train` has tars of an evaluation split.
    """
    splits = {"train": train, "validation": validation, "test": test}
    pieces, recipe = tar_pieces(splits, caption_field, prefix_keys)
    return Source(name=name, origin="WebDataset tars", licence=licence, recipe=recipe, pieces=pieces)


def tar_pieces(
    splits: Mapping[str, Sequence[Path] | float], caption_field: str = "caption", prefix_keys: bool = False
) -> tuple["list[TarPiece]", dict[str, Any]]:
    """Make the pieces of a build from tars, with keys that do not collide.

    Returns the pieces, and the part of a recipe that describes them.

    Args:
        splits: tars and folders of tars of each split, or the share of train that the split takes.
        caption_field, prefix_keys: as for `webdataset`.
    """
    tars: list[TarPiece] = []
    given = {split: paths for split, paths in splits.items() if not isinstance(paths, int | float)}
    shares = {split: share for split, share in splits.items() if isinstance(share, int | float)}
    check_shares(shares.get("validation", 0.0), shares.get("test", 0.0))
    all_paths = [path for paths in given.values() for path in paths]
    several = sum(bool(paths) for paths in given.values()) > 1
    for split, paths in given.items():
        # img2dataset numbers the samples of every download from 0.
        prefix = f"{split}-" if several else ""
        folders = [find_tars(path, all_paths) for path in paths]
        if split == "train":
            _refuse_evaluation_tars(paths, folders)
        for tar, own in _with_key_prefixes(paths, folders, prefix_keys):
            sidecar = tar.with_suffix(".parquet")
            table = file_sha256(sidecar) if sidecar.is_file() else None
            tars.append(TarPiece(split, tar, prefix + own, caption_field, tuple(file_fingerprint(tar)), table))
    refuse_repeated_files(tar.path for tar in tars)
    _refuse_copies(tars)
    sizes: dict[str, list[Any]] = {}
    for tar in tars:
        table = [] if tar.table_sha256 is None else [tar.table_sha256]
        sizes.setdefault(tar.split, []).append([*tar.fingerprint, tar.prefix, *table])
    pieces = [piece for tar in tars for piece in tar.divided(shares)]
    return pieces, {"tars": sizes, "caption_field": caption_field, **shares}


def _refuse_copies(pieces: "Sequence[TarPiece]") -> None:
    """Raise DataError if a training tar has the same bytes as one of an evaluation split.

    All its images would be left out of training.
    """
    held_out = {tar.fingerprint[1:]: tar for tar in pieces if is_evaluation(tar.split)}
    for tar in pieces:
        other = held_out.get(tar.fingerprint[1:])
        if tar.split == "train" and other is not None and file_sha256(tar.path) == file_sha256(other.path):
            raise DataError(
                f"{tar.path}: wanted training tars that are in no evaluation split, found the same bytes in "
                f"{other.path} of {other.split}; name one of them, with the option of its split"
            )


def _refuse_evaluation_tars(paths: Sequence[Path], folders: list[list[Path]]) -> None:
    for path, tars in zip(paths, folders, strict=True):
        for tar in tars:
            between = tar.parent.relative_to(path).parts if tar != path else ()
            if found := [name for name in between if looks_like_evaluation(name.lower())]:
                raise DataError(
                    f"{tar}: wanted tars of the train split, found the folder {found[0]}; name it with the option of "
                    "its split, or name the tars of the train split one by one"
                )


def _with_key_prefixes(paths: Sequence[Path], folders: list[list[Path]], prefix_keys: bool) -> list[tuple[Path, str]]:
    """The tars, each with a prefix for its keys, which is empty unless another tar has some of the same first keys.

    If folders have keys in common (img2dataset numbers each folder from 0), the prefix is the number of the folder. If
    tars of one folder have keys in common, it is the tar's name. With `prefix_keys` it is both. It depends only on the
    content of the tars, so a resumed build uses the same.
    """
    keys = [[set() if prefix_keys else _first_keys(tar) for tar in tars] for tars in folders]
    numbered = _overlap([set().union(*known) for known in keys]) or (prefix_keys and len(folders) > 1)
    found = []
    for number, (path, tars, known) in enumerate(zip(paths, folders, keys, strict=True)):
        named = _overlap(known) or prefix_keys
        for tar in tars:
            name = "-".join(tar.relative_to(path).parts) or tar.name
            stem = next((name.removesuffix(end) for end in _TARS if name.endswith(end)), name)
            found.append((tar, (f"{number}-" if numbered else "") + (f"{stem}-" if named else "")))
    return found


def _first_keys(tar: Path) -> set[str]:
    # `read_samples` reports damage with the tar's name as the key.
    return {sample.key for sample in islice(read_samples(tar, 0), _COMPARED)} - {tar.name}


def _overlap(sets: list[set[str]]) -> bool:
    return len(set().union(*sets)) < sum(map(len, sets))


def find_tars(path: Path, given: Sequence[Path] = ()) -> list[Path]:
    """The tars under a folder, or the tar itself. Raises DataError if none is found.

    Args:
        given: paths that are read too. The tars of a folder among them, below this one, are left to it.
    """
    if path.is_file():
        return [path]
    apart = [other for other in given if other.is_dir() and other != path and other.is_relative_to(path)]
    files = published_files(path) if path.is_dir() else []
    found = [file for file in files if file.name.endswith(_TARS) and not any(map(file.is_relative_to, apart))]
    if not found:
        raise DataError(f"{path}: wanted a tar or a folder of tars, found none; give the downloaded folder")
    return found


@dataclass(frozen=True, slots=True)
class TarPiece:
    """Piece of a build that reads one tar, or the share of its samples that goes to one split."""

    split: str
    path: Path
    prefix: str
    caption_field: str
    fingerprint: tuple[Any, ...]
    """Result of `file_fingerprint` when the tar was listed. A build refuses a tar that has changed since."""
    table_sha256: str | None = None
    """Hash of img2dataset's table beside the tar, which a build refuses too if it differs; None without a table."""
    shares: Mapping[str, float] | None = None
    """Shares of the tar's samples that go to evaluation splits. The piece then has the samples of `split` alone. None:
    all samples."""

    @property
    def label(self) -> str:
        return f"{self.split} {self.path.name}"

    def divided(self, shares: Mapping[str, float]) -> "list[TarPiece]":
        """The tar as a piece for each split that has a share of it. Only tars of train are divided."""
        if self.split != "train" or not any(shares.values()):
            return [self]
        return [replace(self, split=split, shares=shares) for split in ("train", *shares)]

    def records(self, max_bytes: int) -> Iterator[Record]:
        for record in self._all_records(max_bytes):
            if self.shares is None or self._share_of(record) == self.split:
                yield record

    def _share_of(self, record: Record) -> str:
        """Split of a record by a hash of its image, so that copies of an image stay together; else of its key."""
        assert self.shares is not None
        text = hashlib.sha256(record.image).hexdigest() if isinstance(record.image, bytes) else record.key
        return split_by_hash(text, self.shares.get("validation", 0.0), self.shares.get("test", 0.0))

    def _all_records(self, max_bytes: int) -> Iterator[Record]:
        sidecar = _read_sidecar(self.path.with_suffix(".parquet"), self.table_sha256)
        found: set[str] = set()
        for sample in read_samples(self.path, max_bytes, self.fingerprint):
            found.add(sample.key)
            yield self._record(sample, sidecar.get(sample.key, {}))
        for key, row in sidecar.items():
            if key not in found and row.get("status") not in (None, "success"):
                yield self._refusal(key, "image was not downloaded")

    def _record(self, sample: TarSample, row: dict[str, Any]) -> Record:
        """Make the record of a sample. row: its row in img2dataset's table; empty without a table."""
        if sample.fault is not None:
            return self._refusal(sample.key, sample.fault)
        image = next((sample.parts[extension] for extension in IMAGE_EXTENSIONS if extension in sample.parts), None)
        captions, fault = self._captions(sample, row)
        metadata = _describe(sample.parts.get("json"), self.prefix)
        where = f"{self.path}:{sample.key}"
        return Record(safe_key(self.prefix + sample.key), image, captions, where, metadata, fault)

    def _captions(self, sample: TarSample, row: dict[str, Any]) -> tuple[list[str], str | None]:
        texts = [decode_text(sample.parts[one]) for one in CAPTION_EXTENSIONS if one in sample.parts]
        text = next((text for text in texts if text is None or is_visible(text)), "")
        if text != "":
            return (text.split("\n"), None) if text is not None else ([], "caption is not UTF-8")
        fields = _parse_object(sample.parts.get("json"))
        captions = captions_in_cell(fields.get(self.caption_field)) or captions_in_cell(row.get("caption"))
        return captions, "metadata are too long" if sample.long_metadata and not captions else None

    def _refusal(self, key: str, reason: str) -> Record:
        where = str(self.path) if key == self.path.name else f"{self.path}:{key}"  # of the tar, or of a sample
        return Record(safe_key(self.prefix + key), None, (), where, fault=reason)


def _describe(text: bytes | None, prefix: str) -> dict[str, Any]:
    """URL, id and licence of an image, from img2dataset's metadata, a JSON text. The id gets `prefix`.

    Folders that number their images alike have prefixes.
    """
    fields = _parse_object(text)
    found = {name: fields[name] for name in ("url", "image_id", "license") if isinstance(fields.get(name), str | int)}
    if prefix and found.get("image_id", "") != "":  # an empty one names no image, and would name all
        found["image_id"] = f"{prefix}{found['image_id']}"
    return found


def _parse_object(text: bytes | None) -> dict[str, Any]:
    try:
        fields = json.loads(text or b"{}")
    except (ValueError, RecursionError):
        return {}
    return fields if isinstance(fields, dict) else {}


def _read_sidecar(file: Path, sha256: str | None) -> dict[str, dict[str, Any]]:
    """Read img2dataset's table of a tar: key -> status and caption of every link, failed downloads included.

    Args:
        sha256: that of the table when the build began; None if there was no table.
    """
    if sha256 is None:
        return {}
    parquet, arrow = need("pyarrow.parquet"), need("pyarrow")
    try:
        content = read_regular(file, "annotations", within=file.parent)
        if hashlib.sha256(content).hexdigest() != sha256:
            raise DataError(f"{file}: wanted the table that the build began with, found another; build again")
        table = parquet.ParquetFile(arrow.BufferReader(content))
        columns = [name for name in ("key", "status", "caption") if name in table.schema_arrow.names]
        rows = table.read(columns=columns).to_pylist()
    except DataError:
        raise
    except (arrow.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{file}: wanted img2dataset's table, found {error}; remove it or download again") from None
    return {str(row["key"]): row for row in rows if row.get("key") is not None}
