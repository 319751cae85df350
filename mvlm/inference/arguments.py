"""Checks of the arguments of a model's methods: one line with the argument's name, what was wanted and what was got."""

import operator
from collections.abc import Iterable, Mapping
from typing import Any

from mvlm.errors import ConfigError


def whole_number(name: str, value: Any, least: int | None = 1, most: int | None = None) -> int:
    """The value as an int. ConfigError if it is no whole number in the range; a bool is none."""
    try:
        found = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        found = None
    if found is None:
        raise ConfigError(f"{name}: wanted a whole number, got {shown(value)}")
    if (least is not None and found < least) or (most is not None and found > most):
        wanted = f"at least {least}" if most is None else f"{least} to {most}"
        raise ConfigError(f"{name}: wanted {wanted}, got {found}")
    return found


def one_text(name: str, value: Any) -> str:
    """The value, if it is a string. ConfigError for another one."""
    if not isinstance(value, str):
        raise ConfigError(f"{name}: wanted one text, a str, got {shown(value)}")
    return value


def list_of_texts(name: str, values: Any) -> list[str]:
    """Several strings as a list. One string is a list of one. ConfigError for other values."""
    if isinstance(values, str):
        return [values]
    if isinstance(values, bytes | bytearray | Mapping) or not isinstance(values, Iterable):
        raise ConfigError(f"{name}: wanted a sequence of texts, got {shown(values)}")
    found = list(values)
    for number, value in enumerate(found):
        if not isinstance(value, str):
            raise ConfigError(f"{name}: wanted texts, got {shown(value)} as number {number}")
    return found


def shown(value: Any) -> str:
    """A short value as it is written in Python; of any other value its type."""
    if value is None or isinstance(value, bool | int | float | str | bytes):
        written = repr(value)
        if len(written) <= 40:
            return written
    return f"a {type(value).__name__}"
