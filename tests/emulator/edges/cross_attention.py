"""Edges of cross-attention: sides without rows, lengths and indices out of range, sequences far apart."""

import itertools
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from emulator.edges import Calls
from emulator.library import multiprocessors
from mvlm_kernels import cross_attention
from mvlm_kernels.cross_attention.cases import SIDES, TYPES, Shape
from support.kernels.attention import build, check_rows_in_front, run
from triton_proof.driver import changed, recorded, unwritten

BF16 = torch.bfloat16
FAST = {"no-keys-lengths/197x32/0"}


def single_key(dtype: torch.dtype, len_q: int, len_k: int) -> None:
    """Over one key P is 1 and dS is 0, whatever the inputs."""
    call = build(Shape(len_q=len_q, len_k=len_k, dtype=dtype, width=64, heads=2))
    out, dq, dk, dv = run(cross_attention, call)
    if len_k == 1:
        exact = 2e-3 if dtype == torch.float32 else 0  # V goes through the product in TF32
        torch.testing.assert_close(out, call.v.expand_as(out), rtol=exact, atol=exact)
        torch.testing.assert_close(dv.double(), call.grad.double().sum(1, keepdim=True), rtol=2e-2, atol=2e-2)
        for zero in (dq, dk):
            torch.testing.assert_close(zero, torch.zeros_like(zero), rtol=0, atol=5e-2)
    for x in (out, dq, dk, dv):
        assert x.isfinite().all()
        assert not unwritten(x)


def no_keys(len_q: int, len_k: int, processors: int, how: str) -> None:
    """Where no key exists, output and gradients are zeros, whatever the keys hold."""
    q = torch.randn(3, len_q, 2, 64).to(BF16).requires_grad_()
    k, v = (torch.full((3, len_k, 2, 64), torch.nan, dtype=BF16, requires_grad=True) for _ in range(2))
    sides: dict[str, dict[str, Any]] = {
        "lengths": {"key_lengths": torch.zeros(3, dtype=torch.int32)},
        "mask": {"key_mask": torch.zeros(3, len_k, dtype=torch.bool)},
    }
    with multiprocessors(processors):
        out = cross_attention(q, k, v, **sides[how])
        out.backward(torch.randn_like(out))
    for x in (out, q.grad, k.grad, v.grad):
        assert x is not None
        assert (x == 0).all()


def no_rows(len_q: int, len_k: int, packed_q: bool, packed_k: bool) -> None:
    """Dense sides of length 0 and packed sides without a row: what exists of the output is zeros."""

    def side(length: int, packed: bool) -> tuple[Tensor, Tensor | None]:
        x = torch.randn((3 * length, 2, 64) if packed else (3, length, 2, 64)).to(BF16)
        return x.requires_grad_(), (torch.arange(4) * length).int() if packed else None

    (q, cu_q), (k, cu_k) = side(len_q, packed_q), side(len_k, packed_k)
    bounds: dict[str, Any] = {"max_len_q": len_q if packed_q else None, "max_len_k": len_k if packed_k else None}
    with multiprocessors(40 if packed_q else 0):
        out = cross_attention(q, k, k, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, **bounds)
        out.backward(torch.ones_like(out))
    for x in (out, q.grad, k.grad):
        assert x is not None
        assert (x == 0).all()


def rows_in_front(label: str, processors: int) -> None:
    with multiprocessors(processors):
        check_rows_in_front(replace(SIDES[label], dtype=BF16))


def bad_index(label: str) -> None:
    """Queries with an index out of range are NaN. The others are as without them."""
    for ids in (torch.int32, torch.int64):
        for low, high in ((-7, 1000), (torch.iinfo(ids).min, torch.iinfo(ids).max)):
            shape = replace(SIDES[label], lengths=False, dtype=BF16, ids=ids)
            call = build(shape)
            index = call.kwargs["key_index"]
            index[0], index[1], index[2:] = low, high, shape.batch - 1
            out, dq, _, _ = run(cross_attention, call)
            assert out[:2].isnan().all()
            assert dq[:2].isnan().all()
            assert out[2:].isfinite().all()


def bad_lengths(len_q: int, len_k: int) -> None:
    """Lengths below 0 count as 0, and lengths past the row as the whole row."""
    q, k = (torch.randn(4, n, 2, 64, dtype=BF16, requires_grad=True) for n in (len_q, len_k))
    lengths = torch.tensor([-3, len_k + 5, 2**31 - 1, -(2**31)], dtype=torch.int32)
    out = cross_attention(q, k, k, key_lengths=lengths)
    out.backward(torch.ones_like(out))
    assert (out[[0, 3]] == 0).all()
    assert torch.equal(out[1:3], cross_attention(q, k, k)[1:3])


