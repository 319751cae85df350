"""Jagged nested tensors in and out of cross-attention."""

from typing import Any

import pytest
import torch
from torch import Tensor

import mvlm_kernels
from mvlm_kernels import cross_attention, explain
from support.kernels.attention import attention_by_loops


def nested(lengths: list[int], heads: int = 2) -> Tensor:
    draw = torch.Generator().manual_seed(sum(lengths))
    rows = [torch.randn(n, heads, 8, dtype=torch.float64, generator=draw) for n in lengths]
    return torch.nested.nested_tensor(rows, layout=torch.jagged, requires_grad=True)


def another(x: Any) -> Tensor:
    """A nested tensor with the same offsets."""
    values = torch.randn_like(x.values().detach())
    return torch.nested.nested_tensor_from_jagged(values, x.offsets()).requires_grad_()


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dense_side", ["", "q", "k"])
def test_nested_sides_equal_loops(dense_side: str, backend: Any):
    q = torch.randn(3, 9, 2, 8).double().requires_grad_() if dense_side == "q" else nested([9, 1, 4])
    k = torch.randn(3, 6, 1, 8).double().requires_grad_() if dense_side == "k" else nested([6, 3, 2], heads=1)
    v = torch.randn_like(k).detach().requires_grad_() if dense_side == "k" else another(k)
    with mvlm_kernels.use_backend(backend):
        out = cross_attention(q, k, v)
        assert out.is_nested == q.is_nested
        assert (out + q).shape == q.shape  # of one ragged length
        out_rows = out.values() if out.is_nested else out
        grads = torch.autograd.grad(out_rows.square().sum(), (q, k, v))
    rows = [(x.values() if x.is_nested else x).detach().requires_grad_() for x in (q, k, v)]
    sides: tuple[Any, ...] = (("q", q), ("k", k))
    bounds = {f"cu_seqlens_{name}": x.offsets() for name, x in sides if x.is_nested}
    wanted = attention_by_loops(*rows, **bounds)
    torch.testing.assert_close(out_rows, wanted)
    for grad, x in zip(grads, torch.autograd.grad(wanted.square().sum(), rows), strict=True):
        torch.testing.assert_close(grad.values() if grad.is_nested else grad, x)


def test_nested_rows_are_not_copied(monkeypatch: pytest.MonkeyPatch):
    q, k = nested([5, 2]).detach(), nested([3, 4]).detach()
    read = []
    forward = mvlm_kernels.cross_attention.__globals__["cpu"].attend
    monkeypatch.setattr(
        mvlm_kernels.cross_attention.__globals__["cpu"],
        "attend",
        lambda *args: (read.extend(args[:3]), forward(*args))[1],
    )
    _, lse = cross_attention(q, k, k, return_lse=True)
    assert lse.shape == (2, 7)
    cross_attention(q, k, k)
    assert [x.data_ptr() for x in read] == [x.values().data_ptr() for x in (q, k, k)]


def test_explain_takes_nested_tensors():
    """torch keeps the longest length of a tensor that it made from a list: these are too long on both sides."""
    q = nested([131, 2])
    assert any("both sides are longer" in reason for reason in explain(cross_attention, q, q, q).reasons)


def strided(x: Tensor) -> Tensor:
    return torch.nested.nested_tensor(list(x.detach().unbind()))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize(
    "change, message",
    [
        (lambda q, k: (strided(q), k, k), "q must be a contiguous jagged nested tensor .* got layout torch.strided"),
        (lambda q, k: (q.transpose(1, 2), k, k), "q must be a contiguous jagged"),
        (lambda q, k: (q, k, nested([3, 4])), "k and v must be nested with the same offsets"),
        (lambda q, k: (q, k, k.values()), "k and v must be nested with the same offsets"),
    ],
)
def test_other_nested_tensors_are_refused(change: Any, message: str):
    with pytest.raises(ValueError, match=message):
        cross_attention(*change(nested([5, 2]), nested([3, 4])))
    with pytest.raises(ValueError, match="cu_seqlens must be None where q is nested"):
        cross_attention(nested([5]), nested([3]), nested([3]), cu_seqlens_q=torch.tensor([0, 5]))
