"""key_index inverted: the order in which programs walk, and its effect on results and on the cache."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import mvlm_kernels
from mvlm_kernels import cross_attention, dispatch
from mvlm_kernels.cross_attention import invert_key_index
from support.kernels.attention import SIDES, build, run


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_inverted_index_lists_every_reader_once_with_the_busiest_sequence_first(dtype: torch.dtype):
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


@pytest.mark.slow
@pytest.mark.parametrize("name", ["index", "packed-index", "long-index", "long-packed-index"])
def test_readers_handed_in_give_the_same_bits(name: str):
    case = replace(SIDES[name], heads=2)
    call = build(case)
    readers = invert_key_index(call.kwargs["key_index"], case.batch)
    with mvlm_kernels.use_backend("triton"):
        alone = run(cross_attention, call, **call.bounds)
        given = run(cross_attention, call, key_readers=readers, **call.bounds)
    for a, b in zip(alone, given, strict=True):
        assert torch.equal(a, b)


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
