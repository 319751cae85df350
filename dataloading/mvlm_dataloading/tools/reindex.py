"""Indices of tars, made from the tars alone: ours again, or those of tars that other tools wrote, read in place."""

import json
import tarfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mvlm_dataloading.build.shard_writer import index_text
from mvlm_dataloading.dataset.dataset import parse_captions, parse_metadata
from mvlm_dataloading.dataset.description import (
    FORMAT_VERSION,
    description_of,
    read_description,
    shard_files,
    write_durably,
)
from mvlm_dataloading.errors import DataError
from mvlm_dataloading.sources.record import split_name
from mvlm_dataloading.sources.samples import IMAGES, has_end, split_member

_TOLD = (*IMAGES, "txt", "json", "tok")
_MAX_TEXT = 1 << 22


@dataclass(slots=True)
class TarIndex:
    """What a tar holds."""

    lines: list[str]
    """One a sample, as in a DALI index."""
    unreadable: list[str]
    """The same of samples whose captions or metadata cannot be read."""
    captions: int
    """Of the samples in `lines`."""
    left_out: Counter[str]
    """Samples that cannot be used, by reason."""


def index_of(tar: Path) -> TarIndex:
    """Read the headers and the texts of a tar. Other members than a sample's are passed over.

    A sample needs a picture, and captions in UTF-8; its metadata, if there are any, have to be a JSON object.

    Raises:
        DataError: the file is no tar, is compressed, or ends early.
    """
    samples: dict[str, dict[str, tarfile.TarInfo]] = {}
    faults: dict[str, str] = {}
    captions: dict[str, int] = {}
    unread: dict[str, str] = {}
    last = None
    try:
        with tarfile.open(tar, "r:") as file:
            for member in file:
                key, extension = split_member(member.name)
                if not member.isfile() or member.issparse() or extension not in _TOLD:
                    continue
                parts = samples.setdefault(key, {})
                if extension in parts or (extension in IMAGES and any(one in parts for one in IMAGES)):
                    faults[key] = "key names two files of a kind"
                elif parts and key != last:
                    faults[key] = "files of a sample do not follow one another"
                parts.setdefault(extension, member)
                last = key
                if extension in ("txt", "json"):
                    found = _read_text(file, member, extension)
                    if isinstance(found, str):
                        unread.setdefault(key, found)
                    elif extension == "txt":
                        captions[key] = found
        if not has_end(tar):  # Python takes a header that is cut for the end
            raise tarfile.ReadError("it ends early")
    except (tarfile.TarError, EOFError, OSError, ValueError) as error:
        if isinstance(error, FileNotFoundError):
            raise DataError(f"{tar}: wanted a tar, found no such file") from None
        raise DataError(
            f"{tar}: wanted a whole, uncompressed tar, found otherwise ({error}); get it again, or write it anew with "
            f"`mvlm data webdataset`"
        ) from None
    index = TarIndex([], [], 0, Counter(faults.values()))
    for key, parts in samples.items():
        if key in faults:
            continue
        if not any(one in parts and parts[one].size for one in IMAGES):
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


def _read_text(file: tarfile.TarFile, member: tarfile.TarInfo, extension: str) -> int | str:
    """How many captions, or fields, a text of a sample holds; or why it cannot be used."""
    content = file.extractfile(member).read(_MAX_TEXT + 1)  # pyright: ignore[reportOptionalMemberAccess] (a file)
    what = "caption" if extension == "txt" else "metadata"
    if len(content) > _MAX_TEXT:
        return f"{what} is too long"
    parse = parse_captions if what == "caption" else parse_metadata
    try:
        return len(parse(content, lambda: member.name))
    except DataError:
        if what == "metadata":
            return "metadata is not a JSON object"
        return "caption is not UTF-8" if content.strip() else "no caption"


def rebuild_indices(folder: Path, split: str | None = None) -> dict[str, Any]:
    """Make the indices of a data folder again; a folder of tars that has no `dataset.json` gets one.

    Args:
        split: the split of tars that no description names, where their own names (train-000.tar) do not say it.

    Returns:
        The description.

    Raises:
        DataError: a tar is damaged or does not hold what the description says; the folder is a view.
    """
    if (folder / "dataset.json").is_file():
        description = read_description(folder)
        for part in description["splits"].values():
            for shard in part["shards"]:
                if "index" in shard:
                    raise DataError(f"{folder}: wanted a folder of tars, found a view; make it again instead")
                tar, _ = shard_files(folder, shard)
                _write_index(tar, shard["samples"])
        return description
    tars = sorted(folder.glob("*.tar")) if folder.is_dir() else []
    if not tars:
        raise DataError(f"{folder}: wanted a folder of tars, found none; name another")
    return _describe(folder, tars, split)


def _write_index(tar: Path, samples: int | None) -> TarIndex:
    found = index_of(tar)
    if samples is not None and len(found.lines) != samples:
        raise DataError(
            f"{tar}: wanted {samples} samples as in dataset.json, found {len(found.lines)}; restore it or build the "
            f"data set again"
        )
    path = tar.with_suffix(".idx")
    aside = path.with_suffix(".idx.tmp")
    write_durably(aside, index_text(found.lines))
    aside.rename(path)
    return found


def _describe(folder: Path, tars: list[Path], split: str | None) -> dict[str, Any]:
    splits: dict[str, dict[str, Any]] = {}
    left_out: Counter[str] = Counter()
    for tar in tars:
        found = _write_index(tar, None)
        left_out += found.left_out
        if found.lines:
            name = split_name(split, str(folder)) if split else _split_of(tar)
            part = splits.setdefault(name, {"samples": 0, "captions": 0, "shards": []})
            part["samples"] += len(found.lines)
            part["captions"] += found.captions
            part["shards"].append(description_of(tar, len(found.lines)))
    if not splits:
        raise DataError(f"{folder}: wanted at least one sample, found none; left out: {dict(left_out)}")
    description = {
        "format_version": FORMAT_VERSION,
        "name": folder.resolve().name,
        "source": "tars of another tool, indexed in place",
        "licence": "",
        "attribution": "",
        "recipe": {},
        "splits": dict(sorted(splits.items())),
        "tokenizer": None,
        "rejected": dict(sorted(left_out.items())),
    }
    aside = folder / "dataset.json.tmp"
    write_durably(aside, json.dumps(description, indent=2, ensure_ascii=False) + "\n")
    aside.rename(folder / "dataset.json")
    return description


def _split_of(tar: Path) -> str:
    word = tar.name.split(".")[0].split("-")[0].split("_")[0].lower()
    try:
        return split_name(word, str(tar))
    except DataError:
        return "train"


def _component(member: tarfile.TarInfo) -> str:
    # An index is split at blanks; the name in it serves to recognise a sample and is not looked up.
    name = member.name
    for sign in ("%", *(sign for sign in set(name) if sign.isspace())):
        name = name.replace(sign, "".join(f"%{byte:02X}" for byte in sign.encode()))
    extension = name.rpartition(".")[2]
    return f"{extension} {member.offset_data} {member.size} {name}"
