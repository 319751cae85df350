"""Opening a data set, with all checks that do not read whole shards.

A split opens from `<split>.index` at once. Without that file it opens from the DALI indices of its shards, which are
parsed and packed in memory by each process.
"""

import hashlib
import io
import logging
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from mvlm_dataloading.errors import DataError
from mvlm_dataloading.files import make_no_older, replaced
from mvlm_dataloading.links.cache import LinkedIndex, write_shard
from mvlm_dataloading.links.samples import LinkReader, options_of
from mvlm_dataloading.links.scan import columns_of
from mvlm_dataloading.links.store import MOST_BYTES, RangeStore
from mvlm_dataloading.untrusted import read_regular
from mvlm_dataloading.urls import is_remote

from .dali_index import IMAGE_EXTENSIONS, parse_index, read_head
from .dataset import Dataset, check_size, compare_with_tar
from .description import index_command, read_description, shard_paths
from .remote_cache import REMOTE_HINT, RemoteCache, open_remote_cache
from .sample_index import (
    HEADER,
    Field,
    IndexWriter,
    SampleIndex,
    bytes_of_head,
    index_path,
    map_index,
    most_bytes,
    pack_records,
    shards_hash,
)

log = logging.getLogger(__name__)


_SHORT = 8  # bytes; a `.txt` of at most this size may be blank, so it is read when DALI indices are packed
_ROWS = 1 << 20  # samples looked at together


def open_dataset(folder: Path | str, split: str) -> Dataset:
    """Open one split and check it, without reading whole shards.

    A folder at s3://, gs://, hf:// or https:// is cached locally, see `remote_cache`. Its shards are checked when they
    are fetched.

    Raises:
        DataError: the folder, `dataset.json`, the split, a shard or an index is missing; the size of a shard differs
            from `dataset.json`; an index is damaged, older than its tar or belongs to another one; a sample has no
            caption or no image.
    """
    if is_remote(folder):
        return _open_remote(open_remote_cache(str(folder)), split)
    folder = Path(folder)
    description = read_description(folder)
    shards = _shards_of_split(folder, description, split)
    path = index_path(folder, split)
    if is_linked(description):
        if not path.exists():
            raise DataError(f"{path}: wanted the index of linked data, found no such file; restore it or link again")
        index = _map(path, split, description, "restore it or link again")
        content = read_regular(folder / "dataset.json", "dataset.json", within=folder)
        return _open_linked(folder, description, split, index, open_remote_cache(str(folder.resolve()), content))
    if path.exists():
        index = _map(path, split, description, f"make it again with {index_command(folder, '--without-tars')}")
        for shard in shards:
            _check_tar(shard_paths(folder, shard)[0], shard, path)
        return _dataset(folder, split, description, index)
    content = io.BytesIO()
    _pack(folder, split, shards, content, with_tars=True)
    dataset = _dataset(folder, split, description, SampleIndex(content.getvalue()))
    _check_samples(dataset)
    faster = index_command(folder, "--without-tars")
    log.info("%s: opened from DALI indices; %s makes that faster", folder, faster)
    return dataset


def write_index(folder: Path, split: str, *, with_tars: bool = True) -> Path:
    """Write `<split>.index` of a local data folder from the DALI indices of its shards. Returns its path.

    Args:
        with_tars: True if the tars are in the folder too; they are then compared with the DALI indices.

    Raises:
        DataError: as in `open_dataset`. A `<split>.index` that is there stays as it was.
    """
    description = read_description(folder)
    shards = _shards_of_split(folder, description, split)
    path = index_path(folder, split)
    with replaced(path) as aside, aside.open("w+b") as file:
        _pack(folder, split, shards, file, with_tars=with_tars)
        if with_tars:
            _check_samples(_dataset(folder, split, description, map_index(Path(file.name))))
    if with_tars:
        make_no_older(path, (shard_paths(folder, shard)[0] for shard in shards))
    return path


def _open_remote(remote: RemoteCache, split: str) -> Dataset:
    description = read_description(remote.folder)
    shards = _shards_of_split(remote.folder, description, split)
    remote.register_shards(_names_in_cache(split, shards) if is_linked(description) else shards)
    if is_linked(description):
        if local := [shard["tar"] for shard in shards if not is_remote(shard["tar"])]:
            raise DataError(
                f"{remote.url}: wanted links to URLs, found one to {local[0]}; copy the folder to that disk"
            )
        return _open_linked(remote.folder, description, split, _remote_index(remote, description, split), remote)
    path = remote.fetch_split_index(index_path(remote.folder, split).name)
    if path is not None:
        try:
            index = _map(path, split, description, REMOTE_HINT)
        except DataError:  # the cached file may be damaged, or belong to an earlier state of the folder
            remote.fetch_split_index(path.name, again=True)
            index = _map(path, split, description, REMOTE_HINT)
    else:
        content = io.BytesIO()
        for shard in shards:
            if not shard_paths(remote.folder, shard)[1].is_file():
                remote.fetch_dali_index(shard)
        _pack(remote.folder, split, shards, content, with_tars=False, fetch_again=remote.fetch_dali_index)
        index = SampleIndex(content.getvalue())
        log.info("%s: opened from DALI indices; `mvlm data index --without-tars` there makes that faster", remote.url)

    def verify(number: int) -> None:
        tar, dali_index = shard_paths(remote.folder, shards[number])
        source = path or dali_index
        try:
            compare_with_tar(index, number, tar, source, REMOTE_HINT)
        except DataError:
            source.unlink(missing_ok=True)  # so that the next opening fetches the current one
            raise

    remote.verify = verify
    return _dataset(remote.folder, split, description, index, remote)


