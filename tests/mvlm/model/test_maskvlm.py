"""The four losses of a batch against the method in numpy float64, and their gradients."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from mvlm.config.model import MaskVLMConfig
from mvlm.device import autocast
from mvlm.model.maskvlm import Features, MaskVLM
from mvlm.model.packing import pad_to_bucket
from mvlm_dataloading import Batch
from support.models import micro_batch, micro_model, weighted
from support.reference import Reference, unit

NAMES = ("mlm", "mim", "itc", "itm")


def with_true_matches(batch: Batch) -> Batch:
    """Rows 0 and 2 share an image, rows 1 and 4 a caption: neither pair may be drawn as a negative."""
    image_id, text_id = batch.image_id.clone(), batch.text_id.clone()
    image_id[2], text_id[4] = image_id[0], text_id[1]
    return replace(batch, image_id=image_id, text_id=text_id)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"cross_norm": "pre"},
        {"mim_target": "normalized"},
        {"mim_loss": "mse"},
        {"mim_loss": "mse", "mim_target": "normalized"},
        {"mim_rows": "masked"},
        {"mim_rows": "masked", "cross_norm": "pre"},
        {"mim_share": 0.5},
        {"mim_share": 0.5, "mim_rows": "masked", "mim_loss": "mse"},
    ],
    ids=str,
)
def test_the_four_losses_against_the_method_in_numpy(changes):
    model = micro_model(**changes)
    batch, masks = micro_batch()
    batch = with_true_matches(batch)
    for step in (0, 1, 2):
        found = model(batch, masks, seed=3, step=step)
        wanted = Reference(model).losses(batch, masks, 3, step)
        for name, value in wanted.items():
            assert getattr(found, name).dtype == torch.float64
            assert getattr(found, name).item() == pytest.approx(value, abs=1e-9), name
        assert found.total.item() == pytest.approx(sum(wanted.values()), abs=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["one pair", "equal captions", "one image"])
def test_without_admissible_negatives_the_matching_loss_is_of_true_pairs(case):
    """Everything stays finite."""
    model = micro_model()
    batch, masks = micro_batch((6,) if case == "one pair" else (6, 4, 9))
    if case == "equal captions":
        batch = replace(batch, text_id=torch.full_like(batch.text_id, 7))
    if case == "one image":
        batch = replace(batch, image_id=torch.full_like(batch.image_id, 7))
    losses = model(batch, masks)
    losses.total.backward()
    assert all(torch.isfinite(x) for x in losses.values())
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    reference = Reference(model)
    starts = batch.cu_seqlens.tolist()
    positives = [
        reference.matching(
            reference.image(batch.images[i].numpy()),
            reference.text(batch.tokens[starts[i] : starts[i + 1]].tolist()),
            1,
        )
        for i in range(len(batch.images))
    ]
    assert losses.itm.item() == pytest.approx(np.mean(positives), abs=1e-9)
    if case == "one pair":
        assert losses.itc.item() == 0


@pytest.mark.parametrize("plan", ["plain", "fast"])
def test_patch_statistics_learn_alone_by_absolute_error(plan):
    model = micro_model(mim_target="normalized")
    batch, masks = micro_batch()
    features = []
    model.pixel_head.register_forward_pre_hook(lambda _, given: features.append(given[0].detach().numpy()))
    model(batch, masks, plan=plan, objectives=weighted(0, 1, 0, 0)).total.backward()
    layer = model.pixel_head.statistics
    assert layer is not None
    weight, bias, wanted = layer.weight.detach().numpy(), layer.bias.detach().numpy(), np.zeros((2, 16))
    reference, of_bias = Reference(model), np.zeros(2)
    for b, ids in enumerate(masks.patch_ids.tolist()):
        patches = reference.patches(batch.images[b].numpy())
        for k, p in enumerate(ids):
            x, deviation = features[0][b, k], np.sqrt(patches[p].var(ddof=1) + 1e-6)
            sign = np.sign(weight @ x + bias - [patches[p].mean(), deviation]) / (2 * masks.patch_ids.numel())
            wanted += sign[:, None] * x
            of_bias += sign
    for parameter, gradient in ((layer.weight, wanted), (layer.bias, of_bias)):
        torch.testing.assert_close(parameter.grad, torch.from_numpy(gradient), rtol=0, atol=1e-12)
    before = {name: p.grad for name, p in model.named_parameters() if "statistics" not in name}
    model.zero_grad()
    model.pixel_head.statistics_gradient = lambda x, pixels: x.new_zeros(())
    model(batch, masks, plan=plan, objectives=weighted(0, 1, 0, 0)).total.backward()
    for name, p in model.named_parameters():
        if "statistics" not in name:
            torch.testing.assert_close(before[name], p.grad, rtol=0, atol=0)


HEADS = ("image_projection", "text_projection", "matching_head", "log_scale")
PIXELS = ("image_decoder", "pixel_head", "image_encoder.mask_token")


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["plain", "fast"])
@pytest.mark.parametrize(
    "weights, unused",
    [
        ((0, 0, 1, 0), ("image_cross", "text_cross", "language_head", "matching_head", *PIXELS)),
        ((0, 0, 1, 1), ("language_head", *PIXELS)),
        ((1, 0, 0, 0), ("image_cross", *PIXELS, *HEADS)),
        ((0, 1, 0, 0), ("text_cross", "language_head", *HEADS)),
    ],
)
def test_an_objective_of_weight_0_is_not_computed(weights, unused, plan):
    model = micro_model()
    losses = model(*micro_batch(), objectives=weighted(*weights), plan=plan)
    losses.total.backward()
    for name, weight in zip(NAMES, weights, strict=True):
        assert (getattr(losses, name).item() == 0) == (weight == 0), name
    for name, parameter in model.named_parameters():
        if name.endswith("key.bias"):  # softmax cancels it
            continue
        seen = parameter.grad is not None and bool(parameter.grad.any())
        assert seen != name.startswith(unused), name


def test_the_total_is_the_weighted_sum_of_the_losses():
    model, objectives = micro_model(), weighted(0.5, 2.0, 0.25, 3.0)
    found, alone = model(*micro_batch(), objectives=objectives), model(*micro_batch())
    wanted = 0.5 * alone.mlm.item() + 2 * alone.mim.item() + alone.itc.item() / 4 + 3 * alone.itm.item()
    assert found.total.item() == pytest.approx(wanted, abs=1e-12)
    assert [found[name].item() for name in NAMES] == [alone[name].item() for name in NAMES]


@pytest.mark.parametrize("plan", ["plain", "fast"])
def test_a_loss_of_ones_own_gets_the_embeddings_and_is_added_to_the_total(plan):
    model, inputs = micro_model(), micro_batch()
    seen = []

    def own_loss(features: Features) -> torch.Tensor:
        assert features.image is not None
        assert features.text is not None
        seen.append(features)
        return 3 * (features.image[0] @ features.text[1])

    alone, found = model(*inputs, plan=plan), model(*inputs, plan=plan, own_loss=own_loss)
    reference, starts = Reference(model), inputs[0].cu_seqlens.tolist()
    image = reference.image(inputs[0].images[0].numpy())
    text = reference.text(inputs[0].tokens[starts[1] : starts[2]].tolist())
    image_embedding, text_embedding = (
        unit(reference.linear(name, x[0])) for name, x in (("image_projection", image), ("text_projection", text))
    )
    wanted = 3 * image_embedding @ text_embedding
    assert found.total.item() == pytest.approx(alone.total.item() + wanted, abs=1e-9)
    assert [found[name].item() for name in NAMES] == [alone[name].item() for name in NAMES]
    np.testing.assert_allclose(seen[0].streams.image[0].detach(), image, atol=1e-9)
    assert (
        model(*inputs, plan=plan, objectives=weighted(1, 0, 0, 0), own_loss=lambda x: 2 * (x.image is None)).total > 2
    )


def test_losses_are_single_precision_under_autocast():
    model = micro_model(dtype=torch.float32)
    batch, masks = micro_batch()
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(batch, masks)
    assert {x.dtype for x in losses.values()} == {torch.float32}
    exact = model(batch, masks)
    # bf16 has eight significant bits, which move a loss by a per cent or two.
    for name in ("mlm", "mim", "itc"):
        assert getattr(losses, name).item() == pytest.approx(getattr(exact, name).item(), rel=0.03)


@pytest.mark.parametrize("changes", [{"patch_size": 4}, {"image_mask_ratio": 0.25}])
def test_masks_of_another_configuration_are_refused_in_training(changes):
    batch, masks = micro_batch()  # 8 of 16 patches
    model = micro_model(**changes)
    for plan in ("plain", "fast"):
        with pytest.raises(ValueError, match=r"masks\.patch_ids"):
            model(batch, masks, plan=plan)
    if "patch_size" not in changes:
        assert model.eval()(batch, masks).total.isfinite()  # an evaluation chooses its masks


@pytest.mark.parametrize("plan, padded", [("plain", False), ("fast", False), ("fast", True)])
def test_captions_above_the_text_length_are_refused(plan, padded):
    message = re.escape("wanted (T,), (B+1,) and at most 8, got ")
    model, inputs = micro_model(text_length=8), micro_batch((7, 12, 4))
    with pytest.raises(ValueError, match=message):
        model(*(pad_to_bucket(*inputs, 8) if padded else inputs), plan=plan)
    short = micro_batch((7, 8, 4))
    found = model(*pad_to_bucket(*short, 8), plan="fast").total
    torch.testing.assert_close(found, model(*short).total, rtol=1e-12, atol=0)


@pytest.mark.extended
@pytest.mark.slow
def test_gradients_at_the_size_of_the_demo_are_equal_bit_for_bit():
    """Rows that ITM reads more than once add up their gradients in a fixed order, also on two threads.

    torch splits work over threads only from some size on, so a micro model would prove nothing.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        config = MaskVLMConfig.preset("tiny")
        torch.manual_seed(0)
        model = MaskVLM(config)
        batch, masks = micro_batch(lengths=tuple(4 + i % 9 for i in range(64)), config=config)
        runs = []
        for _ in range(4):
            model.zero_grad(set_to_none=True)
            with autocast(torch.device("cpu")):  # as training does here
                model(batch, masks).total.backward()
            runs.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    finally:
        torch.set_num_threads(threads)
    for again in runs[1:]:
        assert [name for name in runs[0] if not torch.equal(runs[0][name], again[name])] == []
