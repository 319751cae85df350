"""Products of bf16 with a bias on a CPU, against float64."""

import pytest
import torch

from mvlm_kernels.linear import linear


@pytest.mark.parametrize("shape", [(3, 5, 16), (40, 16), (0, 16)])
def test_values_are_those_of_float64_rounded_once(shape):
    torch.manual_seed(0)
    x, weight, bias = (torch.randn(s).bfloat16() for s in (shape, (24, 16), (24,)))
    for given in (None, bias):
        found = linear(x, weight, given)
        wanted = torch.einsum("...c,wc->...w", x.double(), weight.double()) + (0 if given is None else given.double())
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found.double(), wanted, rtol=2**-8, atol=1e-5)
