"""`dataset.json`, the description of a data folder."""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from io import BufferedReader
from pathlib import Path
from typing import Any

from mvlm_dataloading.errors import DataError
from mvlm_dataloading.files import write_file
from mvlm_dataloading.regular_files import open_regular, read_regular

from .description_fields import parse_description

_MAX_BYTES = 1 << 30


def describe_shard(tar: Path, samples: int, file: BufferedReader | None = None) -> dict[str, Any]:
    """Describe a tar as an entry of `dataset.json`.

    Args:
        file: the open tar, which is left at its end. Default: it is opened.
    """
    if file is None:
        with open_regular(tar) as file:
            return describe_shard(tar, samples, file)
    file.seek(0)
    digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"tar": tar.name, "samples": samples, "bytes": os.fstat(file.fileno()).st_size, "sha256": digest}


def write_description(folder: Path, description: Mapping[str, Any]) -> None:
    """Write the `dataset.json` of a folder."""
    write_file(folder / "dataset.json", json.dumps(description, indent=2, ensure_ascii=False) + "\n")


def already_written(out: Path, *, name: str, recipe: Mapping[str, Any]) -> bool:
    """True if `out` holds this data set, complete. False if `out` is missing or empty.

    Raises:
        DataError: `out` has other content, or holds this data set with a damaged shard.
    """
    file = out / "dataset.json"
    if not file.is_file():
        require_free_folder(out)
        return False
    found = read_description(out)
    if (found.get("name"), found.get("recipe")) != (name, dict(recipe)):
        had = found.get("recipe") or {}
        listed = ", ".join(filter(None, (_difference(key, had, recipe) for key in sorted({*had, *recipe}))))
        raise DataError(
            f"{out}: wanted a new folder or the data set {name} as it is built now, found {found.get('name')} with "
            f"{listed or 'the same settings'}; choose another folder or remove this one"
        )
    for split in found["splits"].values():
        for shard in split["shards"]:
            tar = out / shard["tar"]
            size = tar.stat().st_size if tar.is_file() else None
            if size != shard["bytes"] or not tar.with_suffix(".idx").is_file():
                raise DataError(
                    f"{tar}: wanted {shard['bytes']} bytes and an index, found {size}; remove {out} and build it again"
                )
    return True


def _difference(key: str, had: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """Difference of the setting `key` of two recipes, in words; empty if there is none."""
    if key in had and key in wanted and had[key] == wanted[key]:
        return ""
    before, now = (_short(recipe[key]) if key in recipe else "not set" for recipe in (had, wanted))
    return f"another {key}" if before == now else f"{key} {before} in place of {now}"


def _short(value: Any) -> str:
    """A value in a message: hashes and lists by their beginning."""
    text = str(value)
    return text if len(text) <= 40 else f"{text[:12]}..."


def read_description(folder: Path) -> dict[str, Any]:
    """Content of a data folder's `dataset.json`, with every field checked.

    Raises:
        DataError: the folder or the file is missing, or the file has another format or version.
    """
    file = folder / "dataset.json"
    if not folder.is_dir():
        if re.match(r"[A-Za-z][A-Za-z0-9]+:/", str(folder)):
            raise DataError(
                f"{folder}: wanted a folder on this machine, found a URL, which this command does not read; "
                f"copy the data here"
            )
        raise DataError(f"{folder}: wanted a data folder, found none; `mvlm data` writes one")
    try:
        text = read_regular(file, _MAX_BYTES)
    except FileNotFoundError:
        raise DataError(
            f"{file}: wanted the data set's description, found no such file; `mvlm data` writes it"
        ) from None
    return parse_description(text, str(file))


def shard_paths(folder: Path, shard: Mapping[str, Any]) -> tuple[Path, Path]:
    """Paths of a shard's tar and index. A view stores only indices, and refers to tars of other folders."""
    if "index" not in shard:
        tar = folder / shard["tar"]
        return tar, tar.with_suffix(".idx")
    # Resolve `folder` first: if it is a link to a view, `..` is relative to the view, not to the link.
    return Path(os.path.normpath(folder.resolve() / shard["tar"])), folder / shard["index"]


def require_free_folder(out: Path) -> None:
    """Raise DataError unless `out` is missing or an empty folder, so that a finished folder can replace it."""
    if os.path.ismount(out.resolve()):
        raise DataError(f"{out}: wanted a folder that can be replaced, found a mount point; name a new folder in it")
    if out.is_dir() and not any(out.iterdir()):
        return
    if out.exists():
        raise DataError(
            f"{out}: wanted a new or an empty folder, found one in use; choose another folder or remove this one"
        )
