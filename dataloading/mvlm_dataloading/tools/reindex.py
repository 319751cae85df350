"""Rebuilding the indices of a data folder, and indexing tars of other tools to use them in place."""

import codecs
from collections import Counter
from contextlib import AbstractContextManager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

from mvlm_dataloading.captions import is_visible
from mvlm_dataloading.dataset.dali_index import format_index, parse_index
from mvlm_dataloading.dataset.dataset import parse_captions, parse_metadata
from mvlm_dataloading.dataset.description import (
    add_shard,
    describe_shard,
    read_description,
    shard_paths,
    write_description,
)
from mvlm_dataloading.dataset.open import is_linked, write_index
from mvlm_dataloading.dataset.sample_index import Field, SampleIndex, pack_records
from mvlm_dataloading.errors import DataError
from mvlm_dataloading.files import make_no_older, write_file
from mvlm_dataloading.links.cache import LinkedIndex
from mvlm_dataloading.sources.record import canonical_split, split_in_name
from mvlm_dataloading.sources.tar_samples import IMAGE_EXTENSIONS, split_member_name
from mvlm_dataloading.tar_walk import DamagedTar, Member, TarWalk
from mvlm_dataloading.untrusted import opened_unchanged
from mvlm_dataloading.urls import require_local

_KNOWN = (*IMAGE_EXTENSIONS, "txt", "json", "tok")
_MAX_TEXT = 1 << 22


@dataclass(slots=True)
class TarIndex:
    """DALI index of a tar and statistics, made by reading the tar."""

    lines: list[str]
    """Index lines of the usable samples."""
    unreadable: list[str]
    """Index lines of samples whose captions or metadata cannot be read."""
    captions: int
    """Number of captions of the usable samples."""
    left_out: Counter[str]
    """Number of unusable samples, by reason."""


def index_tar(tar: Path, *, unseen: bool = False, file: BufferedReader | None = None) -> TarIndex:
    """Index a tar from its headers and texts. Members that belong to no sample are skipped.

    A sample needs an image and captions in UTF-8. Metadata are optional, and must be a JSON object. An image may be a
    hard link to that of an earlier sample.

    Args:
        unseen: accept captions in which nothing can be seen, as earlier versions did.
        file: the open tar, which is left at another place. Default: it is opened.

    Raises:
        DataError: the file is missing, is not a tar, is compressed, ends early, has blocks that belong to no member, or
            changes while it is read.
    """
    if file is None:
        with _opened(tar) as file:
            return index_tar(tar, unseen=unseen, file=file)
    samples: dict[str, dict[str, Member]] = {}
    images: dict[str, Member] = {}
    faults: dict[str, str] = {}
    captions: dict[str, int] = {}
    unread: dict[str, str] = {}
    last = None
    file.seek(0)
    walk = TarWalk(file, _MAX_TEXT)
    try:
        for member in walk:
            key, extension = split_member_name(member.name)
            if member.name.rsplit("/", 1)[-1].startswith("."):  # macOS puts ._a.jpg beside a.jpg
                continue
            if member.islnk() and extension in IMAGE_EXTENSIONS and (target := images.get(member.linkname)):
                member.offset_data, member.size = target.offset_data, target.size
            elif not member.isfile() or member.issparse() or extension not in _KNOWN:
                continue
            if extension in IMAGE_EXTENSIONS:
                images[member.name] = member
            parts = samples.setdefault(key, {})
            if extension in parts or (extension in IMAGE_EXTENSIONS and any(one in parts for one in IMAGE_EXTENSIONS)):
                faults[key] = "sample has two files of the same kind"
            elif parts and key != last:
                faults[key] = "files of a sample do not follow one another"
            parts.setdefault(extension, member)
            last = key
            if extension in ("txt", "json"):
                found = _read_text(walk, member, extension, unseen)
                if isinstance(found, str):
                    unread.setdefault(key, found)
                elif extension == "txt":
                    captions[key] = found
    except (DamagedTar, OSError) as error:
        found = f"{error} (it ends early)" if isinstance(error, DamagedTar) and error.cut else error
        remedy = "download it again"
        if isinstance(error, DamagedTar) and (error.cut or not error.offset):
            remedy += " or convert it with `mvlm data webdataset`"
        raise DataError(
            f"{tar}: wanted a complete, uncompressed tar, found a file that is not one ({found}); {remedy}"
        ) from None
    index = TarIndex([], [], 0, Counter(faults.values()))
    for key, parts in samples.items():
        if key in faults:
            continue
        if not any(one in parts and parts[one].size for one in IMAGE_EXTENSIONS):
            index.left_out["no image"] += 1
            continue
        line = " ".join(_component(member) for member in parts.values())
        if key in unread:
            index.left_out[unread[key]] += 1
            index.unreadable.append(line)
        elif key not in captions:
            index.left_out["no caption"] += 1
        else:
            index.lines.append(line)
            index.captions += captions[key]
    return index


def _opened(tar: Path) -> AbstractContextManager[BufferedReader]:
    """Context with an open tar, by `opened_unchanged`. Raises DataError if the tar is missing."""
    if not tar.exists():
        raise DataError(f"{tar}: wanted a tar, found no such file; restore it")
    return opened_unchanged(tar)


