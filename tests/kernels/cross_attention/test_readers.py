"""key_index inverted: the order in which programs walk, and its effect on results and on the cache."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import mvlm_kernels
from mvlm_kernels import cross_attention, dispatch
from mvlm_kernels.cross_attention.arguments import invert_key_index
from mvlm_kernels.cross_attention.cases import SIDES
from support.kernels.attention import build


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_inverted_index_lists_each_reader_once_the_busiest_sequence_first(dtype: torch.dtype):
    index = np.random.default_rng(0).integers(0, 7, 40)
    index[index == 3] = 4  # a sequence without readers
    order, spans = invert_key_index(torch.from_numpy(index).to(dtype), 7)
    assert sorted(order.tolist()) == list(range(40))
    assert sorted(spans[:, 0].tolist()) == list(range(7))
    counts = []
    for sequence, first, last in spans.tolist():
        assert order[first:last].tolist() == [b for b in range(40) if index[b] == sequence]
        counts.append(last - first)
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] == 0


def test_indices_out_of_range_count_as_the_nearest():
    order, spans = invert_key_index(torch.tensor([9, -4, 1]), 2)
    assert {sequence: order[first:last].tolist() for sequence, first, last in spans.tolist()} == {0: [1], 1: [0, 2]}


def test_an_index_that_is_written_to_is_inverted_anew():
    index = torch.tensor([0, 1, 1])
    first, again = invert_key_index(index, 2), invert_key_index(index, 2)
    assert first[0] is again[0]
    index[0] = 1
    assert invert_key_index(index, 2)[1].tolist() == [[1, 0, 3], [0, 0, 0]]
    q, k = torch.randn(3, 4, 1, 8), torch.randn(2, 5, 1, 8)
    torch.testing.assert_close(cross_attention(q, k, k, key_index=index), cross_attention(q, k[index], k[index]))
    with torch.inference_mode():  # what is made there must serve a backward pass later
        bounds = torch.tensor([0, 4, 9]).clone()
    bounds, rows = bounds.clone(), torch.randn(9, 1, 8, requires_grad=True)
    for context in (torch.inference_mode(), torch.enable_grad()):
        with context:
            out = cross_attention(rows, rows, rows, cu_seqlens_q=bounds, cu_seqlens_k=bounds)
    out.sum().backward()
    bounds[1] = 2
    found = cross_attention(rows, rows, rows, cu_seqlens_q=bounds, cu_seqlens_k=bounds)
    torch.testing.assert_close(found[None, :2], cross_attention(*(rows[None, :2],) * 3))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["index", "long-index"])
def test_bits_do_not_depend_on_the_order_in_which_programs_run(name: str):
    """Without splits, another order of programs and of key sequences is another order of work, not of sums."""
    case = replace(SIDES[name], heads=2)
    call = build(case)
    order, spans = invert_key_index(call.kwargs["key_index"], case.batch)
    names = ("key_lengths", "key_mask", "key_index", "cu_seqlens_q", "cu_seqlens_k")
    sides = [call.kwargs.get(n) for n in names]
    q, k, v = call.q, call.k, call.v
    results = []
    with mvlm_kernels.use_backend("triton"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "checks_values", lambda device: False)
        for rows in (spans, spans.flip(0)):
            args = (*sides, order, rows, 0.3, case.len_q, case.len_k, 0.0, None)
            out, lse = torch.ops.mvlm_kernels.cross_attention(q, k, v, *args)
            results.append(
                torch.ops.mvlm_kernels.cross_attention_backward(call.grad, q, k, v, out, lse, *args, True, True)
            )
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
