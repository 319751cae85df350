"""Metadata as columns to filter by: each field that is a number, a truth value or a string."""

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

RESERVED = ("key", "source", "id", "split", "row", "metadata", "text", "vector")
MAX_COLUMNS = 64
TYPES = {"bool": pa.bool_(), "int": pa.int64(), "float": pa.float64(), "str": pa.string()}


class ColumnTypes:
    """Types of the fields, from all metadata that it was shown."""

    def __init__(self) -> None:
        self._seen: dict[str, set[str]] = {}
        self._not_whole: set[str] = set()

    def see(self, metadata: Iterable[str]) -> None:
        """Take note of the fields of some items, JSON objects."""
        for text in metadata:
            for name, value in json.loads(text).items():
                if isinstance(value, bool | int | float | str) and usable(name):
                    kind = type(value).__name__
                    if isinstance(value, int | float) and _as_int64(value) is None and _as_double(value) is not None:
                        kind = "float"
                        self._not_whole.add(name)
                    self._seen.setdefault(name, set()).add(kind)

    def fields(self) -> list[pa.Field]:
        """Columns by name: int64, double where some are not whole or too large, bool, and string where types differ."""
        found = []
        for name, kinds in sorted(self._seen.items())[:MAX_COLUMNS]:
            kind = "float" if kinds == {"int", "float"} else next(iter(kinds)) if len(kinds) == 1 else "str"
            found.append(pa.field(name, TYPES[kind]))
        return found

    def too_narrow(self, fields: Iterable[pa.Field]) -> list[str]:
        """Names of the int64 columns among `fields` for which numbers were seen that only a double holds."""
        return [field.name for field in fields if field.type == TYPES["int"] and field.name in self._not_whole]


def types_in(file: Path) -> ColumnTypes:
    """Types of the metadata in a Parquet file of embeddings."""
    types = ColumnTypes()
    for batch in pq.ParquetFile(file).iter_batches(columns=["metadata"]):
        types.see(batch["metadata"].to_pylist())
    return types


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
        return _as_double(value)
    return _as_int64(value)


def _as_double(value: float) -> float | None:
    """A number as double, None if it is too large or not a number."""
    return float(value) if abs(value) < 2**1023 else None


def _as_int64(value: float) -> int | None:
    """A number as int64, None if it is not whole or too large. 2.0 is whole."""
    return int(value) if value == value // 1 and -(2**63) <= value < 2**63 else None
