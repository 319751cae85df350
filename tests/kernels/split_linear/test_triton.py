"""Values of split_linear, interpreted, against autograd of the plain layer in float64."""

import pytest
import torch
import torch.nn.functional as F

from mvlm_kernels import dispatch, use_backend
from mvlm_kernels.split_linear import split_linear


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("parts, width", [(2, 5), (3, 300)])
def test_values_and_gradients_are_those_of_the_plain_layer(backend, parts, width, monkeypatch):
    """Several programs take several tiles each; the gradients come with any strides."""
    monkeypatch.setattr(dispatch, "multiprocessors", lambda _: 1)
    draw = torch.Generator().manual_seed(parts)
    x, weight, bias = (
        torch.randn(*shape, generator=draw, dtype=torch.float64).requires_grad_()
        for shape in ((3, 40, 7), (parts * width, 7), (parts * width,))
    )
    grads = [torch.randn(40, 3, width, generator=draw, dtype=torch.float64).transpose(0, 1) for _ in range(parts)]
    wanted = F.linear(x, weight, bias).chunk(parts, -1)
    with use_backend(backend):
        found = split_linear(x, weight, bias, parts)
        inner = torch.autograd.grad(found, (x, weight, bias), grads)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(inner, torch.autograd.grad(wanted, (x, weight, bias), grads))
