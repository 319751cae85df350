"""Grouped-query and multi-query attention against loops over sequences and heads in float64."""

from dataclasses import replace

import pytest
import torch

import mvlm_kernels
from mvlm_kernels import attention_probabilities, cross_attention, dispatch
from support.kernels.attention import SIDES, Case, attention_by_loops, build, run

SIZES = {"heads": 4, "key_heads": 2, "width": 16, "dtype": torch.float64}
CASES = {
    name: replace(SIDES[name], **(SIZES | changes))
    for name, changes in {
        "lengths": {"len_q": 19, "len_k": 7},
        "index": {"len_q": 19, "len_k": 7, "key_heads": 1},
        "packed-both": {"len_q": 9, "len_k": 9, "layout": "strided"},
        "long-lengths": {"len_q": 5, "len_k": 131},
        "long-index": {"len_q": 5, "len_k": 131, "key_heads": 1, "heads": 3},
        "long-packed-q": {"len_q": 5, "len_k": 131, "batch": 2},
    }.items()
}


def assert_equal(got: tuple[torch.Tensor, ...], wanted: tuple[torch.Tensor, ...]) -> None:
    for name, a, b in zip(("out", "dq", "dk", "dv"), got, wanted, strict=True):
        torch.testing.assert_close(a, b, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("multiprocessors", [0, 12], ids=["whole", "splits"])
def test_kernels_share_keys_among_query_heads(case: Case, multiprocessors: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(dispatch, "multiprocessors", lambda device: multiprocessors)
    call = build(case)
    with mvlm_kernels.use_backend("triton"):
        got = run(cross_attention, call, **call.bounds)
    assert_equal(got, run(attention_by_loops, call))


def test_sdpa_shares_keys_among_query_heads():
    call = build(Case(len_q=131, len_k=133, lengths=True, **SIZES))
    assert_equal(run(cross_attention, call), run(attention_by_loops, call))


@pytest.mark.slow
def test_keys_are_read_in_place(monkeypatch: pytest.MonkeyPatch):
    call, launched, launch = build(CASES["lengths"]), [], dispatch.launch
    monkeypatch.setattr(dispatch, "launch", lambda kernel, grid, q, k, *args, **meta: (
        launched.append((kernel.__name__, grid[0], k[0])), launch(kernel, grid, q, k, *args, **meta)
    ))  # fmt: skip
    with mvlm_kernels.use_backend("triton"):
        run(cross_attention, call)
    # A program of the forward has a query head, one of the backward a key head.
    assert [(name, programs) for name, programs, _ in launched] == [("short_kv_forward", 8), ("short_kv_backward", 4)]
    assert all(k.data_ptr() == call.k.data_ptr() for _, _, k in launched)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_probabilities_of_grouped_heads(backend):
    q, k = torch.randn(2, 5, 4, 16).double(), torch.randn(2, 7, 2, 16).double()
    with mvlm_kernels.use_backend(backend):
        got = attention_probabilities(q, k)
    for h in range(4):
        wanted = (q[:, :, h] @ k[:, :, h // 2].transpose(1, 2) / 4).softmax(-1)
        torch.testing.assert_close(got[:, h], wanted)
