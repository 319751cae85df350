"""Dropout of attention against an independent Philox. test_combinations.py has its values and gradients."""

from dataclasses import replace

import pytest
import torch

import mvlm_kernels
from mvlm_kernels import cross_attention, dispatch
from mvlm_kernels.cross_attention.cases import SIDES, Shape, kept_by_hand
from mvlm_kernels.cross_attention.reference import cross_attention_reference, philox
from support.kernels.attention import build, op_arguments, run

P, SEED = 0.3, 0x1234_5678_9ABC_DEF1


def test_philox_has_the_published_words():
    """Known answers of Random123, the authors' library."""
    ones = torch.tensor(2**32 - 1)
    for counter, seed, rounds, wanted in (
        (torch.tensor(0), 0, 10, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        (torch.tensor(0), 0, 7, "5f6fb709 0d893f64 4f121f81 4f730a48"),
        (ones, -1, 10, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ):
        words = philox((counter,) * 4, torch.tensor(seed), rounds)
        assert " ".join(f"{int(word):08x}" for word in words) == wanted


@pytest.mark.slow
@pytest.mark.parametrize("len_q, len_k", [(13, 15), (3, 130)], ids=["short keys", "short queries"])
def test_forward_and_backward_drop_the_same(len_q: int, len_k: int, monkeypatch: pytest.MonkeyPatch):
    """Unit vectors as values show the kept probabilities, unit vectors as gradients show them to dV; in splits too."""
    q, k = torch.randn(2, len_q, 1, 128), torch.randn(2, len_k, 1, 128)
    found = []
    for multiprocessors in (0, 12):
        monkeypatch.setattr(dispatch, "multiprocessors", lambda device, n=multiprocessors: n)
        v = torch.eye(len_k, 128).expand(2, -1, -1)[:, :, None].clone().requires_grad_()
        with mvlm_kernels.use_backend("triton"):
            out = cross_attention(q, k, v, dropout_p=P, seed=SEED)
            out.backward(torch.eye(len_q, 128).expand(2, -1, -1)[:, :, None])
        seen = min(len_k, 128)
        assert v.grad is not None
        found += [out[:, :, 0, :seen] != 0, v.grad[:, :seen, 0, :len_q].transpose(1, 2) != 0]
    wanted = torch.stack([torch.from_numpy(kept_by_hand(SEED, b, (1, len_q), len_k, P) != 0)[0] for b in range(2)])
    assert all(torch.equal(mask, wanted[..., :seen]) for mask in found)


def test_dropout_of_nothing_changes_no_bit():
    call = build(replace(SIDES["lengths"], len_q=9, len_k=7))
    with mvlm_kernels.use_backend("triton"):
        plain, without = run(cross_attention, call), run(cross_attention, call, dropout_p=0.0, seed=SEED)
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(plain, without, strict=True))


def test_share_of_dropped_probabilities():
    """Within four standard deviations of p, and no seed is like another."""
    v = torch.eye(128)[None, :, None]
    q, k = torch.zeros(1, 500, 1, 128), torch.zeros(1, 128, 1, 128)
    torch.manual_seed(0)
    first, second = ((cross_attention(q, k, v, dropout_p=0.1) == 0).double() for _ in range(2))
    for dropped in (first, second, (first * second) * 10):
        assert abs(float(dropped.mean()) - 0.1) < 4 * 10 * (0.01 * 0.99 / 64_000) ** 0.5
    torch.manual_seed(0)
    assert torch.equal(cross_attention(q, k, v, dropout_p=0.1) == 0, first == 1)


def test_a_given_seed_drops_the_same_where_both_sides_are_long():
    case = Shape(len_q=130, len_k=131, heads=1, width=8, batch=1, dtype=torch.float64)
    wanted = run(cross_attention_reference, build(case), dropout_p=P, seed=torch.tensor(SEED))
    for a, b in zip(run(cross_attention, build(case), dropout_p=P, seed=SEED), wanted, strict=True):
        torch.testing.assert_close(a, b)
    torch.manual_seed(0)
    drawn = [cross_attention(build(case).q, build(case).k, build(case).v, dropout_p=P) for _ in range(2)]
    assert not torch.equal(*drawn)


@pytest.mark.slow
@pytest.mark.plain_empty
def test_dropout_passes_opcheck():
    call = build(replace(SIDES["long-lengths"], len_q=5, len_k=131, dtype=torch.float64))
    tensors = [x.detach().nan_to_num().requires_grad_() for x in (call.q, call.k, call.v)]
    options = {"dropout_p": P, "seed": torch.tensor(SEED)}
    args = (*tensors, *op_arguments(call.q, call.k, call.kwargs | options, 0.25))
    with mvlm_kernels.use_backend("triton"):
        torch.library.opcheck(torch.ops.mvlm_kernels.cross_attention.default, args)
