"""Cases of cross-attention, their tensors between guard bands, and the check of the kernels."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import mvlm_kernels
from mvlm_kernels import dispatch
from mvlm_kernels.cross_attention.arguments import Sides, longest_sequences
from mvlm_kernels.cross_attention.reference import cross_attention_reference
from support.kernels.accuracy import assert_accurate
from triton_proof.allocations import guarded


@dataclass(frozen=True, kw_only=True)
class Case:
    """Description of a call. len_q and len_k are the longest sequences; packed sides draw lengths up to them."""

    len_q: int
    len_k: int
    batch: int = 2
    heads: int = 1
    key_heads: int = 0  # heads of k and v; 0: as many as q has
    width: int = 32
    dtype: torch.dtype = torch.float32
    lengths: bool = False  # key_lengths, with a row of length 0
    mask: bool = False  # key_mask, with an empty and a full row
    readers: int = 0  # key_index over `batch` K/V rows, this many query rows; 0: none
    packed_q: bool = False
    packed_k: bool = False
    layout: str = "contiguous"  # | "strided" (slices of wider buffers, heads outermost) | "expanded" (one row for all)
    ids: torch.dtype = torch.int32
    bounded: bool = True  # give max_len_q and max_len_k
    seed: int = 0


@dataclass
class Call:
    q: Tensor
    k: Tensor
    v: Tensor
    grad: Tensor
    kwargs: dict[str, Any]
    bounds: dict[str, Any]  # known to the op alone; the reference reads lengths itself


SIDES = {
    "lengths": Case(len_q=67, len_k=37, lengths=True),
    "mask": Case(len_q=67, len_k=65, batch=3, mask=True),
    "both": Case(len_q=67, len_k=127, batch=3, mask=True, lengths=True),
    "index": Case(len_q=67, len_k=17, batch=3, readers=5, lengths=True),
    "packed-k": Case(len_q=67, len_k=19, batch=3, packed_k=True),
    "packed-q": Case(len_q=139, len_k=19, batch=3, packed_q=True),
    "packed-both": Case(len_q=23, len_k=23, batch=3, packed_q=True, packed_k=True),
    "packed-index": Case(len_q=67, len_k=19, batch=3, packed_k=True, packed_q=True, readers=4),
    "long-lengths": Case(len_q=17, len_k=197, lengths=True),
    "long-mask": Case(len_q=17, len_k=197, batch=3, mask=True),
    "long-index": Case(len_q=17, len_k=131, readers=5, lengths=True),
    "long-packed-q": Case(len_q=17, len_k=131, batch=3, packed_q=True, lengths=True),
    "long-packed-k": Case(len_q=17, len_k=149, batch=3, packed_k=True),
    "long-packed-index": Case(len_q=17, len_k=149, batch=3, packed_k=True, readers=4),
}


def build(case: Case) -> Call:
    """Tensors of a case. Keys that do not exist and packed rows past the last sequence hold NaN.

    Rows have no key or at least two: over a single key P is 1 and dS is 0 whatever the inputs, torch makes no error
    at all, and that of a kernel has nothing to be compared with (single keys have a test with other bounds).
    """
    draw = torch.Generator().manual_seed(case.seed)
    q_seqs = case.readers or case.batch
    kwargs: dict[str, Any] = {}
    bounds: dict[str, Any] = {}

    def cu_seqlens(seqs: int, longest: int) -> Tensor:
        lengths = torch.randint(min(2, longest), longest + 1, (seqs,), generator=draw)
        lengths[0] = longest
        if seqs > 1:
            lengths[1] = 0
        return torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)]).to(case.ids)

    def values(seqs: int, length: int, cu: Tensor | None, heads: int = case.heads) -> Tensor:
        leading = (seqs, length) if cu is None else (int(cu[-1]) + 5,)  # 5 rows of a rounded-up bucket
        shape = (*leading, heads, case.width)
        if case.layout == "strided":  # one of two interleaved projections, heads outermost
            wide = torch.randn((heads, *leading, 2, case.width), generator=draw, dtype=torch.float64)
            x = wide.to(case.dtype)[..., 0, :].movedim(0, -2)
        elif case.layout == "expanded" and cu is None:
            x = torch.randn((1, *shape[1:]), generator=draw, dtype=torch.float64).to(case.dtype).expand(shape)
        else:
            x = torch.randn(shape, generator=draw, dtype=torch.float64).to(case.dtype)
        if cu is not None:
            x[int(cu[-1]) :] = torch.nan
        return x

    cu_q = cu_k = None
    if case.packed_q:
        cu_q = kwargs["cu_seqlens_q"] = cu_seqlens(q_seqs, case.len_q)
        if case.bounded:
            bounds["max_len_q"] = case.len_q
    if case.packed_k:
        cu_k = kwargs["cu_seqlens_k"] = cu_seqlens(case.batch, case.len_k)
        if case.bounded:
            bounds["max_len_k"] = case.len_k
    q = values(q_seqs, case.len_q, cu_q)
    k, v = (values(case.batch, case.len_k, cu_k, case.key_heads or case.heads) for _ in range(2))
    exists = torch.ones(case.batch, case.len_k, dtype=torch.bool)
    if case.lengths:
        lengths = torch.randint(min(2, case.len_k), case.len_k + 1, (case.batch,), generator=draw)
        lengths[-1] = 0
        kwargs["key_lengths"] = lengths.to(case.ids)
        exists &= torch.arange(case.len_k) < lengths[:, None]
    if case.mask:
        mask = torch.rand(case.batch, case.len_k, generator=draw) < 0.6
        mask[:, :2] = True
        mask[0] = True
        mask[-1] = False
        kwargs["key_mask"] = mask
        exists &= mask
    if case.readers:
        kwargs["key_index"] = torch.randint(0, case.batch, (case.readers,), generator=draw).to(case.ids)
    if not exists.all() and case.layout != "expanded":
        k[~exists] = torch.nan
        v[~exists] = torch.nan
    grad = values(q_seqs, case.len_q, cu_q)
    q, k, v, grad = (guarded(x) for x in (q, k, v, grad))
    return Call(q, k, v, grad, {name: guarded(x) for name, x in kwargs.items()}, bounds)


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


def moved(call: Call, device: str) -> Call:
    """The call with its tensors on another device, with their strides and guard bands."""
    q, k, v, grad = (guarded(x, device) for x in (call.q, call.k, call.v, call.grad))
    return Call(q, k, v, grad, {name: guarded(x, device) for name, x in call.kwargs.items()}, call.bounds)


def check_attention(case: Case, device: str = "cpu") -> None:
    """Compare the kernels with the float64 reference. On the CPU they are interpreted."""
    call = build(case)
    oracle = run(cross_attention_reference, call, torch.float64)
    same = run(cross_attention_reference, call)
    with mvlm_kernels.use_backend("triton"):
        got = [x.cpu() for x in run(mvlm_kernels.cross_attention, moved(call, device), **call.bounds)]
    # dQ and dK are sums of differences dP - delta of size sqrt(width): those, not the sum, set the size of an ulp.
    for i, (name, terms) in enumerate((("out", 1), ("dq", 8), ("dk", 8), ("dv", 1))):
        assert_accurate(f"{name} of {case}", got[i], same[i], oracle[i], terms=terms)


def check_rows_in_front(case: Case, front: int = 3) -> None:
    """Assert that packed rows in front of the first sequence give zeros and leave all other rows as they are."""
    call = build(case)
    with pytest.MonkeyPatch.context() as patch, mvlm_kernels.use_backend("triton"):
        patch.setattr(dispatch, "checks_values", lambda device: False)  # as on a GPU, where cu_seqlens is not read
        wanted = run(mvlm_kernels.cross_attention, call, **call.bounds)
        for side, tensors in (("q", ("q", "grad")), ("k", ("k", "v"))):
            if f"cu_seqlens_{side}" in call.kwargs:
                call.kwargs[f"cu_seqlens_{side}"] = call.kwargs[f"cu_seqlens_{side}"] + front
                for x in tensors:
                    rows = torch.full((front, *getattr(call, x).shape[1:]), torch.nan, dtype=case.dtype)
                    setattr(call, x, torch.cat([rows, getattr(call, x)]))
        got = run(mvlm_kernels.cross_attention, call, **call.bounds)
    for a, b, side in zip(got, wanted, "qqkk", strict=True):
        if f"cu_seqlens_{side}" in call.kwargs:
            assert (a[:front] == 0).all()
            a = a[front:]
        assert torch.equal(a, b)
