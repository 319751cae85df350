"""Ranges and choices of settings, stated in the field's type: `batch_size: Annotated[int, AT_LEAST_1] = 64`."""

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from mvlm.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Range:
    """Range of the numbers that a field may have, from `low` to `high`; both ends are included by default."""

    low: float
    high: float = math.inf
    exclude_low: bool = False
    """True = `low` itself is not allowed."""
    exclude_high: bool = False
    """True = `high` itself is not allowed."""

    def __contains__(self, value: float) -> bool:
        above = value > self.low if self.exclude_low else value >= self.low
        return above and (value < self.high if self.exclude_high else value <= self.high)

    def __str__(self) -> str:
        if self.high == math.inf:
            return f"{'above' if self.exclude_low else 'at least'} {self.low:g}"
        return f"in {'(' if self.exclude_low else '['}{self.low:g}, {self.high:g}{')' if self.exclude_high else ']'}"


AT_LEAST_0 = Range(0)
AT_LEAST_1 = Range(1)
ABOVE_0 = Range(0, exclude_low=True)
FRACTION = Range(0, 1)
DECAY = Range(0, 1, exclude_high=True)
"""Decay of a moving average. 1 would never forget its start."""
NO_FLAG = "no flag"
"""Marker for a setting that has no flag on the command line. Python or a config.json sets it."""
COMPARES = "compares"
"""Marker for the weight of an objective that compares the pairs of a batch, and needs two of them."""


_FLOATS = Range(-1e150, 1e150)
"""Range of floats whose setting states no highest value. Their squares are finite, such as that of an image's side."""
_INTEGERS = Range(-(2**63), 2**63 - 1)
"""Range of integers whose setting states no highest value: the values of int64."""
TORCH_SEED = Range(-(2**63), 2**64 - 1)
"""Seeds that torch's generators take."""


def check_values(config: Any) -> None:
    """Raise ConfigError for a value of a dataclass that the type of its field does not allow.

    That is a number that is NaN, infinite, or outside the range of its field; a fraction where the field is an integer;
    a text that is none of the field's choices; and a tuple of another length. A string becomes a path where the field
    is one, and an integer becomes a float where the field is one: torch multiplies no tensor with 10**20 as an integer.
    """
    hints, types = get_type_hints(type(config), include_extras=True), get_type_hints(type(config))
    for field in fields(config):
        value = getattr(config, field.name)
        _check_type(field.name, types[field.name], value)
        possible = (types[field.name], *get_args(types[field.name]))  # X | None and tuple[X, X] too
        if isinstance(value, str) and Path in possible:
            object.__setattr__(config, field.name, Path(value))
        numbers = [v for v in (value if isinstance(value, tuple) else (value,)) if isinstance(v, int | float)]
        ranges = [each for each in getattr(hints[field.name], "__metadata__", ()) if isinstance(each, Range)]
        if not any(each.high < math.inf for each in ranges):
            ranges.append(_FLOATS if float in possible else _INTEGERS)
        for number in numbers:
            for wanted in ranges:
                if number not in wanted:
                    raise ConfigError(f"{field.name} must be {wanted}, got {number}")
        if float in possible and numbers:
            as_floats = tuple(map(float, numbers)) if isinstance(value, tuple) else float(numbers[0])
            object.__setattr__(config, field.name, as_floats)


def _check_type(name: str, wanted: Any, value: Any) -> None:
    """Raise ConfigError for a value of a wrong type, of those that callers in Python may mistype.

    Command lines and JSON files are checked in full when they are read.
    """
    choices = get_args(wanted)
    if type(None) in choices:  # int | None
        if value is None:
            return
        wanted, choices = choices[0], get_args(choices[0])
    if get_origin(wanted) is Literal and value not in choices:
        *first, last = (f'"{choice}"' for choice in choices)
        raise ConfigError(f"{name} must be {', '.join(first)} or {last}, got {value!r}")
    if wanted is int and isinstance(value, float):
        raise ConfigError(f"{name} must be an integer, got {value}")
    if get_origin(wanted) is tuple and ... in choices:
        if not isinstance(value, tuple | list):
            raise ConfigError(f"{name} must be a tuple, got {value!r}")
        for part in value:
            _check_type(name, choices[0], part)
    fixed = get_origin(wanted) is tuple and ... not in choices
    if fixed and isinstance(value, tuple | list) and len(value) != len(choices):
        raise ConfigError(f"{name} must have {len(choices)} values, got {value}")
