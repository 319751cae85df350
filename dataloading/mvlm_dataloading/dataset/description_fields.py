"""Fields of `dataset.json`, checked in one place before anything uses them."""

import json
import re
from pathlib import PurePosixPath
from typing import Any, NoReturn

from mvlm_dataloading.errors import DataError

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
