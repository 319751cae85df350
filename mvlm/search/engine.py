"""LanceDB, the engine of an index: connections, the description of an index, and errors in one line."""

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa

from mvlm.errors import ConfigError, RunError
from mvlm.search.embedding_files import FORMAT_VERSION

_ABOUT = {"format_version", "model", "checkpoint", "width", "sources", "partitions"}


def read_about(database: Any, location: str) -> dict[str, Any]:
    """Description of an index. RunError if it is damaged, or of another version."""
    try:
        about = json.loads(database.open_table("about").to_arrow()["json"][0].as_py())
        version = about["format_version"]
        if version == FORMAT_VERSION and not about.keys() >= _ABOUT:
            raise KeyError(sorted(_ABOUT - about.keys())[0])
    except Exception as error:  # the engine raises errors of many types
        raise RunError(
            f"{location}: wanted the description of an index, could not read it: {short(error)}; make it again"
        ) from None
    if version != FORMAT_VERSION:
        raise RunError(f"{location}: wanted format version {FORMAT_VERSION}, found {version}; make it again")
    return about


def write_about(database: Any, about: dict[str, Any]) -> None:
    """Write the description of an index, in place of the one before."""
    database.create_table("about", pa.table({"json": [json.dumps(about)]}), mode="overwrite")


def connect(location: str) -> Any:
    """Connect to a folder or an object store. RunError if it cannot be used, ConfigError without lancedb."""
    os.environ.setdefault("LANCEDB_LOG", "error")  # read when lancedb is imported
    try:
        import lancedb
    except ImportError:
        raise ConfigError(
            "search: wanted the package lancedb, which is not installed; pip install 'mvlm[search]'"
        ) from None
    try:
        return lancedb.connect(location)
    except Exception as error:  # the engine raises bare RuntimeError and OSError
        raise RunError(f"{location}: wanted a folder or a URL for an index, could not use it: {short(error)}") from None


def table_names(database: Any) -> Sequence[str]:
    """Names of up to 100 tables of a database. RunError if it cannot be read."""
    try:
        return database.list_tables(limit=100).tables
    except Exception as error:
        raise RunError(f"{database.uri}: wanted an index, could not read it: {short(error)}; check the URL") from None


@contextlib.contextmanager
def filter_errors(where: str | None, schema: pa.Schema) -> Iterator[None]:
    """Turn any error of a search with a filter into a ConfigError that quotes it and lists the columns."""
    try:
        yield
    except Exception as error:
        if where is None:
            raise
        names = ", ".join(name for name in schema.names if name not in ("vector", "metadata"))
        raise ConfigError(
            f"where: wanted an SQL condition on the columns {names}, got {where!r} ({short(error)}); correct it"
        ) from None


def short(error: Exception) -> str:
    """Text of an error as one line, cut to 200 characters."""
    return " ".join(str(error).split())[:200]
