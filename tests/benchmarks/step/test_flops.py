"""FLOPs of a step against counts by hand."""

import numpy as np
import pytest
import torch

from mvlm.config.model import MaskVLMConfig
from mvlm.model.maskvlm import MaskVLM
from mvlm_benchmarks.step import flops
from mvlm_benchmarks.step.contenders import compute_losses, make_inputs, make_module
from mvlm_kernels import use_backend
from support.benchmarks import micro_config

pytestmark = pytest.mark.slow


def layer(rows: float, width: int, longest: float) -> float:
    """Forward FLOPs of a self-attention block: QKV, scores, values, output, and a feed-forward of width 4C."""
    return 2 * rows * width * width * 12 + 4 * rows * longest * width


def cross(rows: float, others: float, width: int) -> float:
    """FLOPs that cross-attention adds: queries and output of the rows, keys and values of the others, two products."""
    return 2 * width * width * (2 * rows + 2 * others) + 4 * rows * others * width


BASE = MaskVLMConfig.preset("base")
LENGTHS = np.array([30, *[12] * 46, *[11] * 16, 10])  # 64 captions, 30 and 12 on average, as in the contract


@pytest.fixture(scope="module")
def counts() -> dict[str, float]:
    names = ("timm+roberta", "fast", "drop_masked", "masked_rows", "itc_itm")
    return {name: flops.gflop_per_pair(BASE, LENGTHS, name) for name in names}


@pytest.mark.extended
def test_baseline_of_base_matches_a_count_by_hand(counts) -> None:
    """197 positions per image, 30 per caption, and heads on all positions."""
    width, image, text, vocabulary = 768, 197, 30, 50265
    image_block, text_block = layer(image, width, image), layer(text, width, text)
    projections = 2 * 2 * 196 * 768 * width
    forward = {
        "image encoder": 2 * 12 * image_block + projections,
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
    # Backward is twice the forward, but for the patch projections, whose input is the image and needs no gradient.
    wanted = 3 * sum(forward.values()) - projections
    assert counts["timm+roberta"] == pytest.approx(wanted / 1e9, rel=1e-12)


@pytest.mark.extended
def test_fast_has_at_most_079_of_the_baseline_and_drop_masked_033(counts) -> None:
    assert counts["fast"] / counts["timm+roberta"] <= 0.79
    assert counts["drop_masked"] / counts["timm+roberta"] <= 0.33


@pytest.mark.extended
def test_masked_rows_have_at_most_149_times_the_flops_of_itc_and_itm(counts) -> None:
    assert counts["masked_rows"] / counts["itc_itm"] <= 1.49
    assert counts["fast"] / counts["itc_itm"] <= 1.99


@pytest.mark.extended
def test_fake_tensors_give_the_count_of_real_ones() -> None:
    """Captions of one length: ITM's negatives have the mean length. By the kernels, because torch pads on a CPU."""
    config = micro_config(image_layers=2, cross_layers=2, decoder_layers=2)
    lengths = np.full(3, 9)
    found = flops.gflop_per_pair(config, lengths, "fast")
    module = make_module("fast", config)
    inputs = make_inputs(MaskVLM(config), lengths, torch.device("cpu"))
    with use_backend("triton"):
        real = flops.count_flops(lambda: compute_losses("fast", module, inputs))
    assert real / 3e9 == pytest.approx(found, rel=1e-12)
