"""Bytes that the kernels move, counted in the interpreter: within a few per cent of the fewest possible."""

from typing import Any

import pytest
import torch

from mvlm_benchmarks.kernels import traffic
from mvlm_kernels import dispatch
from mvlm_kernels.case import Sizes
from mvlm_kernels.place_tokens.cases import sized

CASES = list({case.op: case for case in traffic.counted(2) if case.op != "place_tokens"}.values())
"""One of each op; those of place_tokens are extrapolated."""
FEW = Sizes(side=64, patch=16, masked=8, width=768)
"""Tokens are counted at a few positions: each has programs of its own."""


@pytest.fixture(autouse=True)
def _few_multiprocessors(monkeypatch):
    """Few enough for rows past one wave."""
    monkeypatch.setattr(dispatch, "multiprocessors", lambda device: 4)


def check(moved, case):
    for bytes_moved, fewest, bound in zip(moved, case.minimum, (1.05, 1.10), strict=True):
        assert bytes_moved <= bound * fewest
    assert case.minimum[0] <= moved[0] * 1.001


@pytest.mark.extended
@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=[f"{case.op} {case.label}" for case in CASES])
def test_kernels_move_few_bytes_beyond_the_minimum(case):
    check(traffic.measure(case), case)


@pytest.mark.extended
@pytest.mark.slow
@pytest.mark.parametrize("mode", ["both", "visible"])
def test_place_tokens_moves_few_bytes_beyond_the_minimum(mode: Any):
    few, more, whole = (sized(batch, torch.bfloat16, mode, torch.float32, sizes=FEW) for batch in (1, 2, traffic.BATCH))
    check(traffic.extrapolated(traffic.measure(few), traffic.measure(more), (1, 2)), whole)
