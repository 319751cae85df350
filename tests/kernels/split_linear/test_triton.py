"""Values of split_linear, interpreted, against one product a part in float64."""

from typing import Any

import pytest
import torch

from mvlm_kernels import dispatch
from mvlm_kernels.split_linear.cases import case
from support.kernels.check import check, results


@pytest.mark.parametrize("parts, width", [(2, 5), (3, 300)])
def test_values_and_gradients_are_those_of_the_plain_layer(parts: int, width: int, monkeypatch: pytest.MonkeyPatch):
    """Several programs take several tiles each."""
    monkeypatch.setattr(dispatch, "multiprocessors", lambda _: 1)
    check(case("", 120, width, parts, torch.float64))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_gradients_come_with_any_strides(backend: Any):
    made = case("", 40, 6, 2, torch.float64)
    strided = [torch.randn(6, 1, 40, dtype=torch.float64).permute(2, 1, 0) for _ in range(2)]
    with dispatch.use_backend(backend):
        wanted = results(made.ours, made.make("cpu"), [x.contiguous() for x in strided])
        found = results(made.ours, made.make("cpu"), strided)
    torch.testing.assert_close(found, wanted)
