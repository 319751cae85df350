"""Attention maps and GradCAM, against softmaxes and derivatives by autograd and by differences, in float64."""

import numpy as np
import pytest
import torch

from mvlm.inference.attention_maps import draw_overlay
from mvlm.inference.trained_model import TrainedModel
from mvlm.model.maskvlm import MaskVLM
from support.maps import spans_of, written_out
from support.models import micro_model
from support.scenes import scene

TEXT = "red top left"


# Two heads of 8, as all micro models have; of 32, which the kernels take as it is; and of 144, which they do not take.
@pytest.fixture(scope="module", params=[("post", 16), ("pre", 64), ("pre", 288)], ids=str)
def sharp_model(request, tokenizer) -> TrainedModel:
    norm, width = request.param
    network = micro_model(dtype=torch.float32, cross_norm=norm, cross_layers=3, text_length=40, width=width)
    with torch.no_grad():  # wide layers of large random numbers saturate every softmax
        for parameter in network.parameters():
            parameter.mul_((16 / width) ** 0.5 if parameter.ndim == 2 else 1)
    return TrainedModel(network, tokenizer, "auto")


def match_by_hand(model: TrainedModel, pixels: np.ndarray, text: str):
    """ITM's log-odds and the weights (H, L, M) of each layer, in float64."""
    network, weights = MaskVLM(model.network.config).double(), []
    network.load_state_dict(model.network.state_dict())
    for layer in network.text_cross.layers:
        layer.cross_attention.forward = written_out(weights, layer.cross_attention)
    tokens = torch.from_numpy(model.tokenizer.encode([text], 40)[0])
    v = network.encode_image(torch.from_numpy(pixels).permute(2, 0, 1)[None].double() / 255)
    w, mask = network.encode_text(tokens, torch.tensor([0, len(tokens)]), len(tokens))
    text_row = network.text_cross(w, v, mask)[0, 0]  # of all rows, where the model computes the first of the last layer
    logits = network.matching_head(network.image_cross(v, w, None, mask)[0, 0] * text_row)
    return logits[1] - logits[0], weights


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    return scene(5)[0]


@pytest.mark.slow
def test_weights_are_the_softmax_of_the_plain_model(sharp_model, pixels):
    found = sharp_model.attention(pixels, TEXT)
    log_odds, weights = match_by_hand(sharp_model, pixels, TEXT)
    assert found.words == ["[CLS]", "red", "top", "left"]
    assert found.weights.shape == (3, 2, 4, 4, 4)
    assert found.log_odds == pytest.approx(log_odds.item(), abs=1e-4)
    for layer, (p,) in enumerate(weights):
        rows = torch.stack(
            [p[:, start:stop, 1:].mean(1) for start, stop in spans_of(sharp_model.tokenizer, TEXT)], dim=1
        )  # (H, words, N)
        np.testing.assert_allclose(found.weights[layer].flatten(2).numpy(), rows.detach().numpy(), rtol=0, atol=1e-6)
        rest = p[:, 0, 0].detach().numpy()  # on the image's [CLS]
        np.testing.assert_allclose(1 - found.weights[layer, :, 0].sum((1, 2)).numpy(), rest, rtol=0, atol=1e-6)
    np.testing.assert_allclose(found.maps.numpy(), found.weights.numpy().mean((0, 1)), atol=1e-7)


@pytest.mark.slow
def test_gradcam_is_weight_times_the_positive_derivative_of_the_log_odds(sharp_model, pixels):
    found = sharp_model.attention(pixels, TEXT)
    log_odds, weights = match_by_hand(sharp_model, pixels, TEXT)
    log_odds.backward()
    for layer, p in enumerate(weights):
        assert p.grad is not None
        cam = (p * p.grad.clamp(min=0))[0].mean(0).detach()  # (L, M)
        rows = torch.stack([cam[start:stop, 1:].mean(0) for start, stop in spans_of(sharp_model.tokenizer, TEXT)])
        scale = rows.abs().max().item()
        np.testing.assert_allclose(found.gradcam[layer].flatten(1).numpy(), rows.numpy(), rtol=0, atol=1e-4 * scale)
    assert torch.equal(found.relevance, found.gradcam[1])
    assert (found.gradcam[2, 1:] == 0).all()  # the last layer is read at [CLS] alone
    assert (found.gradcam > 0).any()


@pytest.mark.slow
def test_maps_leave_the_model_as_it_is_and_need_no_parameter_gradients(sharp_model, pixels):
    before = sharp_model.attention(pixels, TEXT)
    assert all(parameter.grad is None for parameter in sharp_model.network.parameters())
    frozen = TrainedModel(sharp_model.network, sharp_model.tokenizer, "bf16")  # maps are in float32 all the same
    try:
        sharp_model.network.requires_grad_(False)
        with torch.no_grad():
            again = frozen.attention(pixels, TEXT)
    finally:
        sharp_model.network.requires_grad_(True)
    assert torch.equal(before.gradcam, again.gradcam)
    assert torch.equal(before.weights, again.weights)


WHITE = np.full((32, 32, 3), 255, np.uint8)


def test_the_hottest_patch_is_red_and_the_coldest_dark():
    heat = torch.full((4, 4), 0.2)
    heat[1, 3], heat[3, 0] = 0.9, 0.1
    drawn = 2 * np.array(draw_overlay(WHITE, heat, side=60)).astype(int) - 255  # half of it is the image
    assert drawn.shape == (60, 60, 3)
    assert np.abs(drawn[22, 52] - (122, 4, 3)).max() <= 4
    assert np.abs(drawn[52, 7] - (48, 18, 59)).max() <= 4
