"""Ranges of settings, in the types of dataclass fields."""

import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import pytest

from mvlm.config.ranges import ABOVE_0, AT_LEAST_0, AT_LEAST_1, DECAY, FRACTION, Range, check_values
from mvlm.errors import ConfigError


@pytest.mark.parametrize(
    "wanted, inside, outside, text",
    [
        (AT_LEAST_0, (0, 0.5, 1e9), (-1, -1e-9), "at least 0"),
        (AT_LEAST_1, (1, 7), (0, 0.999), "at least 1"),
        (ABOVE_0, (1e-9, 3), (0, -1), "above 0"),
        (FRACTION, (0, 0.5, 1), (-0.1, 1.1), "in [0, 1]"),
        (DECAY, (0, 0.999), (1, 1.5, -0.1), "in [0, 1)"),
        (Range(0.001, 0.5), (0.001, 0.5), (0, 0.51), "in [0.001, 0.5]"),
        (Range(2, 4, exclude_low=True, exclude_high=True), (3,), (2, 4), "in (2, 4)"),
    ],
)
def test_a_range_holds_its_numbers_and_says_so(wanted, inside, outside, text) -> None:
    assert all(number in wanted for number in inside)
    assert not any(number in wanted for number in outside)
    assert str(wanted) == text


@dataclass
class Settings:
    count: Annotated[int, AT_LEAST_1] = 1
    shares: tuple[float, float] = (0.0, 1.0)
    rates: Annotated[tuple[float, ...], FRACTION] = (0.5,)
    free: float = -3.0
    way: Literal["up", "down", "left"] = "up"
    end: Literal["near", "far"] = "far"
    size: int | None = None
    name: str = "x"
    folder: Annotated[str | None, "no range"] = None

    def __post_init__(self) -> None:
        check_values(self)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"count": 0}, "count must be at least 1, got 0"),
        ({"free": math.nan}, "free must be a finite number, got nan"),
        ({"free": 10**400}, "free must be a finite number, got 10{400}"),
        ({"shares": (0.0, -math.inf)}, "shares must be a finite number, got -inf"),
        ({"rates": (0.5, 1.5)}, r"rates must be in \[0, 1\], got 1.5"),
        ({"count": 1.5}, "count must be an integer, got 1.5"),
        ({"way": "Up"}, 'way must be "up", "down" or "left", got \'Up\''),
        ({"end": "nearby"}, 'end must be "near" or "far", got \'nearby\''),
        ({"shares": (0.5,)}, r"shares must have 2 values, got \(0.5,\)"),
        ({"shares": [0.5, 0.5, 0.5]}, r"shares must have 2 values, got \[0.5, 0.5, 0.5\]"),
        ({"end": None}, 'end must be "near" or "far", got None'),
        ({"size": 48.5}, "size must be an integer, got 48.5"),
    ],
)
def test_a_value_that_its_field_does_not_allow_is_refused(changes: dict[str, Any], message) -> None:
    with pytest.raises(ConfigError, match=f"^{message}$"):
        Settings(**changes)
