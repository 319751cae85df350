"""The log-sum-exp of cross-attention, against the oracle in float64."""

from dataclasses import replace
from typing import Any

import pytest
import torch

import mvlm_kernels
from mvlm_kernels import cross_attention
from mvlm_kernels.cross_attention.cases import SIDES, oracle
from support.kernels.attention import build


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("name", SIDES)
def test_lse_of_each_layout(name: str, backend: Any):
    call = build(replace(SIDES[name], heads=2))
    with mvlm_kernels.use_backend(backend):
        lse = cross_attention(call.q, call.k, call.v, return_lse=True, **call.kwargs, **call.bounds)[1]
    assert lse.dtype == torch.float32
    wanted = oracle(*(x.double() for x in (call.q, call.k, call.v)), return_lse=True, **call.kwargs)[1]
    torch.testing.assert_close(lse[..., : wanted.shape[-1]].double(), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_lse_is_natural_and_the_output_keeps_its_gradient(backend: Any):
    q, k, v = (torch.randn(2, n, 2, 32, dtype=torch.float64) for n in (5, 7, 7))
    q.requires_grad_()
    with mvlm_kernels.use_backend(backend):
        out, lse = cross_attention(q, k, v, scale=0.5, return_lse=True)
        (grad,) = torch.autograd.grad(out.sum(), q)
        (wanted_grad,) = torch.autograd.grad(cross_attention(q, k, v, scale=0.5).sum(), q)
    scores = torch.stack([q[b, :, h] @ k[b, :, h].T * 0.5 for b in range(2) for h in range(2)]).view(2, 2, 5, 7)
    torch.testing.assert_close(lse, scores.exp().sum(-1).log())
    assert not lse.requires_grad
    torch.testing.assert_close(grad, wanted_grad)


def test_lse_where_both_sides_are_long_comes_from_the_reference():
    q, k, v = (torch.randn(1, n, 1, 32, dtype=torch.float64, requires_grad=True) for n in (131, 149, 149))
    out, lse = cross_attention(q, k, v, return_lse=True)
    torch.testing.assert_close(out, cross_attention(q, k, v))
    torch.testing.assert_close(lse[0, 0], (q[0, :, 0] @ k[0, :, 0].T * 32**-0.5).logsumexp(-1))
    assert torch.autograd.grad(out.sum(), v)[0].isfinite().all()
