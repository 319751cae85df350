"""Values of the interpreted cross-attention kernels against the float64 reference, and the reference against SDPA."""

import math
import sys
from dataclasses import replace

import pytest
import torch
from attention_cases import Case, build, check, run
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import assert_accurate

import mvlm_kernels
from mvlm_kernels import cross_attention, dispatch
from mvlm_kernels.cross_attention.reference import cross_attention_reference, pack_key_mask, unpack_key_mask

TYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.fixture
def many_multiprocessors(monkeypatch: pytest.MonkeyPatch):
    """A machine so large that every grid is too small for it: all kernels split their work."""
    monkeypatch.setattr(dispatch, "multiprocessors", lambda device: 40)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("len_q, len_k", [(197, 32), (33, 577), (63, 64), (1, 2)])
def test_types(dtype: torch.dtype, len_q: int, len_k: int):
    check(Case(len_q=len_q, len_k=len_k, width=64, dtype=dtype, lengths=True))


@pytest.mark.parametrize("width", [32, 64, 80, 96, 128])
@pytest.mark.parametrize("len_q, len_k", [(65, 31), (31, 131)])
def test_head_widths(width: int, len_q: int, len_k: int):
    check(Case(len_q=len_q, len_k=len_k, width=width, heads=2))


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


@pytest.mark.parametrize("case", SIDES.values(), ids=SIDES.keys())
def test_lengths_masks_indices_and_packing(case: Case):
    check(case)


@pytest.mark.parametrize("case", SIDES.values(), ids=SIDES.keys())
@pytest.mark.usefixtures("many_multiprocessors")
def test_fixed_splits(case: Case):
    check(replace(case, heads=2, seed=1))


@pytest.mark.parametrize("layout", ["strided", "expanded"])
@pytest.mark.parametrize("case", [SIDES["lengths"], SIDES["packed-k"], SIDES["long-index"]], ids=["kv", "packed", "q"])
def test_memory_layouts(case: Case, layout: str):
    check(replace(case, layout=layout, heads=2))


@pytest.mark.parametrize("name", ["packed-k", "packed-both", "packed-q", "long-packed-q", "long-packed-k"])
def test_packed_rows_of_unknown_length(name: str):
    check(replace(SIDES[name], bounded=False, ids=torch.int64))


LENGTHS = st.sampled_from([2, 3, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128])


@given(
    short=LENGTHS,
    long=st.sampled_from([2, 5, 15, 64, 65, 97, 129, 197]),
    short_keys=st.booleans(),
    width=st.sampled_from([32, 64, 80]),
    dtype=st.sampled_from(TYPES),
    batch=st.integers(1, 3),
    readers=st.integers(0, 4),
    lengths=st.booleans(),
    mask=st.booleans(),
    packed=st.sampled_from(["", "q", "k"]),
    layout=st.sampled_from(["contiguous", "strided", "expanded"]),
    splits=st.booleans(),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=30, deadline=None, derandomize=True)
def test_any_case(
    short: int, long: int, short_keys: bool, width: int, dtype: torch.dtype, batch: int, readers: int, lengths: bool,
    mask: bool, packed: str, layout: str, splits: bool, seed: int,
):  # fmt: skip
    packed_k = packed == "k"
    case = Case(
        len_q=long if short_keys else short, len_k=short if short_keys else long, batch=batch, readers=readers,
        width=width, dtype=dtype, packed_q=packed == "q", packed_k=packed_k, lengths=lengths and not packed_k,
        mask=mask and not packed_k, layout=layout, seed=seed,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "multiprocessors", lambda device: 12 if splits else 1)
        check(case)


