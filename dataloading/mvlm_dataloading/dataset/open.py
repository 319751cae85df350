"""Opening a data set: everything that can be checked before anything is loaded."""

import hashlib
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np

from mvlm_dataloading.errors import DataError

from .dali_index import IMAGE_EXTENSIONS, KINDS, Index, Part, head_of, parse
from .dataset import Dataset, Keys
from .description import read_description, shard_files
from .remote_cache import Stage, is_remote, stage_for

_AT_SOURCE = "open the data set again, which brings it anew; if that does not help, make it again where it comes from"
_SHORT = 8  # bytes; a caption file of at most so many is read when the data set is opened, as it may be blank


def open_dataset(folder: Path | str, split: str) -> Dataset:
    """Open one split and check it, without reading the shards through.

    A folder at s3://, gs://, hf:// or https:// is staged into a local cache: see `remote_cache`. Its shards are checked
    when they arrive.

    Raises:
        DataError: the folder, `dataset.json`, the split, a shard or an index is missing; a shard has another size than
            `dataset.json` says, or is no tar; an index is older than its tar, or belongs to another; a sample has no
            caption or no image.
    """
    stage = stage_for(str(folder)) if is_remote(folder) else None
    folder = Path(folder) if stage is None else stage.folder
    description = read_description(folder)
    if split not in description["splits"]:
        raise DataError(
            f"{folder}: wanted the split {split}, found {', '.join(description['splits'])}; name one of these"
        )
    shards = description["splits"][split]["shards"]
    if stage is not None:
        stage.expect(shards)
    tars, paths, indices = [], [], []
    for shard in shards:
        tar, path = shard_files(folder, shard)
        if stage is None:
            _check_tar(tar, shard["bytes"])
        tars.append(tar)
        paths.append(path)
        indices.append(_read_index(tar, path, shard) if stage is None else _staged_index(stage, tar, path, shard))
    if stage is not None:
        stage.compare = lambda i: _compare(tars[i], paths[i], indices[i], _AT_SOURCE)
    counts = np.array([len(index.begin) for index in indices], np.int64)
    if not counts.sum():
        raise DataError(f"{folder}: wanted samples in the split {split}, found none; build the data set again")
    parts = {
        kind: Part(*(np.concatenate([getattr(i.parts[kind], field) for i in indices]) for field in ("offset", "size")))
        for kind in KINDS
    }
    first = np.cumsum(counts) - counts
    shard_of = np.repeat(np.arange(len(tars)), counts)
    # The offsets tell apart views of the same shards that name other samples, or the same ones in another order.
    digest = hashlib.sha256(json.dumps([split, [[s["samples"], s["sha256"]] for s in shards]]).encode())
    digest.update(parts["image"].offset.tobytes())
    dataset = Dataset(
        folder=folder,
        split=split,
        tars=tars,
        shard=shard_of,
        first=first,
        indices=indices,
        keys=Keys(indices, shard_of, first),
        image=parts["image"],
        text=parts["text"],
        meta=parts["meta"],
        tokens=parts["tokens"],
        description=description,
        fingerprint=digest.hexdigest()[:32],
        stage=stage,
    )
    for i in np.flatnonzero(dataset.text.size <= _SHORT) if stage is None else ():
        dataset.captions(int(i))  # raises if it is blank
    return dataset


def _check_tar(tar: Path, size: int) -> None:
    if not tar.is_file():
        raise DataError(f"{tar}: wanted a shard that dataset.json names, found no such file; restore it or build again")
    found = tar.stat().st_size
    if found != size:
        what = "an empty file" if found == 0 else f"{found} bytes"
        raise DataError(
            f"{tar}: wanted {size} bytes as in dataset.json, found {what}; restore it or build the data set again"
        )
    with tar.open("rb") as file:
        header = file.read(tarfile.BLOCKSIZE)
    _header(tar, header)


