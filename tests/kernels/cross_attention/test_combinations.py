"""Combinations of attention's features, drawn at random, against the oracle: values, log-sum-exp, gradients."""

from typing import Any

import pytest
import torch
from torch import Tensor

import mvlm_kernels
from mvlm_kernels import cross_attention, dispatch
from support.kernels.attention import op_arguments
from support.kernels.combinations import check, draw_call

CHOSEN = (0, 17, 23, 24, 35, 36, 47, 67, 76, 84, 99, 109, 110, 119, 133, 162, 179, 186, 204, 212, 237, 242)


def as_op(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None, **options: Any) -> Tensor:
    """The registered op, which a compiled graph and a GPU without a kernel call."""
    if "seed" in options:
        options["seed"] = torch.as_tensor(options["seed"]).reshape(())
    factor = float(q.shape[-1] ** -0.5 if scale is None else scale)
    return torch.ops.mvlm_kernels.cross_attention(q, k, v, *op_arguments(q, k, options, factor))[0]


# Every form of either side, index, lengths, mask, grouped heads, dropout and both families are among these.
@pytest.mark.slow
@pytest.mark.parametrize("number", CHOSEN)
def test_drawn_combination_equals_formulas(number: int, monkeypatch: pytest.MonkeyPatch):
    drawn = draw_call(number)
    monkeypatch.setattr(dispatch, "multiprocessors", lambda device: 12 if number % 2 else 0)  # splits, or none
    with mvlm_kernels.use_backend("triton"):
        check(drawn, cross_attention, lse=True)
    check(drawn, cross_attention, lse=False)
    check(drawn, cross_attention, lse=True)
    check(drawn, as_op, lse=False)


def test_chosen_combinations_have_every_feature():
    found = [draw_call(number) for number in CHOSEN]
    for name in ("key_lengths", "key_mask", "key_index", "cu_seqlens_q", "cu_seqlens_k", "dropout_p"):
        assert sum(name in drawn.options for drawn in found) > 1, name
    grouped = [len({x.shape[-2] for x in drawn.tensors}) > 1 for drawn in found]
    assert sum("dropout_p" in x.options and g and "key_index" in x.options for x, g in zip(found, grouped, strict=True))
    long = [x.longest_keys > 128 for x in found]
    assert sum(g and lo for g, lo in zip(grouped, long, strict=True)) > 0
    assert any(lo and "dropout_p" in x.options and "key_index" in x.options for x, lo in zip(found, long, strict=True))
