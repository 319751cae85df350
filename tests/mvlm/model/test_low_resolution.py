"""Steps on images of a lower resolution than the model's: timm's interpolation of positions is the oracle."""

from dataclasses import replace

import pytest
import torch
from timm.layers.pos_embed import resample_abs_pos_embed

from support.models import micro_batch, micro_model

from .test_fast import assert_implementations_agree, losses_and_gradients

SIDE = 64
LOW = 32


def low_batch(model):
    return micro_batch(config=replace(model.config, image_size=LOW))


@pytest.mark.parametrize("side", [1, 2, 3, 4, 5, 8])
def test_positions_and_their_gradient_are_those_of_timm(side):
    encoder = micro_model(image_size=SIDE).image_encoder
    slope = torch.randn(1 + side**2, encoder.position.shape[1], dtype=torch.float64)
    theirs = encoder.position.detach().clone().requires_grad_()
    wanted = resample_abs_pos_embed(theirs[None], [side, side])[0].double()
    (wanted * slope).sum().backward()
    found = encoder.positions(side**2)
    (found * slope).sum().backward()
    # timm interpolates in float32
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
    torch.testing.assert_close(encoder.position.grad, theirs.grad, rtol=0, atol=1e-5)


def test_positions_stay_in_float32_under_autocast():
    encoder = micro_model(dtype=torch.float32, image_size=SIDE).image_encoder
    wanted = encoder.positions(4)
    with torch.autocast("cpu", torch.bfloat16):
        assert encoder.positions(4).equal(wanted)


@pytest.mark.slow
@pytest.mark.parametrize(
    "drop_masked, partner, positions",
    [(False, 0.0, False), (True, 0.0, False), (False, 0.25, False), (True, 0.0, True)],
)
def test_implementations_agree_on_images_of_low_resolution(drop_masked, partner, positions):
    model = micro_model(
        image_size=SIDE, drop_masked=drop_masked, partner_image_mask_ratio=partner, output_positions=positions
    )
    batch, masks = low_batch(model)
    if partner:
        masks = replace(masks, partner_patch_ids=masks.patch_ids[:, :1])
    assert_implementations_agree(model, batch, masks)


@pytest.mark.slow
@pytest.mark.parametrize("output_positions", [False, True])
@pytest.mark.parametrize("plan", ["plain", "fast"])
def test_a_step_is_that_of_a_model_of_the_low_resolution(plan, output_positions):
    """The other model has the same weights, and positions interpolated by timm."""
    model = micro_model(image_size=SIDE, output_positions=output_positions)
    other = micro_model(image_size=LOW, output_positions=output_positions)
    tensors = dict(model.state_dict())
    tensors["image_encoder.position"] = resample_abs_pos_embed(tensors["image_encoder.position"][None], [4, 4])[0]
    other.load_state_dict(tensors)
    batch, masks = low_batch(model)
    found, gradients = losses_and_gradients(model, batch, masks, plan)
    wanted, other_gradients = losses_and_gradients(other, batch, masks, plan)
    for name, a, b in zip(wanted._fields, found, wanted, strict=True):
        assert float(a) == pytest.approx(float(b), abs=1e-5), name
    for name, gradient in other_gradients.items():
        if name != "image_encoder.position":
            torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-4, msg=name)


def test_a_model_trains_at_a_resolution_that_it_was_asked_at_in_inference_mode():
    encoder = micro_model(image_size=SIDE).image_encoder
    with torch.inference_mode():
        encoder.positions(4)
    encoder.positions(4).sum().backward()
    assert encoder.position.grad is not None


def test_positions_of_another_resolution_have_the_modules_precision():
    """Weights of the interpolation that were made in float32 are not used in float64."""
    wide = micro_model(image_size=SIDE).image_encoder
    wanted = wide.positions(4)
    narrow = micro_model(dtype=torch.float32, image_size=SIDE).image_encoder
    narrow.positions(4)
    narrow.double().load_state_dict(wide.state_dict())
    assert narrow.positions(4).equal(wanted)