def is_linked(description: Mapping[str, Any]) -> bool:
    """True if a description is that of linked data (`mvlm data link`)."""
    return "captions" in description


def _open_linked(
    folder: Path, description: dict[str, Any], split: str, index: SampleIndex, remote: RemoteCache
) -> Dataset:
    """Open a split of linked data, whose samples stay in tars or Parquet files of others.

    When a shard is needed, `remote` writes it to the cache from samples that are read where they are.
    """
    shards = _shards_of_split(folder, description, split)
    names = _names_in_cache(split, shards)
    remote.register_shards(names)
    reader = LinkReader(shards, index, options_of(description, f"{folder}/dataset.json"))
    remote.write_shard = partial(write_shard, reader)
    tars = [remote.folder / one["tar"] for one in names]
    dataset = _dataset(folder, split, description, index, remote)
    return replace(dataset, tars=tars, index=LinkedIndex(index, tars), links=reader)


def _remote_index(remote: RemoteCache, description: dict[str, Any], split: str) -> SampleIndex:
    """The index of linked data at a URL: its head is fetched now, each shard's records when they are first read."""
    name, hint = index_path(remote.folder, split).name, "link again, or upload the index again"
    store = RangeStore(4)
    linked = store.stat(f"{remote.url}/{name}")
    try:
        shards = len(description["splits"][split]["shards"])
        most = most_bytes(description["splits"][split]["samples"], shards)
        head, size = bytes_of_head(bytes(store.read(linked, 0, min(HEADER.size, linked.size))), most)
        if size != linked.size or head > most_bytes(0, shards):
            raise ValueError(f"{linked.size} bytes in place of {size}")
    except DataError:
        raise
    except ValueError as error:
        raise DataError(f"{linked.url}: wanted the index of a split, found {error}; {hint}") from None
    path = remote.begin_index(name, bytes(store.read(linked, 0, head)), size)

    def fetch(begin: int, end: int) -> None:
        with path.open("r+b") as file:
            for place in range(begin, end, MOST_BYTES):
                content = store.read(linked, place, min(place + MOST_BYTES, end))
                file.seek(place)
                file.write(content)

    return _map(path, split, description, hint, fetch)


