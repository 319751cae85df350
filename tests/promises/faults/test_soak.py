"""Verdicts of the soak test on made-up samples: each quantity that must not grow is caught if it does."""

import pytest

from promises.faults.soak import verdicts


def samples(slowing: float = 0.0, **growth: float) -> list[dict[str, float]]:
    """A hundred samples, 5 s apart. Each field grows by its `growth` in all; the speed falls by the share `slowing`."""
    start = {"memory_mb": 700.0, "files": 30.0, "threads": 9.0, "children": 0.0}
    found, pairs = [], 0.0
    for i in range(100):
        row = {name: value + growth.get(name, 0.0) * i / 99 for name, value in start.items()}
        found.append(row | {"time": 5.0 * i, "cpu_s": 6.0 * i, "pairs": pairs})
        pairs += 500 * (1 - slowing * i / 99)
    return found


@pytest.mark.parametrize(
    "growth, slowing, unwell",
    [
        ({}, 0.0, set()),
        ({"memory_mb": 30.0}, 0.0, set()),
        ({"memory_mb": 90.0}, 0.0, {"memory_mb"}),
        ({"files": 20.0}, 0.0, {"files"}),
        ({"threads": 20.0}, 0.0, {"threads"}),
        ({"children": 20.0}, 0.0, {"children"}),
        ({}, 0.3, {"speed_over_fresh"}),
        ({}, 0.1, set()),
    ],
)
def test_soak_finds_what_grows_or_slows(growth, slowing, unwell):
    found = verdicts(samples(slowing, **growth), [1 - slowing * i / 29 for i in range(30)])
    assert {name for name, row in found.items() if not row.get("well", True)} == unwell
    assert found["pairs_per_s"]["before"] == pytest.approx(1.2 * found["pairs_per_cpu_s"]["before"], rel=1e-3)
