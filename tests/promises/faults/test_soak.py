"""The soak's verdicts on made-up looks: each thing that may not grow is caught when it does."""

import importlib.util
from pathlib import Path

import pytest

spec = importlib.util.spec_from_file_location("soak", Path(__file__).parent / "soak.py")
assert spec is not None
assert spec.loader is not None
soak = importlib.util.module_from_spec(spec)
spec.loader.exec_module(soak)


def looks(slowing: float = 0.0, **growth: float) -> list[dict[str, float]]:
    """A hundred looks, 5 s apart, each field growing by so much over the time; the speed falls by a share of itself."""
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
def test_what_grows_is_found(growth, slowing, unwell):
    found = soak.verdicts(looks(slowing, **growth), [1 - slowing * i / 29 for i in range(30)])
    assert {name for name, row in found.items() if not row.get("well", True)} == unwell
    assert found["pairs_per_s"]["before"] == pytest.approx(1.2 * found["pairs_per_cpu_s"]["before"], rel=1e-3)


def test_what_slows_all_programs_alike_is_no_fault():
    assert soak.verdicts(looks(slowing=0.5), [1.0] * 30)["speed_over_fresh"]["well"]


def test_the_last_whole_line_tells_the_pairs(tmp_path):
    file = tmp_path / "metrics.jsonl"
    assert soak.last_pairs(file) == 0
    file.write_text('{"pairs_seen": 8}\n{"pairs_seen": 16}\n{"pairs_s')
    assert soak.last_pairs(file) == 16
