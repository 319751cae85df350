"""Edge cases of cross-attention: no keys, wrong lengths and indices, odd strides, and paths without kernels."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import mvlm_kernels
from mvlm_kernels import cross_attention, dispatch
from mvlm_kernels.cross_attention.cases import SIDES, Shape
from mvlm_kernels.cross_attention.reference import cross_attention_reference, pack_key_mask, unpack_key_mask
from support.kernels.attention import build, check_rows_in_front, run


@pytest.mark.slow
def test_sequence_longer_than_its_bound_is_nan_on_a_gpu(monkeypatch: pytest.MonkeyPatch):
    # Values cannot be checked there without a sync, and a wrong bound must not become a wrong number.
    monkeypatch.setattr(dispatch, "checks_values", lambda device: False)
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


@pytest.mark.slow
def test_key_index_out_of_range_is_nan_on_a_gpu(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(dispatch, "checks_values", lambda device: False)
    for case in (SIDES["index"], SIDES["long-index"]):
        call = build(replace(case, lengths=False))
        index = call.kwargs["key_index"]
        index[0], index[1], index[2:] = -7, case.batch + 1000, 0
        with mvlm_kernels.use_backend("triton"):
            out, dq, _, _ = run(cross_attention, call)
        assert out[:2].isnan().all()
        assert dq[:2].isnan().all()
        assert out[2:].isfinite().all()


LONG = Shape(len_q=131, len_k=149, dtype=torch.float64)


@pytest.mark.parametrize("case", [
    LONG, replace(LONG, lengths=True), replace(LONG, lengths=True, mask=True, readers=3),
    replace(LONG, lengths=True, heads=4, key_heads=2, width=12), replace(LONG, packed_q=True, packed_k=True),
])  # fmt: skip
@pytest.mark.parametrize("backend", ["auto", "sdpa", "math"])
def test_attention_long_on_both_sides_has_the_same_meaning(case: Shape, backend: Any):
    call = build(case)
    wanted = run(cross_attention_reference, call)
    for a, b in zip(run(cross_attention, call, **call.bounds, backend=backend), wanted, strict=True):
        torch.testing.assert_close(a, b)
    if case != LONG:
        return
    reasons = mvlm_kernels.explain(cross_attention, call.q, call.k, call.v, **call.kwargs).reasons
    assert any("both sides are longer than 128 (131 queries, 149 keys)" in r for r in reasons)
    with mvlm_kernels.use_backend("triton"), pytest.raises(RuntimeError, match="both sides are longer"):
        cross_attention(call.q, call.k, call.v, **call.kwargs)


@pytest.mark.parametrize("length", [1, 63, 64, 65, 200])
def test_key_mask_words_round_trip(length: int):
    mask = torch.rand(3, length) < 0.5
    words = pack_key_mask(mask)
    assert words.shape == (3, (length + 63) // 64)
    assert torch.equal(unpack_key_mask(words, length), mask)
    q, k = torch.randn(3, 5, 1, 32), torch.randn(3, length, 1, 32)
    torch.testing.assert_close(cross_attention(q, k, k, key_mask=words), cross_attention(q, k, k, key_mask=mask))


@pytest.mark.slow
@pytest.mark.parametrize("case", [SIDES["index"], SIDES["long-index"], SIDES["packed-q"], SIDES["both"]])
def test_attention_reads_vectors_of_any_stride(case: Shape):
    """Lengths, indices and mask words as columns of a table, so that neighbours are not contiguous in memory."""
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


@pytest.mark.slow
@pytest.mark.parametrize("name", ["packed-both", "packed-k", "long-packed-q", "long-packed-k", "long-packed-index"])
@pytest.mark.parametrize("multiprocessors", [0, 40])
def test_rows_in_front_of_the_first_packed_sequence_are_zeros(
    name: str, multiprocessors: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(dispatch, "multiprocessors", lambda device: multiprocessors)
    check_rows_in_front(SIDES[name])


@pytest.mark.parametrize("lengths", [(13, 20), (130, 131)])
@pytest.mark.parametrize("lse", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_large_float16_scores_are_finite(lengths: tuple[int, int], lse: bool, autocast: bool):
    """Before they are scaled, these scores are larger than any float16."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        (torch.randn(2, length, 1, 128, generator=generator) + shift).half()
        for length, shift in zip((lengths[0], lengths[1], lengths[1]), (24, 24, 0), strict=True)
    )
    with mvlm_kernels.use_backend("torch"), torch.autocast("cpu", torch.float16, enabled=autocast):
        out = cross_attention(q, k, v, return_lse=True)[0] if lse else cross_attention(q, k, v)
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    wanted = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    # Scores are about 6,500, of which float32 has steps of 5e-4; probabilities are rounded to float16.
    torch.testing.assert_close(out.double(), wanted, rtol=2e-3, atol=1e-2)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"key_index": [0, -1]}, "key_index must be in 0..1, got -1..0"),
        ({"key_lengths": [-5, 900]}, "key_lengths must be in 0..131, got -5"),
    ],
)
def test_values_are_checked_where_sdpa_computes(changes: dict[str, list[int]], message: str):
    q, k = torch.randn(2, 130, 1, 16), torch.randn(2, 131, 1, 16)
    options: dict[str, Any] = {name: torch.tensor(values) for name, values in changes.items()}
    with pytest.raises(ValueError, match=message):
        cross_attention(q, k, k, **options)


def test_autocast_casts_mixed_dtypes_of_cross_attention():
    q, k = torch.randn(2, 9, 2, 32), torch.randn(2, 7, 2, 32)
    with pytest.raises(ValueError, match="q, k and v must have one dtype of float16"):
        cross_attention(q, k.bfloat16(), k)
    with torch.autocast("cpu", torch.bfloat16):
        out = cross_attention(q.requires_grad_(), k.bfloat16(), k)
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert q.grad is not None
    assert q.grad.dtype == torch.float32