@pytest.mark.parametrize("name", ["lengths", "index", "packed-both", "long-lengths", "long-index"])
def test_gradcheck_through_the_kernels(name: str):
    len_q, len_k = (18, 3) if SIDES[name].len_k <= 128 else (5, 131)
    case = replace(SIDES[name], dtype=torch.float64, len_q=len_q, len_k=len_k, batch=2)
    call = build(case)
    tensors = [x.detach().nan_to_num().requires_grad_() for x in (call.q, call.k, call.v)]
    with mvlm_kernels.use_backend("triton"):
        assert torch.autograd.gradcheck(
            lambda q, k, v: cross_attention(q, k, v, **call.kwargs, **call.bounds), tensors, fast_mode=True
        )


@pytest.mark.parametrize("composed", [True, False], ids=["composition", "op"])
@pytest.mark.parametrize("case", SIDES.values(), ids=SIDES.keys())
def test_values_and_gradients_of_the_cpu_paths(case: Case, composed: bool, monkeypatch: pytest.MonkeyPatch):
    call = build(replace(case, dtype=torch.float64))
    wanted = run(cross_attention_reference, call)  # by autograd
    if not composed:  # the reference with its written-out backward, as a compiled graph calls it
        package = sys.modules[cross_attention.__module__]  # the function has its name
        monkeypatch.setattr(package, "_composes", lambda *_: False)
    for a, b in zip(run(cross_attention, call, **call.bounds), wanted, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["both", "packed-index", "long-index", "long-packed-q"])
def test_the_cpu_path_is_as_accurate_as_the_reference(name: str, dtype: torch.dtype):
    call = build(replace(SIDES[name], dtype=dtype, heads=3, layout="strided"))
    oracle, same = run(cross_attention_reference, call, torch.float64), run(cross_attention_reference, call)
    for i, got in enumerate(run(cross_attention, call, **call.bounds)):
        assert_accurate(f"{name}[{i}]", got, same[i], oracle[i], terms=8 if i in (1, 2) else 1)


@pytest.mark.parametrize("name", ["lengths", "index", "long-lengths", "long-index"])
@pytest.mark.usefixtures("many_multiprocessors")
def test_bitwise_repeatable(name: str):
    call = build(SIDES[name])
    with mvlm_kernels.use_backend("triton"):
        first, second = (run(cross_attention, call, **call.bounds) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["lengths", "index", "packed-both", "long-lengths", "long-index"])
@pytest.mark.parametrize("needs", [(0, 0, 1), (0, 1, 0), (0, 1, 1), (1, 0, 0), (1, 0, 1), (1, 1, 0)])
def test_requires_grad_matrix(name: str, needs: tuple[int, int, int]):
    call = build(SIDES[name])
    for backend in ("torch", "triton"):
        with mvlm_kernels.use_backend(backend):
            wanted = run(cross_attention, call, **call.bounds)[1:]
            tensors = [
                x.detach().requires_grad_(bool(need)) for x, need in zip((call.q, call.k, call.v), needs, strict=True)
            ]
            cross_attention(*tensors, **call.kwargs, **call.bounds).backward(call.grad)
        for x, need, grad in zip(tensors, needs, wanted, strict=True):
            assert (x.grad is not None) == bool(need)
            if x.grad is not None:
                assert torch.equal(x.grad, grad)


@pytest.mark.parametrize("len_q, len_k", [(1, 1), (197, 1)])
def test_a_single_key(len_q: int, len_k: int):
    call = build(Case(len_q=len_q, len_k=len_k))
    with mvlm_kernels.use_backend("triton"):
        out, dq, dk, dv = run(cross_attention, call)
    torch.testing.assert_close(out, call.v.expand_as(out))
    torch.testing.assert_close(dv, call.grad.sum(1, keepdim=True))
    for zero in (dq, dk):
        torch.testing.assert_close(zero, torch.zeros_like(zero), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["lengths", "mask", "packed-both", "long-lengths"])
