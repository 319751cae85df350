"""FLOPs of an evaluation on fake tensors, against those of the same work on real ones and against formulas."""

import pytest
import torch

from mvlm.costs.evaluation_cost import PAIRS, evaluation_cost
from mvlm.costs.flops import counter
from mvlm.model.fast import fuse_pairs
from mvlm.model.packing import PackedText, Packing
from support.models import micro_config, micro_model

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_flops_of_a_pair_are_those_of_a_real_batch(norm):
    found = evaluation_cost(micro_config(cross_norm=norm), 30, 9)
    model = micro_model(dtype=torch.float32, cross_norm=norm)
    model.set_attention("sdpa", "sdpa")
    images, pairs = PAIRS // 30, torch.arange(PAIRS)
    text = PackedText(torch.randn(9 * PAIRS, 16), Packing(9 * torch.arange(PAIRS + 1).int(), 16, 9 * 256))
    with torch.no_grad(), counter() as real:
        model.matching_logits(
            *fuse_pairs(model, torch.randn(images, 17, 16), text, pairs % images, pairs, max_rows=9 * PAIRS)
        )
    assert found.pair == real.get_total_flops() // PAIRS


def test_flops_of_an_image_by_hand():
    """Patches of 8 x 8 pixels in 3 colours; two blocks of four projections, a feed-forward layer and attention."""
    c, rows = 16, 17
    block = 2 * rows * (4 * c * c + 8 * c * c) + 2 * 2 * rows * rows * c
    assert evaluation_cost(micro_config(), 30).image == 2 * 16 * 192 * c + 2 * block + 2 * c * 8
