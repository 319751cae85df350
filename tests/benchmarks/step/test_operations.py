"""Operations of a step: the counter against a count by hand, and how many the host may have to queue."""

import pytest
import torch

from mvlm_benchmarks.step.operations import KINDS, REST, Operations, count


def test_operations_against_a_count_by_hand():
    a, b = torch.zeros(4, 8, requires_grad=True), torch.zeros(8, 16)
    with Operations() as found:
        c = (a @ b).T.to(torch.bfloat16)  # a product and a cast; the view is free
        c.sum().backward()  # a sum; ones, a cast and a product back
    assert {name: n for name, n in found.queued.items() if not name.startswith("ones_like")} == {
        "mm": 1, "_to_copy": 1, "sum": 1, "_to_copy backward": 1, "mm backward": 1
    }  # fmt: skip
    assert found.by_kind()["products"] == 2
    assert found.by_kind()["casts and copies"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("preset, most, casts", [("tiny", 1900, 250), ("base", 2200, 310)])
def test_a_step_has_few_operations(preset: str, most: int, casts: int):
    """Each weight cast for itself would be 300 operations more for `tiny` and 530 for `base`; Muon's matrices one by
    one 1,600 for `tiny`."""
    found = count(preset)
    kinds = found.by_kind()
    assert list(kinds) == [*KINDS, REST]
    assert all(kinds.values())
    assert sum(kinds.values()) <= most
    assert kinds["casts and copies"] <= casts
