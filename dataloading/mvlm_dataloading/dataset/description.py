"""`dataset.json`, the description of a data folder. Every field is checked in one place before anything uses it."""

import hashlib
import json
import logging
import os
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from io import BufferedReader
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn

from mvlm_dataloading.errors import DataError
from mvlm_dataloading.files import write_file
from mvlm_dataloading.sources.folder import LISTED
from mvlm_dataloading.untrusted import open_regular, read_regular, resolve_inside
from mvlm_dataloading.urls import is_remote, require_local

log = logging.getLogger(__name__)

FORMAT_VERSION = 1


def index_command(folder: Path, *flags: str) -> str:
    """Shell command, in back quotes for messages, that rebuilds the indices of a data folder."""
    return f"`{shlex.join(['mvlm', 'data', 'index', str(folder), *flags])}`"


def describe_shard(tar: Path, samples: int, file: BufferedReader | None = None) -> dict[str, Any]:
    """A tar's entry of `dataset.json`. `file`: the open tar, which is left at its end; by default it is opened."""
    if file is None:
        with open_regular(tar) as file:
            return describe_shard(tar, samples, file)
    file.seek(0)
    digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"tar": tar.name, "samples": samples, "bytes": os.fstat(file.fileno()).st_size, "sha256": digest}


def add_shard(splits: dict[str, dict[str, Any]], split: str, shard: dict[str, Any], captions: int) -> None:
    """Append a shard to its split in the field `splits` of dataset.json, and add it to the split's counts.

    captions: how many the shard has.
    """
    entry = splits.setdefault(split, {"samples": 0, "captions": 0, "shards": []})
    entry["samples"] += shard["samples"]
    entry["captions"] += captions
    entry["shards"].append(shard)


