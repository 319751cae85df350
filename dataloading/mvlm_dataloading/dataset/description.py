"""`dataset.json`, the description of a data folder. Every field is checked in one place before anything uses it."""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from io import BufferedReader
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn

from mvlm_dataloading.errors import DataError
from mvlm_dataloading.files import open_regular, read_regular, write_file

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


FORMAT_VERSION = 1
_MOST = 1 << 48
"""More samples or bytes than any data set has, and few enough for sums in 64 bits."""
_SHA256 = re.compile(r"[0-9a-f]{64}")


def parse_description(text: bytes, where: str) -> dict[str, Any]:
    """Parse a `dataset.json` and check every field that mvlm reads.

    Args:
        where: the file, for messages.

    Raises:
        DataError: it is not JSON, has another version, or a field is missing or impossible.
    """
    fields = _Fields(where)
    try:
        found = json.loads(text.decode(errors="surrogateescape"))
    except json.JSONDecodeError as error:
        fields.refuse(f"text that is not JSON ({error.msg} in line {error.lineno})")
    except RecursionError:
        fields.refuse("lists in lists beyond all measure")
    except ValueError:  # Python reads no longer ones
        fields.refuse("a number of more than 4300 digits")
    if not isinstance(found, dict):
        fields.wrong("its content", found, "an object")
    version = fields.number(found, "format_version", "")
    if version != FORMAT_VERSION:
        raise DataError(
            f"{where}: wanted format_version {FORMAT_VERSION}, found {version}; build it again with this version"
        )
    for name in ("name", "source", "licence", "attribution"):
        if not isinstance(found.get(name, ""), str):
            fields.wrong(name, found[name], "a text")
    fields.check_recipe(found.get("recipe", {}))
    fields.check_tokenizer(found.get("tokenizer"), found.get("tokens"))
    rejected = found.get("rejected", {})
    if not isinstance(rejected, dict):
        fields.wrong("rejected", rejected, "an object of numbers by reason")
    for reason in rejected:
        fields.number(rejected, reason, "rejected ")
    splits = fields.entry(found, "splits", "")
    if not isinstance(splits, dict) or not splits:
        fields.wrong("splits", splits, "an object with at least one split")
    for split, part in splits.items():
        fields.check_split(split, part)
    return found


def require_split_name(split: str) -> None:
    """Raise DataError if a split cannot be part of the names of files in a data folder, such as `../x`."""
    if not _is_split_name(split):
        raise DataError(f"split: wanted a name that files may have, such as train, got {_shown(split)}; rename it")


def _is_split_name(split: str) -> bool:
    return 0 < len(split) <= 100 and split.isprintable() and "/" not in split and not split.startswith(".")


class _Fields:
    """Checks of parts of a description. Each raises DataError with the name of the field."""

    def __init__(self, where: str) -> None:
        self._where = where

    def refuse(self, found: str) -> NoReturn:
        raise DataError(
            f"{self._where}: wanted the description of a data set, found {found}; restore it, or build the data set "
            "again"
        )

    def wrong(self, name: str, value: Any, wanted: str) -> NoReturn:
        self.refuse(f"{name}: {_shown(value)}, not {wanted}")

    def entry(self, part: dict[str, Any], name: str, place: str) -> Any:
        if name not in part:
            self.refuse(f"no {place}{_plain(name)}")
        return part[name]

    def number(self, part: dict[str, Any], name: str, place: str) -> int:
        value = self.entry(part, name, place)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < _MOST:
            self.wrong(f"{place}{_plain(name)}", value, "a number from 0")
        return value

    def check_split(self, split: str, part: Any) -> None:
        if not _is_split_name(split):
            self.refuse(f"the split {_shown(split)}, which is not a name that files may have")
        if not isinstance(part, dict):
            self.wrong(split, part, "an object")
        samples = self.number(part, "samples", f"{split} ")
        self.number(part, "captions", f"{split} ")
        shards = self.entry(part, "shards", f"{split} ")
        if not isinstance(shards, list):
            self.wrong(f"{split} shards", shards, "a list")
        for number, shard in enumerate(shards):
            self._check_shard(shard, f"{split} shard {number} ")
        total = sum(shard["samples"] for shard in shards)
        if total != samples:
            self.refuse(f"{samples} {split} samples, and {total} in its shards")

    def _check_shard(self, shard: Any, place: str) -> None:
        if not isinstance(shard, dict):
            self.wrong(place.strip(), shard, "an object")
        self.number(shard, "samples", place)
        self.number(shard, "bytes", place)
        sha256 = self.entry(shard, "sha256", place)
        if sha256 != "":  # not known
            self._check_hash(sha256, f"{place}sha256")
        if "index_sha256" in shard:
            self._check_hash(shard["index_sha256"], f"{place}index_sha256")
        # A view has its own indices, and refers to the tars of other folders.
        self._check_path(self.entry(shard, "tar", place), f"{place}tar", inside="index" not in shard)
        if "index" in shard:
            self._check_path(shard["index"], f"{place}index", inside=True)

    def _check_path(self, value: Any, name: str, *, inside: bool) -> None:
        if not isinstance(value, str) or not PurePosixPath(value).name or "\0" in value:
            self.wrong(name, value, "the name of a file")
        path = PurePosixPath(value)
        if inside and (path.is_absolute() or ".." in path.parts):
            self.wrong(name, value, "a file inside the folder")

    def _check_hash(self, value: Any, name: str) -> None:
        if not isinstance(value, str) or not _SHA256.fullmatch(value):
            self.wrong(name, value, "64 hexadecimal digits")

    def check_tokenizer(self, tokenizer: Any, tokens: Any) -> None:
        if tokenizer is not None:
            self._check_hash(tokenizer, "tokenizer")
        if tokens is None:
            return
        if not isinstance(tokens, dict):
            self.wrong("tokens", tokens, "an object")
        if not isinstance(self.entry(tokens, "fingerprint", "tokens "), str):
            self.wrong("tokens fingerprint", tokens["fingerprint"], "a text")
        self.number(tokens, "max_length", "tokens ")

    def check_recipe(self, recipe: Any) -> None:
        if not isinstance(recipe, dict):
            self.wrong("recipe", recipe, "an object")
        view = recipe.get("view")  # of `mvlm data view`; a recipe of others may have anything
        if isinstance(view, dict) and "depth" in view:
            self.number(view, "depth", "recipe view ")


def _shown(value: Any) -> str:
    """A value of JSON on one line, shortened."""
    if isinstance(value, dict | list):
        return ("an object" if isinstance(value, dict) else "a list") + f" of {len(value)}"
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:40]}..."


def _plain(name: str) -> str:
    """The name of a field, for a message of one line."""
    return name if name.isprintable() and len(name) <= 60 else _shown(name)