def lists_samples_of(tar: Path, index: SampleIndex | LinkedIndex, shard: int) -> bool:
    """True if every sample that an index lists in a shard is a sample of the tar: its image, texts and tokens.

    The keys are not compared. Raises DataError if the tar or the index is damaged.
    """
    found = index_tar(tar, unseen=True)  # an earlier version may have listed such samples
    lines = format_index([*found.lines, *found.unreadable]).encode(errors="surrogateescape")
    known = {row.tobytes() for row in pack_records(parse_index(lines))[:, : Field.KEY_END]}
    return all(row.tobytes() in known for row in index.shard_content(shard)[0][:, : Field.KEY_END])


def _read_text(walk: TarWalk, member: Member, extension: str, unseen: bool) -> int | str:
    """Number of captions in a sample's `.txt`, or of fields in its `.json`; or why the text cannot be used.

    unseen: accept captions in which nothing can be seen.
    """
    what = "caption" if extension == "txt" else "metadata"
    if member.size > _MAX_TEXT:
        return f"{what} is too long"
    content = walk.read(member)
    parse = parse_captions if what == "caption" else parse_metadata
    try:
        found = parse(content, lambda: member.name)
    except DataError:
        if what == "metadata":
            return "metadata is not a JSON object"
        return "caption is not UTF-8" if content.removeprefix(codecs.BOM_UTF8).strip() else "no caption"
    return len(found) if what == "metadata" or unseen or any(map(is_visible, found)) else "no caption"


def rebuild_indices(folder: Path, split: str | None = None, *, without_tars: bool = False) -> dict[str, Any]:
    """Rebuild the indices of a data folder. A folder of tars without `dataset.json` gets one.

    Of a view, the index of each split is written from its DALI indices.

    Args:
        split: split of all tars, for a folder without `dataset.json`. Default: the first split that each tar's name has
            as a word (train-000.tar, cc3m-validation-000.tar), else train.
        without_tars: write only the index of each split, from the DALI indices of a data folder. No tar is read.

    Returns:
        The description.

    Raises:
        DataError: a tar is damaged or has other samples than described; a DALI index is missing or does not match its
            tar; the folder has `dataset.json` and `split` is given; no sample is usable.
    """
    if without_tars or (folder / "dataset.json").exists():
        if split:
            raise DataError(
                f"{folder}: wanted no split for a folder with dataset.json, got {split}; remove dataset.json and "
                f"*.index to index it anew"
            )
        description = read_description(folder)
        if is_linked(description):
            raise DataError(
                f"{folder}: wanted a data set with tars of its own, found linked data; `mvlm data link` again"
            )
        shards = [shard for part in description["splits"].values() for shard in part["shards"]]
        if not without_tars and not any("index" in shard for shard in shards):  # a shard of a view has an index
            for shard in shards:
                _index_described(shard_paths(folder, shard)[0], shard["samples"])
        for name in description["splits"]:
            write_index(folder, name)
        return description
    require_local(folder)
    tars = sorted(folder.glob("*.tar")) if folder.is_dir() else []
    if not tars:
        raise DataError(f"{folder}: wanted a folder of tars, found none; give another folder")
    return _describe(folder, tars, split)


def _index_described(tar: Path, samples: int) -> None:
    """Write the DALI index of a tar, which must have as many samples as described."""
    with _opened(tar) as file:
        found = index_tar(tar, file=file)
        if len(found.lines) < samples:
            found = index_tar(tar, unseen=True, file=file)  # written by an earlier version, perhaps
    if len(found.lines) != samples:
        raise DataError(
            f"{tar}: wanted {samples} samples as in dataset.json, found {len(found.lines)}; restore it or build the "
            f"data set again"
        )
    _write_dali_index(tar, found)


def _write_dali_index(tar: Path, found: TarIndex) -> None:
    path = tar.with_suffix(".idx")
    write_file(path, format_index(found.lines))
    make_no_older(path, [tar])


def _describe(folder: Path, tars: list[Path], split: str | None) -> dict[str, Any]:
    splits: dict[str, dict[str, Any]] = {}
    left_out: Counter[str] = Counter()
    for tar in tars:
        with _opened(tar) as file:
            found = index_tar(tar, file=file)
            shard = describe_shard(tar, len(found.lines), file)
        _write_dali_index(tar, found)
        left_out += found.left_out
        if found.lines:
            stated = split_in_name(tar.name) or "train"
            name = canonical_split(split, str(folder)) if split else canonical_split(stated, str(tar))
            add_shard(splits, name, shard, found.captions)
    if not splits:
        raise DataError(f"{folder}: wanted at least one sample, found none; left out: {dict(left_out)}")
    about = {"name": folder.resolve().name, "source": "tars of another tool, indexed in place"}
    description = write_description(folder, {**about, "licence": "", "attribution": ""}, {}, splits, left_out)
    for name in splits:
        write_index(folder, name)
    return description


def _component(member: Member) -> str:
    # Index lines are split at blanks, so white space in a name is percent-encoded. DALI reads by offset, not by name.
    name = member.name
    for sign in ("%", *(sign for sign in set(name) if sign.isspace())):
        name = name.replace(sign, "".join(f"%{byte:02X}" for byte in sign.encode()))
    extension = name.rpartition(".")[2]
    return f"{extension} {member.offset_data} {member.size} {name}"
