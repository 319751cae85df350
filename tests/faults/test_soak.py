"""The soak's verdicts on made-up looks: each thing that may not grow is caught when it does."""

import importlib.util
from pathlib import Path

import pytest

spec = importlib.util.spec_from_file_location("soak", Path(__file__).parent / "soak.py")
assert spec is not None
assert spec.loader is not None
soak = importlib.util.module_from_spec(spec)
spec.loader.exec_module(soak)


def looks(**growth: float) -> list[dict[str, float]]:
    """A hundred looks, each field growing by so much over the time."""
    start = {"memory_mb": 700.0, "files": 30.0, "threads": 9.0, "children": 0.0}
    return [{name: value + growth.get(name, 0.0) * i / 99 for name, value in start.items()} for i in range(100)]


@pytest.mark.parametrize(
    "growth, slowing, unwell",
    [
        ({}, 0.0, set()),
        ({"memory_mb": 30.0}, 0.0, set()),
        ({"memory_mb": 90.0}, 0.0, {"memory_mb"}),
        ({"files": 20.0}, 0.0, {"files"}),
        ({"threads": 20.0}, 0.0, {"threads"}),
        ({"children": 20.0}, 0.0, {"children"}),
        ({}, 0.3, {"pairs_per_s"}),
        ({}, 0.1, set()),
    ],
)
def test_what_grows_is_found(growth, slowing, unwell):
    speeds = [100 * (1 - slowing * i / 99) for i in range(100)]
    found = soak.verdicts(looks(**growth), speeds)
    assert {name for name, row in found.items() if not row["well"]} == unwell