def write_description(
    folder: Path,
    about: Mapping[str, Any],
    recipe: Mapping[str, Any],
    splits: Mapping[str, dict[str, Any]],
    rejected: Mapping[str, int],
    *,
    tokenizer: str | None = None,
    tokens: Mapping[str, Any] | None = None,
    captions: Sequence[Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """Write the `dataset.json` of a folder. Returns its content. `about`: name, source, licence and attribution."""
    description = {
        "format_version": FORMAT_VERSION,
        **{name: about[name] for name in ("name", "source", "licence", "attribution")},
        "recipe": recipe,
        "splits": dict(sorted(splits.items())),
        "tokenizer": tokenizer,
        "rejected": dict(sorted(rejected.items())),
        **({} if tokens is None else {"tokens": tokens}),
        **({} if captions is None else {"captions": captions}),
    }
    write_file(folder / "dataset.json", json.dumps(description, indent=2, ensure_ascii=False) + "\n")
    return description


def already_written(out: Path, *, name: str, recipe: Mapping[str, Any]) -> bool:
    """True if `out` holds this data set, complete. False if `out` is missing or empty.

    Raises:
        DataError: `out` has other content, or holds this data set with a damaged shard.
    """
    if not (out / "dataset.json").is_file():
        require_free_folder(out)
        return False
    found = read_description(out)
    require_same(found, out, name, recipe)
    for split in found["splits"].values():
        for shard in split["shards"]:
            tar = out / shard["tar"]
            size = tar.stat().st_size if tar.is_file() else None
            if size != shard["bytes"] or not tar.with_suffix(".idx").is_file():
                raise DataError(
                    f"{tar}: wanted {shard['bytes']} bytes and an index, found {size}; remove {out} and build it again"
                )
    log.info("%s already holds this data set; left as it is", out)
    return True


def require_same(found: Mapping[str, Any], out: Path | str, name: str, recipe: Mapping[str, Any]) -> None:
    """Raise DataError unless a description, found in the folder or at the URL `out`, has this name and this recipe."""
    if (found.get("name"), found.get("recipe")) != (name, dict(recipe)):
        had = found.get("recipe") or {}
        listed = ", ".join(
            f"{key} {_short(had.get(key, 'not set'))} in place of {_short(recipe.get(key, 'not set'))}"
            for key in sorted({*had, *recipe})
            if key not in had or key not in recipe or had[key] != recipe[key]
        )
        raise DataError(
            f"{out}: wanted a new folder or the data set {name} as it is built now, found {found.get('name')} with "
            f"{listed or 'the same settings'}; choose another folder or remove this one"
        )


def _short(value: Any) -> str:
    """A value as text for a message; a long one, such as a hash, by its first 12 characters."""
    text = str(value)
    return text if len(text) <= 40 else f"{text[:12]}..."


def read_description(folder: Path) -> dict[str, Any]:
    """Content of a data folder's `dataset.json`, with every field checked. DataError as `parse_description`."""
    file = folder / "dataset.json"
    if not folder.is_dir():
        require_local(folder)
        raise DataError(f"{folder}: wanted a data folder, found none; `mvlm data` writes one")
    try:
        text = read_regular(file, "dataset.json", within=folder)
    except FileNotFoundError:
        names = (name.lower() for _, _, names in os.walk(folder) for name in names)
        has_images = any(name.endswith(LISTED) for name in islice(names, 10_000))
        advice = f"`mvlm data folder {shlex.quote(str(folder))} OUT` makes a data set of these images"
        raise DataError(
            f"{file}: wanted the data set's description, found no such file; "
            f"{advice if has_images else '`mvlm data` writes it'}"
        ) from None
    description = parse_description(text, str(file))
    _check_links(folder, description)
    return description


def _check_links(folder: Path, description: Mapping[str, Any]) -> None:
    """Raise DataError if a file that a description names is a link that leaves the folder, or lies behind one."""
    names = ["tokenizer.json"]
    for split, part in description["splits"].items():
        names.append(f"{split}.index")
        for shard in part["shards"]:
            if "etag" in shard:  # a file of somebody else
                continue
            # A view states the tars of other folders outright; only its indices are its own.
            own = [shard["index"]] if "index" in shard else [shard["tar"], f"{shard['tar'].removesuffix('.tar')}.idx"]
            names += own
    places = {os.path.join(folder, name) for name in names}
    for place in {*(path for path in places if os.path.islink(path)), *map(os.path.dirname, places)}:
        resolve_inside(Path(place), folder)


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


_MOST = 1 << 48
"""More samples or bytes than any data set has, and few enough for sums in 64 bits."""
_SHA256 = re.compile(r"[0-9a-f]{64}")


def parse_description(text: bytes, where: str) -> dict[str, Any]:
    """Parse a `dataset.json`, named `where` in messages, and check every field that mvlm reads.

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
    fields.value(found, "its content", _OBJECT)
    version = fields.entry(found, "format_version", _NUMBER)
    if version != FORMAT_VERSION:
        raise DataError(
            f"{where}: wanted format_version {FORMAT_VERSION}, found {version}; build it again with this version"
        )
    for name in ("name", "source", "licence", "attribution"):
        fields.entry(found, name, _TEXT, optional=True)
    recipe = fields.entry(found, "recipe", _OBJECT, optional=True) or {}
    if isinstance(recipe.get("view"), dict):  # of `mvlm data view`; a recipe of others may have anything
        fields.entry(recipe["view"], "depth", _NUMBER, "recipe view ", optional=True)
    if found.get("tokenizer") is not None:
        fields.value(found["tokenizer"], "tokenizer", _HASH)
    if found.get("tokens") is not None:
        tokens = fields.value(found["tokens"], "tokens", _OBJECT)
        fields.entry(tokens, "fingerprint", _TEXT, "tokens ")
        fields.entry(tokens, "max_length", _NUMBER, "tokens ")
    rejected = fields.entry(found, "rejected", _OBJECT, optional=True) or {}
    for reason in rejected:
        fields.entry(rejected, reason, _NUMBER, "rejected ")
    for split, part in fields.entry(found, "splits", _SPLITS).items():
        _check_split(fields, split, part)
    return found


def _check_split(fields: "_Fields", split: str, part: Any) -> None:
    if not _is_split_name(split):
        fields.refuse(f"the split {_shown(split)}, which is not a name that files may have")
    fields.value(part, split, _OBJECT)
    samples = fields.entry(part, "samples", _NUMBER, f"{split} ")
    fields.entry(part, "captions", _NUMBER, f"{split} ")
    total = 0
    for number, shard in enumerate(fields.entry(part, "shards", _LIST, f"{split} ")):
        place = f"{split} shard {number} "
        fields.value(shard, place.strip(), _OBJECT)
        total += fields.entry(shard, "samples", _NUMBER, place)
        fields.entry(shard, "bytes", _NUMBER, place)
        if shard.get("sha256") != "":  # not known
            fields.entry(shard, "sha256", _HASH, place)
        fields.entry(shard, "index_sha256", _HASH, place, optional=True)
        fields.entry(shard, "index", _INSIDE, place, optional=True)
        if "etag" in shard:  # linked
            fields.entry(shard, "etag", _TEXT, place)
            fields.entry(shard, "tar", _LINKED, place)
            fields.entry(shard, "captions", _NUMBER, place, optional=True)
            if shard["tar"].endswith(".parquet"):
                groups = fields.entry(shard, "groups", _COUNTS, place)
                if sum(groups) != shard["samples"]:
                    fields.refuse(f"{shard['samples']} samples of {place.strip()}, and {sum(groups)} in its row groups")
            continue
        # A view has its own indices, and refers to the tars of other folders.
        fields.entry(shard, "tar", _FILE if "index" in shard else _INSIDE, place)
    if total != samples:
        fields.refuse(f"{samples} {split} samples, and {total} in its shards")


def require_split_name(split: str) -> None:
    """Raise DataError if a split cannot be part of the names of files in a data folder, such as `../x`."""
    if not _is_split_name(split):
        raise DataError(f"split: wanted a name that files may have, such as train, got {_shown(split)}; rename it")


def _is_split_name(split: str) -> bool:
    return 0 < len(split) <= 100 and split.isprintable() and "/" not in split and not split.startswith(".")


def _is_file(value: Any) -> bool:
    return isinstance(value, str) and PurePosixPath(value).name != "" and "\0" not in value


def _is_linked(value: Any) -> bool:
    return _is_file(value) and value.isprintable() and (is_remote(value) or PurePosixPath(value).is_absolute())


def _is_inside(value: Any) -> bool:
    return _is_file(value) and not PurePosixPath(value).is_absolute() and ".." not in PurePosixPath(value).parts


_Kind = tuple[str, Callable[[Any], bool]]
_NUMBER: _Kind = (
    "a number from 0", lambda value: isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _MOST
)  # fmt: skip
_TEXT: _Kind = ("a text", lambda value: isinstance(value, str))
_OBJECT: _Kind = ("an object", lambda value: isinstance(value, dict))
_SPLITS: _Kind = ("an object with at least one split", lambda value: isinstance(value, dict) and len(value) > 0)
_LIST: _Kind = ("a list", lambda value: isinstance(value, list))
_COUNTS: _Kind = (
    "a list of numbers from 1",
    lambda value: isinstance(value, list) and all(type(one) is int and 0 < one < _MOST for one in value),
)
_HASH: _Kind = ("64 hexadecimal digits", lambda value: isinstance(value, str) and _SHA256.fullmatch(value) is not None)
_FILE: _Kind = ("the name of a file", _is_file)
_LINKED: _Kind = ("a URL or an absolute path", _is_linked)
_INSIDE: _Kind = ("a file inside the folder", _is_inside)


class _Fields:
    """Type checks of the fields of dataset.json.

    A method raises DataError, which names the field, for a wrong value.
    """

    def __init__(self, where: str) -> None:
        self._where = where

    def refuse(self, found: str) -> NoReturn:
        raise DataError(
            f"{self._where}: wanted the description of a data set, found {found}; restore it, or build the data set "
            "again"
        )

    def value(self, value: Any, name: str, kind: _Kind) -> Any:
        """Return `value`, or raise DataError if it is not of the kind. name: of the field, for the message."""
        wanted, good = kind
        if not good(value):
            self.refuse(f"{name}: {_shown(value)}, not {wanted}")
        return value

    def entry(self, part: dict[str, Any], name: str, kind: _Kind, place: str = "", *, optional: bool = False) -> Any:
        """Return part[name], or raise DataError if it is missing or not of the kind.

        Args:
            part: object in dataset.json.
            place: prefix of the name in the message, such as that of the enclosing field.
            optional: return None for a missing field.
        """
        named = f"{place}{name if name.isprintable() and len(name) <= 60 else _shown(name)}"
        if name in part:
            return self.value(part[name], named, kind)
        return None if optional else self.refuse(f"no {named}")


def _shown(value: Any) -> str:
    """A value of JSON on one line, shortened."""
    if isinstance(value, dict | list):
        return ("an object" if isinstance(value, dict) else "a list") + f" of {len(value)}"
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:40]}..."
