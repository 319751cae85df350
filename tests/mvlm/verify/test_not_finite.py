"""The op that is first not finite, of networks whose op is known, and of healthy steps, which have none."""

import pytest
import torch
from torch import nn

from mvlm.verify.not_finite import FirstNotFinite
from support.models import micro_batch, micro_model


class Halves(nn.Module):
    """Two linear layers, with a function between them."""

    def __init__(self, between) -> None:
        super().__init__()
        self.first, self.last, self.between = nn.Linear(3, 3), nn.Linear(3, 1), between

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.between(self.first(x))).sum()


CASES = {
    "division": (lambda x: x / (x - x), ("aten.div.Tensor", False, "")),
    "root of zero": (lambda x: x + (0 * x).sqrt(), ("aten.div.Tensor of SqrtBackward0", True, "")),
    "mask": (lambda x: x.masked_fill(x > -100, float("-inf")).relu(), None),
    "a row that is masked whole": (
        lambda x: x.masked_fill(x > -100, float("-inf")).softmax(1),
        ("aten._softmax", False, ""),
    ),
    "memory that nobody has written": (lambda x: x + 0 * x.new_empty(3).add(1), None),
    "infinity in place": (lambda x: x.clone().div_(0), ("aten.div_.Tensor", False, "")),
}


@pytest.mark.parametrize("name", CASES)
def test_the_first_op_is_found(name):
    between, wanted = CASES[name]
    torch.manual_seed(0)
    model = Halves(between)
    torch.use_deterministic_algorithms(True)  # new memory is then NaN
    try:
        with FirstNotFinite(model) as finder:
            model(torch.randn(4, 3)).backward()
    finally:
        torch.use_deterministic_algorithms(False)
    found = finder.found
    assert (None if found is None else (found.op, found.backward, found.module)) == wanted
    assert found is None or not found.came_in


def test_inputs_that_were_not_finite_are_told_and_modules_are_named():
    model = Halves(lambda x: x)
    with torch.no_grad():
        model.last.weight[0, 1] = torch.inf
    with FirstNotFinite(model) as finder:
        model(torch.ones(4, 3))
    assert finder.found is not None
    assert (finder.found.op, finder.found.module, finder.found.came_in) == ("aten.addmm", "last", True)
    assert not model.last._forward_hooks


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["plain", "fast"])
@pytest.mark.parametrize("changes", [{}, {"drop_masked": True, "contrastive": "sigmoid"}], ids=str)
def test_a_healthy_step_has_none(plan, changes):
    """Its masks have infinities."""
    layers = dict.fromkeys(("image_layers", "text_layers", "cross_layers", "decoder_layers"), 1)
    model = micro_model(dtype=torch.float32, **layers, **changes)
    batch, masks = micro_batch(config=model.config)
    with FirstNotFinite(model) as finder:
        model(batch, masks, plan=plan).total.backward()
    assert finder.found is None