def test_rows_without_keys_are_zeros(name: str):
    case = SIDES[name]
    call = build(case)
    with mvlm_kernels.use_backend("triton"):
        out, dq, _, _ = run(cross_attention, call, **call.bounds)
    if case.packed_k:  # row 1 is empty on both sides, and the bucket's last rows belong to nobody
        out, dq = out[-5:], dq[-5:]
    else:
        out, dq = out[-1], dq[-1]
    assert not out.any()
    assert not dq.any()


def test_a_packed_row_longer_than_promised_is_nan_on_a_gpu(monkeypatch: pytest.MonkeyPatch):
    # Where values cannot be read without a sync, a wrong bound must not become a wrong number.
    monkeypatch.setitem(_op_globals(), "check_values", lambda *args: None)
    for case in (SIDES["packed-k"], SIDES["long-packed-q"]):
        call = build(case)
        with mvlm_kernels.use_backend("triton"):
            out, dq, dk, dv = run(cross_attention, call, None, **dict.fromkeys(call.bounds, 16))
        cu = call.kwargs.get("cu_seqlens_q")
        first = slice(0, int(cu[1])) if cu is not None else 0
        assert out[first].isnan().all()
        assert dq[first].isnan().all()
        assert dk[0].isnan().any()
        assert dv[0].isnan().any()