def _header(tar: Path, block: bytes) -> tarfile.TarInfo:
    try:
        return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        raise DataError(
            f"{tar}: wanted a tar file, found something unreadable ({error}); restore it or build the data set again"
        ) from None


def _staged_index(stage: Stage, tar: Path, path: Path, shard: dict[str, Any]) -> Index:
    """The index of a shard that lies elsewhere, brought once more where that in the cache cannot be used."""
    try:
        return _read_index(tar, path, shard, local=False)
    except DataError:
        stage.bring_index(shard)
        return _read_index(tar, path, shard, local=False)


def _read_index(tar: Path, path: Path, shard: dict[str, Any], *, local: bool = True) -> Index:
    """The index of a shard, checked against the tar at its first and last samples where that is here."""
    samples = shard["samples"]
    hint = "make the view again" if "index" in shard else f"make it again with `wds2idx {tar} {path}`"
    if not local:
        hint = _AT_SOURCE
    if not path.is_file():
        raise DataError(f"{path}: wanted the index of {tar.name}, found no such file; {hint}")
    if local and path.stat().st_mtime_ns < tar.stat().st_mtime_ns:
        if "index" not in shard:
            hint = f"make it again with `mvlm data index {tar.parent}` (copied without their times, as cp -r does?)"
        raise DataError(f"{path}: wanted an index at least as new as {tar.name}, found an older one; {hint}")
    text = path.read_bytes()
    if "index_sha256" in shard and hashlib.sha256(text).hexdigest() != shard["index_sha256"]:
        raise DataError(f"{path}: wanted the index that dataset.json names, found another; {hint}")
    head, lines = head_of(text)
    if head.split() != ["v1.2", str(lines)] or lines != samples:
        raise DataError(f"{path}: wanted a v1.2 index of {samples} samples, found {head!r} and {lines} lines; {hint}")
    if not lines:
        text = b"v1.2 0\n"
    try:
        index = parse(text)
    except ValueError as error:
        raise DataError(
            f"{path}: wanted `extension offset size name` of each component, found {error}; {hint}"
        ) from None
    for kind, what in (("image", f"an image ({', '.join(IMAGE_EXTENSIONS)})"), ("text", "at least one caption")):
        missing = np.flatnonzero(index.parts[kind].size <= 0)
        if len(missing):
            raise DataError(
                f"{tar} key {index.key(int(missing[0]))}: wanted {what}, found none; remove the sample"
                + (" or write its captions" if kind == "text" else "")
            )
    if local:
        _compare(tar, path, index, hint)
    return index


def _compare(tar: Path, path: Path, index: Index, hint: str) -> None:
    """Compare an index with its tar at the first, the middle and the last sample. Raises DataError."""
    rows = len(index.begin)
    end = tar.stat().st_size
    with tar.open("rb") as file:
        for row in dict.fromkeys((0, rows // 2, rows - 1)) if rows else ():
            for kind, part in index.parts.items():
                offset, size = int(part.offset[row]), int(part.size[row])
                if size < 0:
                    continue
                name = index.name(row, kind)
                file.seek(max(0, offset - tarfile.BLOCKSIZE))
                block = file.read(tarfile.BLOCKSIZE)
                # As nearly all headers are; the general way takes ten times as long.
                usual = name.encode(errors="surrogateescape").ljust(100, b"\0"), b"%011o" % size
                if offset + size <= end and (block[:100], block[124:136].rstrip(b"\0 ")) == usual:
                    continue
                try:
                    member = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
                except tarfile.HeaderError:
                    member = None
                # Headers spell long and non-ASCII names in other ways than indices do.
                plain = name.isascii() and len(name) <= 100 and not {"\\", "%"} & set(name)
                fits = member is not None and member.size == size and (member.name == name or not plain)
                if offset + size > end or not fits:
                    raise DataError(
                        f"{path}: wanted the index of {tar.name}, found that {name} is not where it says; {hint}"
                    )
