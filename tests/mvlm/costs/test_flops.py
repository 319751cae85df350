"""FLOPs of single operators against counts by hand."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from mvlm.costs.flops import counter
from mvlm_kernels import contrastive_terms, cross_attention


def counted(step) -> int:
    with counter() as found:
        step()
    return found.get_total_flops()


def leaf(*shape: int) -> torch.Tensor:
    return torch.ones(shape).requires_grad_()


def test_sdpa_on_the_cpu_counts_two_products_and_four_backward() -> None:
    """Two products of B x H x Lq x Lk x D, and four in backward. torch alone counts nothing on the CPU."""
    q, k, v = leaf(2, 3, 5, 16), leaf(2, 3, 7, 16), leaf(2, 3, 7, 16)
    product = 2 * 2 * 3 * 5 * 7 * 16
    assert counted(lambda: F.scaled_dot_product_attention(q, k, v)) == 2 * product
    assert counted(lambda: F.scaled_dot_product_attention(q, k, v).sum().backward()) == 6 * product
    mask = torch.ones(2, 1, 1, 7, dtype=torch.bool)
    assert counted(lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=mask).sum().backward()) == 6 * product


def lengths(*values: int) -> torch.Tensor:
    return torch.tensor([0, *values]).cumsum(0).int()


@pytest.mark.parametrize(
    "q, k, sides, pairs",
    [
        ((2, 5, 3, 32), (2, 7, 3, 32), {}, 2 * 5 * 7),
        ((4, 5, 3, 32), (2, 7, 3, 32), {"key_index": torch.tensor([1, 0, 1, 1])}, 4 * 5 * 7),
        ((2, 5, 3, 32), (2, 7, 3, 32), {"key_lengths": torch.tensor([7, 2])}, 2 * 5 * 7),
        ((9, 3, 32), (2, 7, 3, 32), {"cu_seqlens_q": lengths(5, 4)}, 9 * 7),
        ((2, 5, 3, 32), (9, 3, 32), {"cu_seqlens_k": lengths(6, 3)}, 5 * 9),
        ((3, 5, 3, 32), (9, 3, 32), {"cu_seqlens_k": lengths(6, 3), "key_index": torch.tensor([0, 1, 1])}, 3 * 5 * 6),
        ((9, 3, 32), (9, 3, 32), {"cu_seqlens_q": lengths(6, 3), "cu_seqlens_k": lengths(6, 3)}, 9 * 6),
    ],
    ids=["dense", "indexed", "lengths", "packed q", "packed k", "packed k, indexed", "both packed"],
)
def test_cross_attention_counts_its_pairs_of_rows(q: Any, k: Any, sides: dict[str, Any], pairs: int) -> None:
    """The registered op: on CPU tensors the public function pads, and its matrix products are counted instead."""
    tensors = leaf(*q), leaf(*k), leaf(*k)
    longest = [6 if bounds in sides else x[1] for bounds, x in (("cu_seqlens_q", q), ("cu_seqlens_k", k))]
    named = [sides.get(name) for name in ("key_lengths", "key_mask", "key_index", "cu_seqlens_q", "cu_seqlens_k")]

    def attend() -> torch.Tensor:
        features = (0.0, None)  # no dropout
        return torch.ops.mvlm_kernels.cross_attention(*tensors, *named, None, None, 32**-0.5, *longest, *features)[0]

    product = 2 * pairs * 3 * 32
    assert counted(attend) == 2 * product
    assert counted(lambda: attend().sum().backward()) == 6 * product


@pytest.mark.parametrize("needs, products", [((True, False), 4), ((False, True), 5)])
def test_cross_attention_counts_only_the_gradients_it_needs(needs, products) -> None:
    """dP is needed for either; then one product for dQ, or one each for dK and dV."""
    q, k, v = (leaf(2, 5, 3, 32).requires_grad_(need) for need in (needs[0], needs[1], needs[1]))
    assert counted(lambda: cross_attention(q, k, v).sum().backward()) == products * 2 * 2 * 5 * 5 * 3 * 32


def test_contrastive_loss_counts_one_product_and_two_backward() -> None:
    image, text, log_scale = leaf(3, 8), leaf(5, 8), leaf(1)
    terms = contrastive_terms(image, text, log_scale)
    assert counted(lambda: contrastive_terms(image, text, log_scale)) == 2 * 3 * 5 * 8
    assert counted(lambda: (terms.rows.sum() + terms.columns.sum()).backward()) == 2 * 2 * 3 * 5 * 8