def _names_in_cache(split: str, shards: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Entries of the shards of linked data, with the names of their tars in the cache in place of the files' URLs."""
    return [{**shard, "tar": f"{split}-{number:06d}.tar"} for number, shard in enumerate(shards)]


def _shards_of_split(folder: Path, description: dict[str, Any], split: str) -> list[dict[str, Any]]:
    if split not in description["splits"]:
        known = ", ".join(description["splits"])
        hint = "name one of these" + (", or use a data set with training samples" if split == "train" else "")
        raise DataError(f"{folder}: wanted the split {split}, found {known}; {hint}")
    return description["splits"][split]["shards"]


def _map(
    path: Path,
    split: str,
    description: dict[str, Any],
    hint: str,
    fetch: Callable[[int, int], None] | None = None,
) -> SampleIndex:
    """Memory-map the index file of a split. DataError if it is damaged or belongs to other shards.

    Args:
        hint: what to do, for messages.
        fetch: as for `SampleIndex`.
    """
    index, shards, columns = map_index(path, hint, fetch), description["splits"][split]["shards"], len(Field)
    if is_linked(description):
        linked = options_of(description, f"{path.parent}/dataset.json")
        columns = max(columns_of(one.captions) for one in linked)
    if index.columns != columns:
        raise DataError(f"{path}: wanted records of {columns} numbers, found {index.columns}; {hint}")
    if index.described != shards_hash(split, shards):
        raise DataError(f"{path}: wanted the index of the shards in dataset.json, found one of other shards; {hint}")
    if np.diff(index.first).tolist() != [shard["samples"] for shard in shards]:
        raise DataError(f"{path}: wanted as many samples in each shard as in dataset.json, found others; {hint}")
    return index


def _check_tar(tar: Path, shard: dict[str, Any], path: Path) -> None:
    """Check that a shard is there, has its size, and is not newer than its index at `path`."""
    if check_size(tar, shard["bytes"]).st_mtime_ns > path.stat().st_mtime_ns:
        hint = f"make it again with {index_command(tar.parent)} (copied without their times, as cp -r does?)"
        raise DataError(
            f"{path}: wanted an index at least as new as {tar.name}, found an older one; "
            f"{'make the view again' if 'index' in shard else hint}"
        )


def _check_samples(dataset: Dataset) -> None:
    """Compare the index of each shard with its tar, and raise DataError for a sample whose captions are all blank.

    For a data set whose index was just made from DALI indices.
    """
    for number, shard in enumerate(dataset.shards):
        tar, path = shard_paths(dataset.folder, shard)
        compare_with_tar(dataset.index, number, tar, path, _hint(tar, path, shard))
        dataset.compared.add(number)
    for begin in range(0, len(dataset), _ROWS):
        ids = np.arange(begin, min(begin + _ROWS, len(dataset)))
        for i in ids[dataset.locate("text", ids)[1] <= _SHORT].tolist():
            dataset.captions(i)  # raises if it is blank
        dataset.index.release()


def _dataset(
    folder: Path, split: str, description: dict[str, Any], index: SampleIndex, remote: RemoteCache | None = None
) -> Dataset:
    if not len(index):
        raise DataError(f"{folder}: wanted samples in the split {split}, found none; build the data set again")
    return Dataset(
        folder=folder,
        split=split,
        tars=[shard_paths(folder, shard)[0] for shard in description["splits"][split]["shards"]],
        index=index,
        start=0,
        stop=len(index),
        description=description,
        fingerprint=index.fingerprint,
        remote=remote,
    )


def _pack(
    folder: Path,
    split: str,
    shards: Sequence[dict[str, Any]],
    file: BinaryIO,
    *,
    with_tars: bool,
    fetch_again: Callable[[dict[str, Any]], None] | None = None,
) -> None:
    """Write a split's index to the empty file `file`, from the DALI indices of its shards.

    Args:
        with_tars: True if the tars are there too.
        fetch_again: fetches the DALI index of a shard once more, if the cached one cannot be used.
    """
    writer = IndexWriter(file, split, shards)
    for shard in shards:
        tar, path = shard_paths(folder, shard)
        if with_tars and path.is_file():
            _check_tar(tar, shard, path)
        hint = _hint(tar, path, shard) if with_tars else REMOTE_HINT
        try:
            _add(writer, tar, path, shard, hint)
        except DataError:
            if fetch_again is None:
                raise
            fetch_again(shard)
            _add(writer, tar, path, shard, hint)
    writer.finish()


def _hint(tar: Path, path: Path, shard: dict[str, Any]) -> str:
    """Command that makes the DALI index of a tar again, or advice for a view, for messages."""
    return (
        "make the view again"
        if "index" in shard
        else f"make it again with `{shlex.join(['wds2idx', str(tar), str(path)])}`"
    )


def _add(writer: IndexWriter, tar: Path, path: Path, shard: dict[str, Any], hint: str) -> None:
    """Append the samples of one shard to the split's index that `writer` writes.

    Args:
        tar, path: the shard and its DALI index.
        shard: its entry in dataset.json.
        hint: what to do, for messages.

    Raises:
        DataError: the DALI index cannot be used. Nothing is appended then.
    """
    try:
        text = read_regular(path, "index")
    except FileNotFoundError:
        raise DataError(f"{path}: wanted the index of {tar.name}, found no such file; {hint}") from None
    if "index_sha256" in shard and hashlib.sha256(text).hexdigest() != shard["index_sha256"]:
        raise DataError(f"{path}: wanted the index that dataset.json names, found another; {hint}")
    head, lines = read_head(text)
    if head.split() != ["v1.2", str(lines)] or lines != shard["samples"]:
        raise DataError(
            f"{path}: wanted a v1.2 index of {shard['samples']} samples, found {head!r} and {lines} lines; {hint}"
        )
    try:
        index = parse_index(text if lines else b"v1.2 0\n")
    except ValueError as error:
        raise DataError(
            f"{path}: wanted `extension offset size name` of each component, found {error}; {hint}"
        ) from None
    for kind, what in (("image", f"an image ({', '.join(IMAGE_EXTENSIONS)})"), ("text", "at least one caption")):
        missing = np.flatnonzero(index.components[kind].size <= 0)
        if len(missing):
            raise DataError(
                f"{tar} key {index.key(int(missing[0]))}: wanted {what}, found none; remove the sample"
                + (" or write its captions" if kind == "text" else "")
            )
    for kind, part in index.components.items():
        beyond = np.flatnonzero(part.offset + part.size > shard["bytes"])
        if len(beyond):  # DALI would map it, and reading it would end the process
            key = index.key(int(beyond[0]))
            raise DataError(
                f"{path}: wanted the index of {tar.name}, found that the {kind} of {key} is not where it says; {hint}"
            )
    try:
        records = pack_records(index)
    except ValueError as error:
        raise DataError(f"{path}: wanted the index of {tar.name}, found {error}; {hint}") from None
    writer.add(records, index.keys)
