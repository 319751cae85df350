"""The baselines of the step benchmark compute the losses of MaskVLM on the same weights and the same batch."""

import numpy as np
import pytest
import torch

from mvlm.model.maskvlm import MaskVLM
from mvlm_benchmarks.step.baselines import Baseline, check_bidirectional
from mvlm_benchmarks.step.inputs import draw_negatives, make_batch, pad_batch
from mvlm_benchmarks.step.shared_weights import SharedWeights
from support.benchmarks import micro_config

MICRO = micro_config(
    width=16, image_layers=2, text_layers=2, cross_layers=2, decoder_layers=2, image_mean=(0.5, 0.4, 0.3),
    image_std=(0.5, 0.25, 0.2),
)  # fmt: skip
LENGTHS = np.array([7, 6, 12, 8, 9])


@pytest.fixture(scope="module")
def model() -> MaskVLM:
    """In float64, with random values in every parameter, norms and biases included."""
    found = MaskVLM(MICRO).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in found.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if name != "log_scale":
                parameter.copy_(1 + 0.2 * noise if ".norm" in name and name.endswith("weight") else 0.3 * noise)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("cross", ["roberta", "decoder-layer"])
def test_baseline_has_our_losses_and_gradients(model, cross) -> None:
    batch, masks = make_batch(MICRO, LENGTHS)
    theirs = SharedWeights(model).baseline(cross)
    model.zero_grad(set_to_none=True)
    ours = model(batch, masks, seed=3, step=7)
    ours.total.backward()
    found = theirs(pad_batch(MICRO, batch, masks, *draw_negatives(model, batch, 3, 7)))
    found.total.backward()
    for wanted, got in ((ours[name], x) for name, x in found.items()):  # not the accuracies
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)

    # A parameter's address tells which of ours it shares; a fused one shares three.
    gradients = {}
    for parameter in model.parameters():
        assert parameter.grad is not None
        gradients[parameter.data_ptr()] = parameter.grad.flatten()
    largest = max(float(g.norm()) for g in gradients.values())
    seen = 0
    for name, parameter in theirs.named_parameters():
        assert parameter.grad is not None, name
        if "token_type" in name:
            continue
        flat, start, rows = parameter.grad.flatten(), 0, parameter.data_ptr()
        if "position_embeddings" in name:
            start = 2 * MICRO.width  # the rows before the first position
        while start < flat.numel():
            wanted = gradients[rows + start * parameter.element_size()]
            got = flat[start : start + wanted.numel()]
            assert float((got - wanted).abs().max()) <= 1e-12 * largest, name
            start, seen = start + wanted.numel(), seen + 1
    assert seen == len(gradients) == len(list(model.parameters()))


@pytest.mark.parametrize("stack", ["text_cross", "image_cross", "decoder"])
def test_causal_baseline_is_refused(stack) -> None:
    model = Baseline(MICRO, "roberta")
    check_bidirectional(model)
    getattr(model, stack).layers[0].attention.self.is_causal = True
    getattr(model, stack).layers[1].attention.self.is_causal = True
    with pytest.raises(AssertionError, match="is causal: its first position does not depend on the last"):
        check_bidirectional(model)
