"""Cross-attention as an op: registration, compilation, autocast, errors, and the text of explain."""

from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import mvlm_kernels
from mvlm_kernels import cross_attention, dispatch, explain
from mvlm_kernels.aot_cases import CASES
from support.kernels.attention import SIDES, Case, build, op_arguments, run


def arguments(case: Case, requires_grad: bool = True) -> tuple[Any, ...]:
    call = build(case)
    tensors = [x.detach().clone().nan_to_num().requires_grad_(requires_grad) for x in (call.q, call.k, call.v)]
    return (*tensors, *op_arguments(call.q, call.k, call.kwargs | call.bounds, 0.125))


@pytest.mark.slow
@pytest.mark.plain_empty
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("name", ["lengths", "mask", "packed-both", "long-index"])
def test_cross_attention_passes_opcheck(name: str, backend: Any):
    forward = torch.ops.mvlm_kernels.cross_attention.default
    backward = torch.ops.mvlm_kernels.cross_attention_backward.default
    with mvlm_kernels.use_backend(backend):
        torch.library.opcheck(forward, arguments(SIDES[name]))
        q, k, v, *rest = arguments(SIDES[name], requires_grad=False)
        out, lse = forward(q, k, v, *rest)
        for needs in ((True, True), (True, False), (False, True)):
            torch.library.opcheck(backward, (torch.randn_like(out), q, k, v, out, lse, *rest, *needs))


@pytest.mark.slow
@pytest.mark.plain_empty
def test_cross_attention_compiles_into_one_graph_for_all_lengths():
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(cross_attention, fullgraph=True, dynamic=True, backend=counter)
    for len_k in (30, 31, 17):
        call = build(Case(len_q=40, len_k=len_k, lengths=True, mask=True, readers=3))
        call.kwargs["key_index"] = call.kwargs["key_index"].long()
        for a, b in zip(run(compiled, call), run(cross_attention, call), strict=True):
            torch.testing.assert_close(a, b)
    assert counter.frame_count == 1
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.plain_empty
@pytest.mark.parametrize("name", ["packed-both", "long-index"])
def test_compiled_attention_kernels_give_the_same_bits(name: str):
    call = build(SIDES[name])
    torch._dynamo.reset()
    compiled = torch.compile(cross_attention, fullgraph=True, dynamic=True, backend="aot_eager")
    with mvlm_kernels.use_backend("triton"):
        pairs = zip(run(compiled, call, **call.bounds), run(cross_attention, call, **call.bounds), strict=True)
    for a, b in pairs:
        assert torch.equal(a, b)
    torch._dynamo.reset()


def test_launchers_of_cross_attention_read_no_tensor():
    # A meta tensor has no values: .item(), .tolist() or a data-dependent shape would raise. On a GPU each is a sync.
    launched = []
    for label, call in CASES["cross_attention"]():
        if label.startswith("bfloat16/64/32/"):
            with dispatch.recording(lambda kernel, *rest: launched.append(kernel.__name__), 90):
                call()
    families = {"short_kv_forward", "short_kv_backward", "short_q_forward", "short_q_backward"}
    assert set(launched) == families | {"short_q_backward_dq", "long_kv_backward", "short_q_combine", "sum_splits"}


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


def dense(**changes: Any) -> tuple[tuple[torch.Tensor, ...], dict[str, Any]]:
    """Valid arguments, with the named ones replaced."""
    tensors = {"q": torch.randn(2, 9, 2, 32), "k": torch.randn(2, 7, 2, 32), "v": torch.randn(2, 7, 2, 32)}
    tensors |= {name: changes.pop(name) for name in ("q", "k", "v") if name in changes}
    return tuple(tensors.values()), changes


