"""JSON of models and runs, which may come from others. Errors are RunError.

`mvlm_dataloading.untrusted` opens the files, `mvlm.schemas` has their schemas. msgspec is imported when a schema is
compared, so that a model can be built and timed with torch alone.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mvlm.errors import RunError
from mvlm_dataloading import untrusted
from mvlm_dataloading.errors import DataError


@contextmanager
def run_errors() -> Iterator[None]:
    """Context in which a DataError becomes the RunError of its message."""
    try:
        yield
    except DataError as error:
        raise RunError(str(error)) from None


def read_json(file: Path, kind: str, wanted: str, schema: Any = None, *, within: Path | None = None) -> Any:
    """The value of a JSON file, which is as its schema says.

    Args:
        kind: key of `mvlm_dataloading.untrusted.LIMITS`, for the largest size that the file may have.
        wanted: the noun phrase for the content, for errors.
        schema: of `mvlm.schemas`. Default: any JSON.
        within: folder that the file has to lie in, once links are resolved. Default: the folder that it is in.

    Raises:
        RunError: it is no regular file, too large, no JSON or not as its schema says, or a link leads out of `within`.
        OSError: it is missing or cannot be read.
    """
    with run_errors():
        value = untrusted.read_json(file, kind, wanted, within=within or file.parent)
    if schema is None:
        return value
    from mvlm.schemas import check

    return check(value, schema, file, wanted)


def json_lines(file: Path, *, within: Path | None = None) -> Iterator[dict[str, Any]]:
    """The JSON objects of a file, one a line. Other lines, such as the beginning that a kill may leave, are skipped.

    RunError if it is no regular file, or too large, or if a link leads out of its folder. OSError without a file.
    """
    with run_errors():
        for line in untrusted.regular_lines(file, "metrics", within=within or file.parent):
            try:
                found = untrusted.parse_json(line)
            except ValueError:
                continue
            if isinstance(found, dict):
                yield found


def read_spec(file: Path) -> Any:
    """Read plan.json, the specification of unfinished work. None if there is no such file, or if it is incomplete."""
    try:
        return read_json(file, "settings", "the specification of unfinished work")
    except (OSError, RunError):
        return None
