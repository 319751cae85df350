"""FLOPs of an evaluation on fake tensors, against those of the same work on real ones and against formulas."""

import pytest
import torch

from mvlm.costs import evaluation_cost as module
from mvlm.costs.evaluation_cost import EvaluationCost, EvaluationShape, evaluation_cost, format_evaluation
from mvlm.costs.flops import counter
from mvlm.model.fast import match_pairs
from mvlm.model.packing import PackedText, Packing
from support.models import micro_config, micro_model


def shape(**sizes: int) -> EvaluationShape:
    return EvaluationShape(**({"images": 40, "captions": 80, "candidates": 10, "tokens": 9} | sizes))


def test_pairs_are_the_candidates_of_both_directions():
    assert shape().pairs == 40 * 10 + 80 * 10
    assert shape(candidates=1000).pairs == 2 * 40 * 80
    assert EvaluationShape(images=5000, captions=25000, candidates=256).pairs == 7_680_000


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["pre", "post"])
def test_flops_of_a_pair_are_those_of_a_real_batch(norm):
    config = micro_config(cross_norm=norm)
    found = evaluation_cost(config, shape())
    model = micro_model(dtype=torch.float32, cross_norm=norm)
    model.set_attention("sdpa", "sdpa")
    images, pairs = module.PAIRS * 40 // shape().pairs, torch.arange(module.PAIRS)
    text = PackedText(torch.randn(9 * module.PAIRS, 16), Packing(9 * torch.arange(module.PAIRS + 1).int(), 16, 9 * 256))
    with torch.no_grad(), counter() as real:
        match_pairs(model, torch.randn(images, 17, 16), text, pairs % images, pairs, 9 * module.PAIRS)
    assert found.pair == real.get_total_flops() // module.PAIRS


@pytest.mark.slow
def test_flops_of_an_image_by_hand():
    """Patches of 8 x 8 pixels in 3 colours; two blocks of four projections, a feed-forward layer and attention."""
    c, rows = 16, 17
    block = 2 * rows * (4 * c * c + 8 * c * c) + 2 * 2 * rows * rows * c
    assert evaluation_cost(micro_config(), shape()).image == 2 * 16 * 192 * c + 2 * block + 2 * c * 8


def test_the_plan_adds_up(monkeypatch):
    cost = EvaluationCost(image=7, caption=5, pair=3, reconstruction=2)
    assert cost.total(shape()) == 40 * (7 + 2) + 80 * 5 + 1200 * 3
    monkeypatch.setattr(module, "evaluation_cost", lambda *_: cost)
    text = format_evaluation(micro_config(), shape(), peak=109.0, ranks=4, mfu=0.5)
    assert "pairs to judge  1,200" in text
    assert "20 s on 4 GPUs at an MFU of 0.5, not measured; 3 minutes need an MFU of 0.056" in text
