"""The network: functions of its weights, initial weights, and errors for wrong shapes."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mvlm.model.encoders import ImageEncoder, TextEncoder
from mvlm.model.maskvlm import MaskVLM
from support.models import micro_batch, micro_config, micro_model
from support.reference import Reference, gelu


@pytest.mark.parametrize("cross_norm", ["post", "pre"])
def test_fill_mask_predicts_any_packed_position(cross_norm):
    """Positions may be in any order, and may be the first or last of a caption."""
    model = micro_model(cross_norm=cross_norm)
    reference = Reference(model)
    batch, _ = micro_batch()
    positions = torch.randperm(len(batch.tokens), generator=torch.Generator().manual_seed(0))
    v = model.encode_image(batch.images)
    w, key_mask = model.encode_text(batch.tokens, batch.cu_seqlens, batch.max_length)
    found = model.fill_mask(v, w, key_mask, batch.cu_seqlens, positions).detach().numpy()
    starts = batch.cu_seqlens.tolist()
    for row, (start, end) in enumerate(itertools.pairwise(starts)):
        text = reference.text(batch.tokens[start:end].tolist())
        x = reference.cross("text_cross", model.config.cross_layers, text, reference.image(batch.images[row].numpy()))
        y = reference.norm("language_head.norm", gelu(reference.linear("language_head.dense", x)))
        wanted = reference.linear("language_head.vocabulary", y)
        for number, position in enumerate(positions.tolist()):
            if start <= position < end:
                np.testing.assert_allclose(found[number], wanted[position - start], atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_matching_logits_are_single_precision_under_autocast(dtype):
    """Equal to the bit to those of the same features in fp32."""
    model = micro_model(dtype=torch.float32)
    image, text = torch.randn(2, 5, model.config.width, generator=torch.Generator().manual_seed(0)).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        found = model.matching_logits(image, text)
    assert found.dtype == torch.float32
    assert torch.equal(found, model.matching_head(image.float() * text.float()))


@pytest.mark.parametrize("initialization", ["normal", "xavier"])
def test_initial_weights_have_the_configured_distribution(initialization):
    torch.manual_seed(0)
    config = micro_config(width=64, heads=1, initialization=initialization)
    model = MaskVLM(config)
    assert model.log_scale.item() == pytest.approx(math.log(1 / 0.07), abs=1e-6)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.LayerNorm):
            assert (module.weight == 1).all(), name
            assert (module.bias == 0).all(), name
        if isinstance(module, torch.nn.Linear):
            assert (module.bias == 0).all(), name
            pixels = name.startswith(("image_cross.", "image_decoder.", "pixel_head"))
            xavier = initialization == "xavier" and not pixels
            # Xavier's uniform distribution has the variance 2 / (inputs + outputs).
            wanted = math.sqrt(2 / (module.in_features + module.out_features)) if xavier else 0.02
            deviations = 4 / math.sqrt(2 * module.weight.numel())  # four standard errors of a standard deviation
            assert module.weight.std().item() == pytest.approx(wanted, rel=deviations), name
    image, text = model.image_encoder, model.text_encoder
    assert isinstance(image, ImageEncoder)
    assert isinstance(text, TextEncoder)
    for tensor in (image.mask_token, image.cls_token, image.position, text.position, text.words.weight):
        deviations = 4 / math.sqrt(2 * tensor.numel())
        assert tensor.std().item() == pytest.approx(0.02, rel=deviations)


def test_errors_name_the_wrong_shape():
    model = micro_model()
    with pytest.raises(ValueError, match=r"images: wanted \(B, 3, 32, 32\), got \(2, 3, 32, 16\)"):
        model.encode_image(torch.zeros(2, 3, 32, 16))
    with pytest.raises(ValueError, match=r"images: wanted \(B, 3, 32, 32\), got \(3, 32, 32\)"):
        model.encode_image(torch.zeros(3, 32, 32))
    for tokens, starts, longest in (((2, 13), (3,), 12), ((5,), (1, 2), 5), ((13,), (2,), 13), ((5,), (2,), 0)):
        with pytest.raises(
            ValueError, match=r"tokens, cu_seqlens, max_length: wanted \(T,\), \(B\+1,\) and at most 12"
        ):
            model.encode_text(torch.zeros(tokens, dtype=torch.int64), torch.zeros(starts, dtype=torch.int32), longest)


AT = [{}, {"drop_masked": True}, {"mim_rows": "masked", "mim_share": 0.5}, {"output_positions": True}]


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["plain", "fast"])
@pytest.mark.parametrize("changes", AT, ids=str)
@pytest.mark.parametrize("side, ratio", [(48, 0.4), (16, 0.6)])
def test_images_of_another_side_are_those_of_a_resized_model(side, ratio, changes, plan):
    """Losses and gradients of a model of that side whose positions torch interpolated from the parameters."""
    model = micro_model(**changes)
    other = micro_model(image_size=side, image_mask_ratio=ratio, **changes)
    encoder, other_encoder = model.image_encoder, other.image_encoder
    assert isinstance(encoder, ImageEncoder)
    assert isinstance(other_encoder, ImageEncoder)
    tensors, position = model.state_dict(), encoder.position.detach().clone().requires_grad_()
    square = position[1:].T.reshape(1, -1, 4, 4)
    cells = F.interpolate(square, size=side // 8, mode="bicubic", antialias=True, align_corners=False)
    resized = torch.cat([position[:1], cells.flatten(2)[0].T])
    other.load_state_dict({**tensors, "image_encoder.position": resized.detach()})
    batch, masks = micro_batch(config=other.config)
    before = model.config
    with model.at(other.config):
        losses = model(batch, masks, plan=plan)
        losses.total.backward()
    wanted = other(batch, masks, plan=plan)
    wanted.total.backward()
    for name, loss in wanted.items():
        torch.testing.assert_close(losses[name], loss, rtol=0, atol=1e-6, msg=name)  # the matrix is in fp32
    found = {name: p.grad for name, p in model.named_parameters()}
    (of_position,) = torch.autograd.grad(resized, position, other_encoder.position.grad)
    gradients = {name: p.grad for name, p in other.named_parameters()} | {"image_encoder.position": of_position}
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-6, msg=name)
    assert model.config is before
    assert torch.equal(encoder.positions(), encoder.position)
    with pytest.raises(ValueError, match="wanted"):
        model(batch, masks, plan=plan)
