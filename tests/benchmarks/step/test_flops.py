"""Operations of a step against counts made by hand."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mvlm.config import MaskVLMConfig
from mvlm.model import MaskVLM
from mvlm.parts import part
from mvlm_benchmarks.step import flops
from mvlm_benchmarks.step import report as step_report
from mvlm_benchmarks.step.contenders import losses_of, make_inputs, make_module
from mvlm_benchmarks.step.parts import parts_of
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
    """The op itself: on CPU tensors the public function pads, and its products are counted as they are."""
    tensors = leaf(*q), leaf(*k), leaf(*k)
    longest = [6 if bounds in sides else x[1] for bounds, x in (("cu_seqlens_q", q), ("cu_seqlens_k", k))]
    named = [sides.get(name) for name in ("key_lengths", "key_mask", "key_index", "cu_seqlens_q", "cu_seqlens_k")]

    def attend() -> torch.Tensor:
        return torch.ops.mvlm_kernels.cross_attention(*tensors, *named, 32**-0.5, *longest)[0]

    product = 2 * pairs * 3 * 32
    assert counted(attend) == 2 * product
    assert counted(lambda: attend().sum().backward()) == 6 * product


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


def test_parts_are_told_apart_the_innermost_holds_but_in_itm() -> None:
    x = torch.ones(2, 2)
    with flops.counter() as found:
        parts = flops.PartCounter(found.get_total_flops)
        with parts:
            torch.mm(x, x)
            with part("ITM"):
                torch.mm(x, x)
                with part("MIM cross"):
                    torch.mm(x, x)
            with part("MIM cross"):
                torch.mm(x, x)
                with part("decoder"):
                    torch.mm(x, x)
                torch.mm(x, x)
            torch.mm(x, x)
        parts.close()
    assert parts.counts == {"other": 2 * 16, "ITM": 2 * 16, "MIM cross": 2 * 16, "decoder": 16}


def layer(rows: float, width: int, longest: float) -> float:
    """Forward operations of a self-attention block: QKV, scores, values, output, and the two layers of four widths."""
    return 2 * rows * width * width * 12 + 4 * rows * longest * width


def cross(rows: float, others: float, width: int) -> float:
    """What cross-attention adds: queries and output of the rows, keys and values of the others, two products."""
    return 2 * width * width * (2 * rows + 2 * others) + 4 * rows * others * width


BASE = MaskVLMConfig.preset("base")
LENGTHS = np.array([30, *[12] * 46, *[11] * 16, 10])  # 64 captions, 30 and 12 on average, as in the contract


@pytest.fixture(scope="module")
def counts() -> step_report.Counts:
    names = ("timm+roberta", "plain", "fast", "drop_masked")
    return {name: flops.gflop_per_pair(BASE, LENGTHS, name) for name in names}


def test_the_baseline_of_base_by_hand(counts) -> None:
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
    found, backward = counts["timm+roberta"]
    assert found.keys() == wanted.keys()
    for name, operations in wanted.items():
        assert found[name] == pytest.approx(operations / 1e9, rel=1e-12), name
    # Twice the forward, but for the patch projections, whose input is the image and needs no gradient.
    assert backward == pytest.approx((2 * sum(wanted.values()) - 2 * 2 * 196 * 768 * width) / 1e9, rel=1e-12)


def test_plain_leaves_heads_and_padding_out(counts) -> None:
    parts, _ = counts["plain"]
    theirs, _ = counts["timm+roberta"]
    assert parts["image encoder"] == pytest.approx(theirs["image encoder"], rel=1e-12)
    masked = sum(max(1, round(0.3 * (n - 2))) for n in LENGTHS) / len(LENGTHS)
    assert parts["LM head"] == pytest.approx(2 * masked * (768 * 768 + 768 * 50265) / 1e9, rel=1e-12)
    assert parts["pixel head"] == pytest.approx(2 * 4 * 29 * 768 * 768 / 1e9, rel=1e-12)


def test_fast_does_at_most_079_of_the_baseline_and_dropping_066(counts) -> None:
    baseline, plain, fast, dropping = (step_report.total(found) for found in counts.values())
    assert fast / baseline <= 0.79
    assert dropping / baseline <= 0.66
    assert dropping < fast < plain < baseline


def test_fast_by_hand(counts) -> None:
    """What is easy to say of it: one projection of patches, pixel head and LM head on masked rows."""
    parts, width = counts["fast"][0], 768
    projection = 2 * 196 * 768 * width
    assert parts["image encoder"] == pytest.approx((24 * layer(197, width, 197) + projection) / 1e9, rel=1e-12)
    assert parts["pixel head"] == pytest.approx(2 * 4 * 29 * 768 * 768 / 1e9, rel=1e-12)
    masked = sum(max(1, round(0.3 * (n - 2))) for n in LENGTHS) / len(LENGTHS)
    # Its gradients' products are made with the logits, so the head's forward has three times its own.
    assert parts["LM head"] == pytest.approx(2 * masked * (width * width + 3 * width * 50265) / 1e9, rel=1e-12)
    dropped = counts["drop_masked"][0]["image encoder"]
    visible = 2 * projection / 2 + 12 * (layer(197, width, 197) + layer(197 - 4 * 29, width, 197 - 4 * 29))
    assert dropped == pytest.approx(visible / 1e9, rel=1e-12)


def test_every_product_has_a_part(counts) -> None:
    for name, (parts, _) in counts.items():
        assert parts.get("other", 0) <= 1e-6 * sum(parts.values()), name
        assert {"MLM cross", "LM head", "MIM cross", "decoder", "pixel head", "ITC", "ITM"} <= parts.keys(), name


@pytest.mark.parametrize("name", ["timm+decoder-layer", "fast"])
def test_fake_tensors_count_what_real_ones_do(name) -> None:
    """Captions of one length, so that those ITM draws are as long as they are taken to be."""
    config = MaskVLMConfig(
        image_size=32, patch_size=8, mask_block=16, width=32, heads=2, image_layers=2, text_layers=1, cross_layers=2,
        decoder_layers=2, vocab_size=300, mask_token_id=4, text_length=12, itc_width=8,
    )  # fmt: skip
    lengths = np.full(3, 9)
    parts, backward = flops.gflop_per_pair(config, lengths, name)
    module = make_module(name, config)
    inputs = make_inputs(MaskVLM(config), lengths, torch.device("cpu"))
    with parts_of(module):
        real, real_backward = flops.count(lambda: losses_of(name, module, inputs))
    assert {key: n / 3e9 for key, n in real.items()} == pytest.approx(parts, rel=1e-12)
    assert real_backward / 3e9 == pytest.approx(backward, rel=1e-12)