BAD = {
    "rank": ({"q": torch.randn(9, 2, 32)}, r"q must be \(batch, length, heads, width\), got shape \(9, 2, 32\)"),
    "value-shape": ({"v": torch.randn(2, 8, 2, 32)}, r"v must have the shape of k, \(2, 7, 2, 32\), got \(2, 8"),
    "heads": ({"q": torch.randn(2, 9, 3, 32)}, r"k must have the head .* divisor of it, \(3, 32\), got \(2, 32\)"),
    "width": (
        {name: torch.randn(2, 7, 2, 36) for name in "qkv"},
        "q must have a head width divisible by 8 and at most 128, got 36",
    ),
    "batch": ({"q": torch.randn(3, 9, 2, 32)}, r"k must have the 3 sequences of q \(or give key_index\), got 2"),
    "integer": ({name: torch.ones(2, 7, 2, 32, dtype=torch.long) for name in "qkv"}, "must have one dtype of float16"),
    "device": ({"key_lengths": torch.ones(2, dtype=torch.int32, device="meta")}, "key_lengths must be on the device"),
    "length-type": ({"key_lengths": torch.ones(2)}, "key_lengths must be int32 or int64, got torch.float32"),
    "length-shape": ({"key_lengths": torch.ones(3, dtype=torch.int32)}, r"key_lengths must have shape \(2,\), got \(3"),
    "length-value": ({"key_lengths": torch.tensor([7, 8])}, r"key_lengths must be in 0\.\.7, got 7\.\.8"),
    "index-value": ({"key_index": torch.tensor([2, 0])}, r"key_index must be in 0\.\.1, got 0\.\.2"),
    "negative-index": ({"key_index": torch.tensor([0, -1])}, r"key_index must be in 0\.\.1, got -1\.\.0"),
    "index-shape": ({"key_index": torch.tensor([0, 1, 1])}, r"key_index must have shape \(2,\), got \(3,\)"),
    "mask-type": ({"key_mask": torch.ones(2, 7)}, "key_mask must be bool, or int64 words"),
    "mask-shape": ({"key_mask": torch.ones(2, 9, dtype=torch.bool)}, r"key_mask must have shape \(2, 7\), got \(2, 9"),
    "bound-of-dense": ({"max_len_q": 9}, "max_len_q must be None where q is dense, got 9"),
    "packed-rank": ({"cu_seqlens_q": torch.tensor([0, 4, 9])}, r"q must be packed \(rows, heads, width\)"),
    "cu-end": (
        {"q": torch.randn(9, 2, 32), "cu_seqlens_q": torch.tensor([0, 4, 10])},
        r"cu_seqlens_q must rise from 0 to at most the 9 rows of q, got \[0, 4, 10\]",
    ),
    "cu-order": ({"q": torch.randn(9, 2, 32), "cu_seqlens_q": torch.tensor([0, 5, 4])}, "cu_seqlens_q must rise"),
    "cu-type": ({"q": torch.randn(9, 2, 32), "cu_seqlens_q": torch.tensor([0.0, 4, 9])}, "cu_seqlens_q must be int32"),
    "bound": (
        {"q": torch.randn(9, 2, 32), "cu_seqlens_q": torch.tensor([0, 4, 9]), "max_len_q": 4},
        "max_len_q must be at least the longest sequence, 5, got 4",
    ),
    "lengths-of-packed": (
        {"k": torch.randn(9, 2, 32), "v": torch.randn(9, 2, 32), "cu_seqlens_k": torch.tensor([0, 4, 9]),
             "key_lengths": torch.tensor([4, 5])},
        "key_lengths must be None where cu_seqlens_k gives the lengths",
    ),
    "scale": ({"scale": torch.ones((), requires_grad=True)}, "scale must be a float, got a tensor .* multiply q by it"),
}  # fmt: skip


@pytest.mark.parametrize("changes, message", BAD.values(), ids=BAD.keys())
def test_bad_input_of_cross_attention_says_what_was_wanted(changes: dict[str, Any], message: str):
    tensors, kwargs = dense(**changes)
    with pytest.raises(ValueError, match=message):
        cross_attention(*tensors, **kwargs)


def test_explain_refuses_a_tensor_as_scale():
    tensors, _ = dense()
    with pytest.raises(ValueError, match="scale must be a float"):
        explain(cross_attention, *tensors, scale=torch.ones(()))


def test_explain_names_reasons_of_cross_attention():
    tensors, _ = dense()
    explanation = explain(cross_attention, *tensors)
    assert explanation.backend == "torch"
    assert "not triton: the tensors are on the CPU" in str(explanation)
    with mvlm_kernels.use_backend("triton"):
        assert explain(cross_attention, *tensors).backend == "triton"
    with pytest.raises(ValueError, match="key_lengths must have shape"):
        explain(cross_attention, *tensors, key_lengths=torch.ones(5, dtype=torch.int32))
