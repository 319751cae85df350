"""Captions of linked samples: the fields of `--caption`, and the captions that the files of a sample hold in them."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from mvlm_dataloading.captions import clean_line, is_visible
from mvlm_dataloading.errors import DataError
from mvlm_dataloading.untrusted import parse_json

MOST_FILES = 4
"""Most files of a sample in a tar that have captions. An index has eight bytes for each."""
MOST_CAPTION = 1 << 16
"""Longest caption in bytes of UTF-8."""
MOST_CAPTIONS = 1 << 10
"""Most captions of a field of a sample."""
_FIELD = re.compile(r"([^\s:=,]+)(?::([^\s:=,]+))?(?:=(\d+(?:\.\d*)?))?")


@dataclass(frozen=True, slots=True)
class Field:
    """Part of a sample that has captions, and the weight with which one of them is drawn."""

    file: str
    """Extension of a file in a tar, such as txt or caption1.txt; column of a table."""
    path: tuple[str, ...]
    """Names that lead to the captions in a JSON object, or in a struct of a table."""
    weight: float


@dataclass(frozen=True)
class CaptionSpec:
    """Captions that a link takes of a sample: those in its fields. Made by `parse_captions_option`."""

    fields: tuple[Field, ...]
    lines: bool
    """True if each line of a text is a caption, False if a text is one caption."""

    @cached_property
    def files(self) -> tuple[str, ...]:
        """Files, or columns, that have captions, each once."""
        return tuple(dict.fromkeys(field.file for field in self.fields))

    def captions(self, parts: Mapping[str, Any]) -> tuple[list[str], list[float]]:
        """Captions of a sample, each on one line, and the probability of each.

        A field is drawn by its weight among those in which the sample has captions, and then one of its captions.

        Args:
            parts: file -> its content in bytes; column -> its value. Those that the sample lacks are absent or None.
        """
        found: dict[str, float] = {}
        known = [(field.weight, lines) for field in self.fields if (lines := self._of_field(field, parts))]
        if len(known) == 1 and len(known[0][1]) == 1:  # as nearly always
            return known[0][1], [1.0]
        for weight, lines in known:
            for line in lines:
                found[line] = found.get(line, 0.0) + weight / len(lines)
        total = sum(weight for weight, _ in known)
        return list(found), [weight / total for weight in found.values()]

    def _of_field(self, field: Field, parts: Mapping[str, Any]) -> list[str]:
        value = parts.get(field.file)
        if field.path:
            value = _follow(value, field.path)
        if type(value) is bytes:  # a file of a tar
            texts = [text] if (text := _text(value)) else []
        else:
            texts = [text for text in map(_text, value if isinstance(value, list | tuple) else [value]) if text]
        if self.lines:
            texts = [line for text in texts for line in text.splitlines()]
        lines = [clean_line(text) for text in texts[:MOST_CAPTIONS] if len(text) <= MOST_CAPTION]
        lines = [line for line in lines if is_visible(line) and len(line.encode()) <= MOST_CAPTION]
        return lines if len(lines) < 2 else list(dict.fromkeys(lines))

    def to_json(self) -> dict[str, Any]:
        """Content of `captions` in dataset.json."""
        return {"fields": [[one.file, list(one.path), one.weight] for one in self.fields], "lines": self.lines}


def _follow(value: Any, path: Sequence[str]) -> Any:
    """The value at a path in a JSON object, encoded or not. None if there is none."""
    if isinstance(value, bytes | bytearray | memoryview | str):
        try:
            value = parse_json(value if isinstance(value, str) else bytes(value))
        except ValueError:
            return None
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _text(value: Any) -> str:
    """A caption: a text, or a class as a number. Empty for all else, and for bytes that are not UTF-8."""
    if isinstance(value, bytes | bytearray | memoryview):
        try:
            return bytes(value).decode("utf-8-sig")
        except UnicodeDecodeError:
            return ""
    return str(value) if isinstance(value, str | int) and not isinstance(value, bool) else ""


def parse_captions_option(text: str, lines: bool = False) -> CaptionSpec:
    """The fields of a text such as `txt,json:caption=0.5,json:recaption=0.5`. A field without a weight has 1.

    Raises:
        DataError: it has another form, a weight of 0, or too many files.
    """
    fields = []
    for word in text.split(","):
        found = _FIELD.fullmatch(word.strip())
        weight = float(found[3]) if found and found[3] else 1.0
        if found is None or not 0 < weight < 1e6:
            raise DataError(
                f"caption: wanted fields such as txt,json:caption=0.5 with weights above 0, found {word!r}; correct it"
            )
        path = tuple(found[2].split(".")) if found[2] else ()
        if not path and found[1].rpartition(".")[2] == "json":
            raise DataError(f"caption: wanted the field of {found[1]} too, such as json:caption, found none; add it")
        fields.append(Field(found[1], path, weight))
    return _checked(fields, lines, "caption")


def read_spec(value: Any, where: str) -> CaptionSpec:
    """The `captions` of a dataset.json, named `where` in the message. Raises DataError if they are none."""
    try:
        fields = [Field(str(file), tuple(map(str, path)), float(weight)) for file, path, weight in value["fields"]]
        good = bool(fields) and all(0 < field.weight < 1e6 for field in fields)
        lines = value.get("lines") is True
    except (AttributeError, KeyError, TypeError, ValueError):
        fields, good, lines = [], False, False
    if not good:
        raise DataError(f"{where}: wanted the captions of a link, found {json.dumps(value)[:60]}; link again")
    return _checked(fields, lines, where)


def _checked(fields: Sequence[Field], lines: bool, where: str) -> CaptionSpec:
    spec = CaptionSpec(tuple(fields), lines)
    if len(spec.files) > MOST_FILES:
        raise DataError(
            f"{where}: wanted captions in at most {MOST_FILES} files of a sample, found {len(spec.files)}; leave some "
            "out"
        )
    return spec
