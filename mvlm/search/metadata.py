"""Metadata as columns to filter by: each field that is a number, a truth value or a string."""

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

import pyarrow as pa

RESERVED = ("key", "source", "id", "split", "row", "metadata", "text", "vector")
MAX_COLUMNS = 64
TYPES = {"bool": pa.bool_(), "int": pa.int64(), "float": pa.float64(), "str": pa.string()}


class ColumnTypes:
    """Types of the fields, from all metadata that it was shown."""

    def __init__(self) -> None:
        self._seen: dict[str, set[str]] = {}

    def see(self, metadata: Iterable[str]) -> None:
        """Take note of the fields of some items, JSON objects."""
        for text in metadata:
            for name, value in json.loads(text).items():
                if isinstance(value, bool | int | float | str) and usable(name):
                    self._seen.setdefault(name, set()).add(type(value).__name__)

    def fields(self) -> list[pa.Field]:
        """Columns by name: int64, double where some are not whole, bool, and string where types differ."""
        found = []
        for name, kinds in sorted(self._seen.items())[:MAX_COLUMNS]:
            kind = "float" if kinds == {"int", "float"} else next(iter(kinds)) if len(kinds) == 1 else "str"
            found.append(pa.field(name, TYPES[kind]))
        return found


def usable(name: str) -> bool:
    """True for a field that can be a column: a plain name that no other column has, nor the engine's (`_distance`)."""
    return re.fullmatch(r"[A-Za-z]\w{0,63}", name, re.ASCII) is not None and name.lower() not in RESERVED


def columns_of(metadata: Sequence[str], fields: Iterable[pa.Field]) -> dict[str, pa.Array]:
    """A column for each field, null where an item lacks it or has a value of another type."""
    values = [json.loads(text) for text in metadata]
    return {
        field.name: pa.array([_as_type(one.get(field.name), field.type) for one in values], field.type)
        for field in fields
    }


def _as_type(value: Any, wanted: pa.DataType) -> Any:
    if value is None or isinstance(value, list | dict):
        return None
    if pa.types.is_string(wanted):
        return value if isinstance(value, str) else json.dumps(value)
    if pa.types.is_boolean(wanted):
        return value if isinstance(value, bool) else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if pa.types.is_floating(wanted):
        return float(value) if abs(value) < 2**1023 else None
    return value if isinstance(value, int) and -(2**63) <= value < 2**63 else None