def longer_than_promised(label: str, processors: int) -> None:
    """A packed sequence longer than its bound is NaN, and nothing is read out of bounds."""
    call = build(replace(SIDES[label], dtype=BF16))
    with multiprocessors(processors):
        out, dq, dk, dv = run(cross_attention, call, None, **dict.fromkeys(call.bounds, 16))
    cu = call.kwargs.get("cu_seqlens_q")
    first = 0 if cu is None else slice(0, int(cu[1]))
    assert out[first].isnan().all()
    assert dq[first].isnan().all()
    for x in (out, dq, dk, dv):
        assert not unwritten(x)


def wrong_offsets(cu: list[int], processors: int) -> None:
    """Offsets of packed sequences that start below 0, pass the buffer, or fall: nothing is touched out of bounds.

    Where they fall, sequences overlap and their programs race. That input is refused where values are checked.
    """
    bounds = torch.tensor(cu, dtype=torch.int32)
    q, k = (torch.randn(20, 2, 64, dtype=BF16, requires_grad=True) for _ in range(2))
    dense = torch.randn(3, 150, 2, 64, dtype=BF16, requires_grad=True)
    with recorded(on_fault="collect") as launches, multiprocessors(processors):
        for x, y, sides in (
            (q, k, {"cu_seqlens_q": bounds, "cu_seqlens_k": bounds, "max_len_q": 32, "max_len_k": 32}),
            (q, dense, {"cu_seqlens_q": bounds, "max_len_q": 32}),
            (dense, k, {"cu_seqlens_k": bounds, "max_len_k": 32}),
        ):
            out = cross_attention(x, y, y, **sides)
            out.sum().backward()
            assert not unwritten(out)
    allowed = {"global-race"} if cu != sorted(cu) else set()
    faults = [f for x in launches for f in x.findings if f.kind not in allowed]
    assert not faults, "\n".join(map(str, faults))


def far_apart(len_q: int, len_k: int) -> None:
    """Sequences that lie more than 2^31 elements apart give the bits of contiguous copies."""
    far = 2**31 + 64
    # Pages of these buffers that nobody touches cost address space and no memory. Race checks would double them.
    with changed(checks=False):
        tensors = [
            torch.empty(far + 2**20, dtype=BF16).as_strided((2, n, 2, 64), (far, 128, 64, 1), 16)
            for n in (len_q, len_k, len_k, len_q)
        ]
        for x in tensors:
            x.copy_(torch.randn(x.shape))
        results = []
        for *inputs, grad in (tensors, [x.clone(memory_format=torch.contiguous_format) for x in tensors]):
            leaves = [x.detach().requires_grad_() for x in inputs]
            out = cross_attention(*leaves)
            results.append((out.detach(), *torch.autograd.grad(out, leaves, grad)))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
        assert a.isfinite().all()


def empty_batch() -> None:
    q, k = (torch.randn(0, n, 2, 64, dtype=BF16, requires_grad=True) for n in (197, 32))
    cross_attention(q, k, k).sum().backward()


def calls() -> Calls:
    for name, dtype in TYPES.items():
        for len_q, len_k in ((1, 1), (197, 1), (1, 197), (1, 2)):
            yield f"{len_q}x{len_k}/{name}", partial(single_key, dtype, len_q, len_k)
    for how, (len_q, len_k), processors in itertools.product(("lengths", "mask"), ((197, 32), (32, 197)), (0, 40)):
        yield f"no-keys-{how}/{len_q}x{len_k}/{processors}", partial(no_keys, len_q, len_k, processors, how)
    for label in ("packed-both", "packed-k", "long-packed-q", "long-packed-k", "long-packed-index"):
        for processors in (0, 40):
            yield f"rows-in-front/{label}/{processors}", partial(rows_in_front, label, processors)
    for len_q, len_k in ((0, 20), (40, 0), (0, 197), (197, 0), (0, 0)):
        for packed_q, packed_k in itertools.product((False, True), repeat=2):
            label = f"no-rows/{len_q}x{len_k}{'/packed-q' if packed_q else ''}{'/packed-k' if packed_k else ''}"
            yield label, partial(no_rows, len_q, len_k, packed_q, packed_k)
    for label in ("index", "long-index"):
        yield f"bad-index/{label}", partial(bad_index, label)
    for label, (len_q, len_k) in {"short-keys": (150, 20), "short-queries": (20, 150)}.items():
        yield f"bad-lengths/{label}", partial(bad_lengths, len_q, len_k)
        yield f"far-apart/{label}", partial(far_apart, len_q, len_k)
    for label, processors in itertools.product(("packed-k", "long-packed-q", "packed-both"), (0, 40)):
        yield f"longer-than-promised/{label}/{processors}", partial(longer_than_promised, label, processors)
    rising, falling = (
        ([-5, 3, 8, 300], [3, 3, 3, 3], [-9, -9, -9, -9], [30, 40, 50, 60]),
        ([0, 9, 4, 20], [2**31 - 1, 0, 5, 7]),
    )
    for cu, processors in itertools.product((*rising, *falling), (0, 40)):
        yield f"wrong-offsets/{cu}/{processors}", partial(wrong_offsets, cu, processors)
    yield "batch-0", empty_batch
