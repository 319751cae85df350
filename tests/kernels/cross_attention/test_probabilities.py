"""Attention probabilities and the log-sum-exp of cross-attention, against softmax and loops in float64."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import mvlm_kernels
from mvlm_kernels import attention_probabilities, cross_attention
from support.kernels.attention import SIDES, Call, Case, build


def bounds_of(case: Case) -> dict[str, Any]:
    return {f"max_len_{side}": getattr(case, f"len_{side}") for side in "qk" if getattr(case, f"packed_{side}")}


def probabilities_by_loops(case: Case, call: Call) -> Tensor:
    """(B, H, Lq, Lk) in float64, one query sequence at a time, by torch.softmax."""
    kwargs = call.kwargs
    cu_q, cu_k = kwargs.get("cu_seqlens_q"), kwargs.get("cu_seqlens_k")
    seqs = case.readers or case.batch
    wanted = torch.zeros(seqs, case.heads, case.len_q, case.len_k, dtype=torch.float64)
    for b in range(seqs):
        r = int(kwargs["key_index"][b]) if "key_index" in kwargs else b
        q = call.q[b] if cu_q is None else call.q[int(cu_q[b]) : int(cu_q[b + 1])]
        k = call.k[r] if cu_k is None else call.k[int(cu_k[r]) : int(cu_k[r + 1])]
        exists = torch.ones(len(k), dtype=torch.bool)
        if "key_lengths" in kwargs:
            exists[int(kwargs["key_lengths"][r]) :] = False
        if "key_mask" in kwargs:
            exists &= kwargs["key_mask"][r]
        keys = exists.nonzero()[:, 0]
        for h in range(case.heads if len(keys) else 0):
            scores = q[:, h].double() @ k[keys, h].double().T * case.width**-0.5
            wanted[b, h, : len(q), keys] = scores.softmax(-1)
    return wanted


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("name", SIDES)
def test_probabilities_equal_softmax(name: str, backend: Any):
    case = replace(SIDES[name], heads=2)
    call = build(case)
    wanted = probabilities_by_loops(case, call)
    with mvlm_kernels.use_backend(backend):
        alone = attention_probabilities(call.q, call.k, **call.kwargs, **bounds_of(case))
        lse = cross_attention(call.q, call.k, call.v, return_lse=True, **call.kwargs, **call.bounds)[1]
        with_lse = attention_probabilities(call.q, call.k, lse, **call.kwargs, **bounds_of(case))
    assert alone.dtype == torch.float32
    torch.testing.assert_close(alone.double(), wanted, rtol=0, atol=1e-6)
    torch.testing.assert_close(with_lse.double(), wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_probabilities_of_16_bits_equal_softmax_in_float64(dtype: torch.dtype, backend: Any):
    """Scores are not rounded to 16 bits: in bf16 that alone would err by several thousandths. Of grouped heads."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, n, heads, 64, generator=generator).to(dtype) for n, heads in ((19, 4), (7, 2)))
    keys = k.double().repeat_interleave(2, 2)
    wanted = (torch.einsum("bqhd,bkhd->bhqk", q.double(), keys) / 8).softmax(-1)
    with mvlm_kernels.use_backend(backend):
        found = attention_probabilities(q, k)
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=1e-6)


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


def test_autocast_casts_as_in_cross_attention():
    """Scores of float32 would not be those of the kernels' log-sum-exp, and rows would not add up to 1."""
    generator = torch.Generator().manual_seed(0)
    q, k = (3 * torch.randn(2, n, 2, 32, generator=generator) for n in (5, 7))
    with mvlm_kernels.use_backend("triton"), torch.autocast("cpu", torch.bfloat16):
        lse = cross_attention(q, k, k, return_lse=True)[1]
        found = attention_probabilities(q, k.bfloat16(), lse)
    torch.testing.assert_close(found.sum(-1), torch.ones(2, 2, 5))
    torch.testing.assert_close(found, attention_probabilities(q.bfloat16(), k.bfloat16(), lse))


BAD = {
    "bound": ({"cu_seqlens_q": torch.tensor([0, 9])}, "max_len_q must be given where q is packed"),
    "lse-shape": ({"lse": torch.zeros(1, 9)}, r"lse must be torch.float32 of shape \(1, 2, 9\)"),
    "lse-type": ({"lse": torch.zeros(1, 2, 9).double()}, "lse must be torch.float32 .* got torch.float64"),
    "index": ({"key_index": torch.tensor([3])}, r"key_index must be in 0\.\.0, got 3\.\.3"),
}  # fmt: skip


@pytest.mark.parametrize("changes, message", BAD.values(), ids=BAD.keys())
def test_bad_input_of_attention_probabilities_says_what_was_wanted(changes: dict[str, Any], message: str):
    q = torch.randn(9, 2, 32) if "cu_seqlens_q" in changes else torch.randn(1, 9, 2, 32)
    with pytest.raises(ValueError, match=message):
        attention_probabilities(q, torch.randn(1, 7, 2, 32), **changes)
