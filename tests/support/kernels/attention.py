"""Calls of cross-attention: their tensors between guard bands, and checks that look at rows of no sequence."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import mvlm_kernels
from mvlm_kernels import dispatch
from mvlm_kernels.cross_attention.arguments import Sides, longest_sequences
from mvlm_kernels.cross_attention.cases import Shape
from support.kernels.check import check
from triton_proof.allocations import guarded


@dataclass
class Call:
    q: Tensor
    k: Tensor
    v: Tensor
    grad: Tensor
    kwargs: dict[str, Any]
    bounds: dict[str, Any]  # known to the op alone; the reference reads lengths itself


def build(shape: Shape) -> Call:
    """Tensors of a call, and an incoming gradient."""
    inputs, case = shape.inputs("cpu"), shape.case("")
    q, k, v = (guarded(x.detach()) for x in inputs.leaves.values())
    draw = torch.Generator().manual_seed(shape.seed + 1)
    grad = guarded(case.incoming(torch.randn(q.shape, generator=draw, dtype=torch.float64).to(q.dtype)))
    bounds = {name: x for name, x in inputs.fixed.items() if name.startswith("max_len")}
    kwargs = {name: guarded(x) for name, x in inputs.fixed.items() if isinstance(x, Tensor)}
    return Call(q, k, v, grad, kwargs, bounds)


def run(
    function: Callable[..., Tensor], call: Call, dtype: torch.dtype | None = None, **extra: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """out, dq, dk, dv. With a dtype the inputs are converted first, else passed as they are."""
    q, k, v = (x.detach() if dtype is None else x.detach().to(dtype) for x in (call.q, call.k, call.v))
    for x in (q, k, v):
        x.requires_grad_()
    out = function(q, k, v, **call.kwargs, **extra)
    out.backward(call.grad if dtype is None else call.grad.to(dtype))
    assert q.grad is not None
    assert k.grad is not None
    assert v.grad is not None
    return out.detach(), q.grad, k.grad, v.grad


def op_arguments(q: Tensor, k: Tensor, kwargs: dict[str, Any], scale: float) -> tuple[Any, ...]:
    """Arguments of the registered op after q, k and v, from those of the public function."""
    sides = Sides(*map(kwargs.get, Sides._fields))
    if sides.key_mask is not None:
        sides = sides._replace(key_mask=mvlm_kernels.pack_key_mask(sides.key_mask))
    longest = longest_sequences(q, k, sides, *map(kwargs.get, ("max_len_q", "max_len_k")))
    return (*sides, scale, *longest, kwargs.get("dropout_p", 0.0), kwargs.get("seed"))


def check_kernels(shape: Shape, device: str = "cpu") -> None:
    """Compare the kernels with the oracle. On the CPU they are interpreted."""
    check(shape.case(str(shape)), device, compiled=device != "cpu", backends=("triton",))


def check_rows_in_front(shape: Shape, front: int = 3) -> None:
    """Assert that packed rows in front of the first sequence give zeros and leave all other rows as they are."""
    call = build(shape)
    with pytest.MonkeyPatch.context() as patch, mvlm_kernels.use_backend("triton"):
        patch.setattr(dispatch, "checks_values", lambda device: False)  # as on a GPU, where cu_seqlens is not read
        wanted = run(mvlm_kernels.cross_attention, call, **call.bounds)
        for side, tensors in (("q", ("q", "grad")), ("k", ("k", "v"))):
            if f"cu_seqlens_{side}" in call.kwargs:
                call.kwargs[f"cu_seqlens_{side}"] = call.kwargs[f"cu_seqlens_{side}"] + front
                for x in tensors:
                    rows = torch.full((front, *getattr(call, x).shape[1:]), torch.nan, dtype=shape.dtype)
                    setattr(call, x, torch.cat([rows, getattr(call, x)]))
        got = run(mvlm_kernels.cross_attention, call, **call.bounds)
    for a, b, side in zip(got, wanted, "qqkk", strict=True):
        if f"cu_seqlens_{side}" in call.kwargs:
            assert (a[:front] == 0).all()
            a = a[front:]
        assert torch.equal(a, b)
