"""The step benchmark's baselines compute what MaskVLM computes, on the same weights."""

import numpy as np
import pytest
import torch

from mvlm.config import MaskVLMConfig
from mvlm.model import MaskVLM
from mvlm_benchmarks.step.baselines import Baseline, check_bidirectional
from mvlm_benchmarks.step.inputs import caption_lengths, make_batch, negatives, pad
from mvlm_benchmarks.step.shared_weights import SharedWeights

MICRO = MaskVLMConfig(
    image_size=32, patch_size=8, mask_block=16, width=16, heads=2, image_layers=2, text_layers=2, cross_layers=2,
    decoder_layers=2, vocab_size=300, mask_token_id=4, text_length=12, itc_width=8, image_mean=(0.5, 0.4, 0.3),
    image_std=(0.5, 0.25, 0.2),
)  # fmt: skip
LENGTHS = np.array([7, 6, 12, 8, 9])


@pytest.fixture(scope="module")
def model() -> MaskVLM:
    """In float64, every parameter, norms and biases too, drawn wide enough to matter."""
    found = MaskVLM(MICRO).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in found.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if name != "log_scale":
                parameter.copy_(1 + 0.2 * noise if ".norm" in name and name.endswith("weight") else 0.3 * noise)
    return found


@pytest.mark.parametrize("cross", ["roberta", "decoder-layer"])
def test_losses_and_gradients_are_ours(model, cross) -> None:
    batch, masks = make_batch(MICRO, LENGTHS)
    theirs = SharedWeights(model).baseline(cross)
    model.zero_grad(set_to_none=True)
    ours = model(batch, masks, seed=3, step=7)
    ours.total.backward()
    found = theirs(pad(MICRO, batch, masks, *negatives(model, batch, 3, 7)))
    found.total.backward()
    for wanted, got in zip(ours[:5], found[:5], strict=True):  # not the accuracies
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)

    # Where a parameter lies in memory says which of ours it is; a fused one holds three.
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


def test_other_negatives_give_another_itm(model) -> None:
    """The losses are compared for the negatives that are fed: other ones are seen."""
    batch, masks = make_batch(MICRO, LENGTHS)
    theirs = SharedWeights(model).baseline("roberta")
    texts, images = negatives(model, batch, 3, 7)
    assert (texts != torch.arange(5)).all()
    assert (images != torch.arange(5)).all()
    with torch.no_grad():
        one, two = (theirs(pad(MICRO, batch, masks, texts.roll(n), images)) for n in (0, 1))
    assert one.itm != two.itm
    assert one[:3] == two[:3]


@pytest.mark.parametrize("stack", ["text_cross", "image_cross", "decoder"])
def test_a_causal_baseline_is_refused(stack) -> None:
    model = Baseline(MICRO, "roberta")
    check_bidirectional(model)
    getattr(model, stack).layers[0].attention.self.is_causal = True
    getattr(model, stack).layers[1].attention.self.is_causal = True
    with pytest.raises(AssertionError, match="is causal: its first row does not see the last"):
        check_bidirectional(model)


def test_caption_lengths_follow_the_contract() -> None:
    found = caption_lengths(20_000, longest=40, mean=40 / 3)
    assert (found.min(), found.max()) == (6, 40)
    # Gamma(4) with mean 40/3 has variance mean^2 / 4; the clamp moves the mean by little.
    assert abs(found.mean() - 40 / 3) < 0.2
    assert abs(found.std() - 40 / 6) < 0.4
    assert (caption_lengths(8, 24, 8, seed=1) == caption_lengths(8, 24, 8, seed=1)).all()


def test_a_batch_is_what_the_loader_gives() -> None:
    batch, masks = make_batch(MICRO, LENGTHS)
    assert batch.cu_seqlens.tolist() == [0, 7, 13, 25, 33, 42]
    assert batch.max_length == 12
    padded = pad(MICRO, batch, masks, torch.zeros(5), torch.zeros(5))
    assert padded.attention_mask.sum(1).tolist() == LENGTHS.tolist()
    assert (padded.ids[:, 0] == 0).all()
    assert (padded.ids == 1).sum() == (padded.attention_mask == 0).sum()
    hidden = padded.masked_ids == MICRO.mask_token_id
    assert (hidden == (padded.labels >= 0)).all()
    assert hidden.sum(1).tolist() == [max(1, round(0.3 * (n - 2))) for n in LENGTHS]
    assert (padded.labels[hidden] == padded.ids[hidden]).all()
    assert (padded.masked_patches.sum(1) == masks.patch_ids.shape[1]).all()