def test_an_index_out_of_range_is_nan_on_a_gpu(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(_op_globals(), "check_values", lambda *args: None)
    for case in (SIDES["index"], SIDES["long-index"]):
        call = build(replace(case, lengths=False))
        index = call.kwargs["key_index"]
        index[0], index[1], index[2:] = -7, case.batch + 1000, 0
        with mvlm_kernels.use_backend("triton"):
            out, dq, _, _ = run(cross_attention, call)
        assert out[:2].isnan().all()
        assert dq[:2].isnan().all()
        assert out[2:].isfinite().all()


def _op_globals() -> dict:
    return cross_attention.__globals__  # of the module; its package attribute is the function


def test_reference_is_sdpa():
    q, k, v = (torch.randn(2, n, 3, 32, dtype=torch.float64) for n in (9, 7, 7))
    heads_first = [x.transpose(1, 2) for x in (q, k, v)]
    wanted = torch.nn.functional.scaled_dot_product_attention(heads_first[0], heads_first[1], heads_first[2]).transpose(
        1, 2
    )
    torch.testing.assert_close(cross_attention_reference(q, k, v), wanted)


@pytest.mark.parametrize("lengths, mask, index", [(False, False, False), (True, False, False), (True, True, True)])
def test_long_on_both_sides_is_sdpa_with_the_same_meaning(lengths: bool, mask: bool, index: bool):
    call = build(Case(len_q=131, len_k=149, lengths=lengths, mask=mask, readers=3 if index else 0, dtype=torch.float64))
    wanted = run(cross_attention_reference, call)
    for a, b in zip(run(cross_attention, call), wanted, strict=True):
        torch.testing.assert_close(a, b)
    reasons = mvlm_kernels.explain(cross_attention, call.q, call.k, call.v, **call.kwargs).reasons
    assert any("both sides are longer than 128 (131 queries, 149 keys): SDPA runs" in r for r in reasons)
    with mvlm_kernels.use_backend("triton"), pytest.raises(RuntimeError, match="both sides are longer"):
        cross_attention(call.q, call.k, call.v, **call.kwargs)


@pytest.mark.parametrize("length", [1, 63, 64, 65, 200])
def test_mask_words_round_trip(length: int):
    mask = torch.rand(3, length) < 0.5
    words = pack_key_mask(mask)
    assert words.shape == (3, (length + 63) // 64)
    assert torch.equal(unpack_key_mask(words, length), mask)
    q, k = torch.randn(3, 5, 1, 32), torch.randn(3, length, 1, 32)
    torch.testing.assert_close(cross_attention(q, k, k, key_mask=words), cross_attention(q, k, k, key_mask=mask))


@pytest.mark.parametrize("case", [SIDES["index"], SIDES["long-index"], SIDES["packed-q"], SIDES["both"]])
def test_vectors_of_any_stride(case: Case):
    """Lengths, indices and words as columns of a table, where the next value is not the next in memory."""
    call = build(case)
    with mvlm_kernels.use_backend("triton"):
        wanted = run(cross_attention, call, None, **call.bounds)
        if "key_mask" in call.kwargs:
            call.kwargs["key_mask"] = pack_key_mask(call.kwargs["key_mask"])
        for name, x in call.kwargs.items():
            call.kwargs[name] = torch.stack([x, torch.full_like(x, -9)], dim=-1)[..., 0]
            assert not call.kwargs[name].is_contiguous()
        got = run(cross_attention, call, None, **call.bounds)
    for a, b in zip(got, wanted, strict=True):
        assert torch.equal(a.isnan(), b.isnan())
        assert torch.equal(a.nan_to_num(), b.nan_to_num())


def test_a_second_derivative_of_the_kernels_is_refused():
    q, k, v = (torch.randn(1, n, 1, 32, requires_grad=True) for n in (5, 3, 3))
    with mvlm_kernels.use_backend("triton"):
        (grad,) = torch.autograd.grad(cross_attention(q, k, v).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.square().sum().backward()


def test_a_second_derivative_on_the_cpu_is_right():
    q, k, v = (torch.randn(1, n, 1, 32, dtype=torch.float64, requires_grad=True) for n in (5, 3, 3))
    lengths = torch.tensor([2])
    assert torch.autograd.gradgradcheck(lambda *x: cross_attention(*x, key_lengths=lengths), (q, k, v), fast_mode=True)


@pytest.mark.parametrize("name", ["packed-both", "packed-k", "long-packed-q", "long-packed-k", "long-packed-index"])
@pytest.mark.parametrize("multiprocessors", [0, 40])
def test_rows_in_front_of_the_first_sequence(name: str, multiprocessors: int, monkeypatch: pytest.MonkeyPatch):
    """On a GPU nobody looks at cu_seqlens[0]: rows in front of it belong to no sequence, so they are zeros."""
    monkeypatch.setattr(dispatch, "multiprocessors", lambda device: multiprocessors)
    monkeypatch.setattr(dispatch, "checks_values", lambda device: False)
    call, front = build(SIDES[name]), 3
    with mvlm_kernels.use_backend("triton"):
        wanted = run(cross_attention, call, **call.bounds)
        for side, tensors in (("q", ("q", "grad")), ("k", ("k", "v"))):
            if f"cu_seqlens_{side}" in call.kwargs:
                call.kwargs[f"cu_seqlens_{side}"] = call.kwargs[f"cu_seqlens_{side}"] + front
                for x in tensors:
                    rows = torch.full((front, *getattr(call, x).shape[1:]), torch.nan)
                    setattr(call, x, torch.cat([rows, getattr(call, x)]))
        got = run(cross_attention, call, **call.bounds)
    for a, b, side in zip(got, wanted, "qqkk", strict=True):
        if f"cu_seqlens_{side}" in call.kwargs:
            assert not a[:front].any()
            a = a[front:]
        assert torch.equal(a, b)


def test_the_scale_is_no_constant_of_the_kernels():
    launches = []
    with dispatch.recording(lambda kernel, grid, args, meta: launches.append((args, meta)), 90):
        for scale in (0.125, 0.5):
            q, k = torch.empty(2, 40, 1, 64, device="meta"), torch.empty(2, 16, 1, 64, device="meta")
            kernels = sys.modules["mvlm_kernels.cross_attention.triton"]
            kernels.forward(q, k, k, None, None, None, None, None, scale, 40, 16)
    (first, first_meta), (second, second_meta) = launches
    assert first_meta == second_meta
    assert [a for a in first if isinstance(a, float)] == [0.125, 0.125 * math.log2(math.e)]
    assert [a for a in second if isinstance(a, float)] == [0.5, 0.5 * math.log2(math.e)]
