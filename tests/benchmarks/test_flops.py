"""Operations of a step against counts made by hand."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mvlm.config import MaskVLMConfig
from mvlm.parts import part
from mvlm_benchmarks import flops
from mvlm_kernels import cross_attention, linear_pixel_loss


def counted(step) -> int:
    with flops.counter() as found:
        step()
    return found.get_total_flops()


def leaf(*shape: int) -> torch.Tensor:
    return torch.ones(shape).requires_grad_()


def test_sdpa_on_the_cpu_is_two_products_and_four() -> None:
    """torch counts it as nothing: 2 products of B x H x Lq x Lk x D, twice as many in the backward."""
    q, k, v = leaf(2, 3, 5, 16), leaf(2, 3, 7, 16), leaf(2, 3, 7, 16)
    product = 2 * 2 * 3 * 5 * 7 * 16
    assert counted(lambda: F.scaled_dot_product_attention(q, k, v)) == 2 * product
    assert counted(lambda: F.scaled_dot_product_attention(q, k, v).sum().backward()) == 6 * product
    mask = torch.ones(2, 1, 1, 7, dtype=torch.bool)
    assert counted(lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=mask).sum().backward()) == 6 * product


def test_attention_of_explicit_products_counts_the_same() -> None:
    q, k, v = leaf(2, 3, 5, 16), leaf(2, 3, 7, 16), leaf(2, 3, 7, 16)
    assert counted(lambda: ((q @ k.mT).softmax(-1) @ v).sum().backward()) == 6 * (2 * 2 * 3 * 5 * 7 * 16)


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
def test_cross_attention_by_its_pairs_of_rows(q: Any, k: Any, sides: dict[str, Any], pairs: int) -> None:
    tensors = leaf(*q), leaf(*k), leaf(*k)
    longest: dict[str, Any] = {"max_len_q": 6} if "cu_seqlens_q" in sides else {}
    longest |= {"max_len_k": 6} if "cu_seqlens_k" in sides else {}
    product = 2 * pairs * 3 * 32
    assert counted(lambda: cross_attention(*tensors, **sides, **longest)) == 2 * product
    assert counted(lambda: cross_attention(*tensors, **sides, **longest).sum().backward()) == 6 * product


@pytest.mark.parametrize("needs, products", [((True, False), 4), ((False, True), 5)])
def test_cross_attention_with_gradients_of_one_side(needs, products) -> None:
    """dP is needed for either; then one product for dQ, or one each for dK and dV."""
    q, k, v = (leaf(2, 5, 3, 32).requires_grad_(need) for need in (needs[0], needs[1], needs[1]))
    assert counted(lambda: cross_attention(q, k, v).sum().backward()) == products * 2 * 2 * 5 * 5 * 3 * 32


def test_linear_pixel_loss_is_the_pixel_heads_products() -> None:
    hidden, weight, bias = leaf(2, 3, 16), leaf(3 * 8 * 8, 16), leaf(3 * 8 * 8)
    images = torch.zeros(2, 3, 16, 16, dtype=torch.uint8)
    ids = torch.tensor([[0, 1, 2], [1, 2, 3]])
    product = 2 * 2 * 3 * 16 * 192

    def loss() -> torch.Tensor:
        return linear_pixel_loss(hidden, weight, bias, images, ids, 8)

    assert counted(loss) == product
    assert counted(lambda: loss().backward()) == 3 * product
    weight.requires_grad_(False)
    assert counted(lambda: loss().backward()) == 2 * product


def test_parts_are_told_apart_and_the_outermost_holds() -> None:
    x = torch.ones(2, 2)
    with flops.counter() as found:
        parts = flops.PartCounter(found.get_total_flops)
        with parts:
            torch.mm(x, x)
            with part("ITM"):
                torch.mm(x, x)
                with part("MIM cross"):
                    torch.mm(x, x)
            with part("ITC"):
                torch.mm(x, x)
            torch.mm(x, x)
        parts.close()
    assert parts.counts == {"other": 2 * 16, "ITM": 2 * 16, "ITC": 16}


def layer(rows: float, width: int, longest: float) -> float:
    """Forward operations of a self-attention block: QKV, scores, values, output, and the two layers of four widths."""
    return 2 * rows * width * width * 12 + 4 * rows * longest * width


def cross(rows: float, others: float, width: int) -> float:
    """What cross-attention adds: queries and output of the rows, keys and values of the others, two products."""
    return 2 * width * width * (2 * rows + 2 * others) + 4 * rows * others * width


BASE = MaskVLMConfig.preset("base")
LENGTHS = np.array([30, *[12] * 46, *[11] * 16, 10])  # 64 captions, 30 and 12 on average, as in the contract


@pytest.fixture(scope="module")
def baseline() -> tuple[dict[str, float], float]:
    return flops.gflop_per_pair(BASE, LENGTHS, "timm+roberta")


def test_the_baseline_of_base_by_hand(baseline) -> None:
    """Formulas of its own: 197 rows an image, 30 a caption, every head on every row."""
    width, image, text, vocabulary = 768, 197, 30, 50265
    image_block, text_block = layer(image, width, image), layer(text, width, text)
    wanted = {
        "image encoder": 2 * (12 * image_block + 2 * 196 * 768 * width),
        "text encoder": 2 * 12 * text_block,
        "MLM cross": 3 * (text_block + cross(text, image, width)),
        "LM head": 2 * text * (width * width + width * vocabulary),
        "MIM cross": 3 * (image_block + cross(image, text, width)),
        "decoder": 3 * (image_block + cross(image, text, width)),
        "pixel head": 2 * 196 * width * 768,
        "ITC": 2 * 2 * width * 256 + 2 * 64 * 256,
        "ITM": 3 * 3 * (image_block + text_block + cross(image, text, width) + cross(text, image, width))
        + 3 * 2 * width * 2,
    }
    found, backward = baseline
    assert found.keys() == wanted.keys()
    for name, operations in wanted.items():
        assert found[name] == pytest.approx(operations / 1e9, rel=1e-12), name
    # Twice the forward, but for the patch projections, whose input is the image and needs no gradient.
    assert backward == pytest.approx((2 * sum(wanted.values()) - 2 * 2 * 196 * 768 * width) / 1e9, rel=1e-12)


def test_plain_does_less_than_the_baseline(baseline) -> None:
    """It packs the text, and computes heads on masked rows and ITM's last block on [CLS] alone."""
    parts, backward = flops.gflop_per_pair(BASE, LENGTHS, "plain")
    theirs = sum(baseline[0].values()) + baseline[1]
    assert sum(parts.values()) + backward < 0.9 * theirs
    assert parts["image encoder"] == pytest.approx(baseline[0]["image encoder"], rel=1e-12)
    masked = sum(max(1, round(0.3 * (n - 2))) for n in LENGTHS) / len(LENGTHS)
    assert parts["LM head"] == pytest.approx(2 * masked * (768 * 768 + 768 * 50265) / 1e9, rel=1e-12)
    assert parts["pixel head"] == pytest.approx(2 * 4 * 29 * 768 * 768 / 1e9, rel=1e-12)
