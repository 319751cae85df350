"""The fast implementation against the plain one on the same weights."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from mvlm.model import plain
from mvlm.model.encoders import masked_patches, patchify, unpatchify
from mvlm.model.fast import encode_masked
from mvlm.model.maskvlm import IMPLEMENTATIONS, MaskVLM
from mvlm.model.packing import pad_to_bucket
from mvlm_dataloading import Batch, Masks
from mvlm_kernels import dispatch, use_backend
from support.models import micro_batch, micro_model, weighted


def configurations(number: int):
    """Random cases: number, sizes of the model, lengths of captions, and whether pairs share images and captions."""
    rng = np.random.default_rng(20261124)
    for case in range(number):
        sizes = {
            "image_size": 16 * int(rng.integers(2, 4)),
            "width": 4 * int(rng.integers(1, 5)),
            "heads": int(rng.choice([1, 2, 4])),
            "image_layers": int(rng.integers(1, 3)),
            "text_layers": int(rng.integers(1, 3)),
            "cross_layers": int(rng.integers(1, 4)),
            "decoder_layers": int(rng.integers(1, 3)),
            "cross_norm": str(rng.choice(["post", "pre"])),
            "drop_masked": bool(rng.random() < 0.2),
            "output_positions": case % 3 == 1,
        }
        pairs = [1, 17][case] if case < 2 else int(rng.integers(1, 18))
        lengths = tuple(int(n) for n in rng.integers(3, 13, pairs))
        yield case, sizes, lengths, float(rng.random()) < 0.3


def with_duplicates(batch: Batch) -> Batch:
    """Every second pair has the first pair's image_id, every third its text_id."""
    image_id, text_id = batch.image_id.clone(), batch.text_id.clone()
    image_id[::2], text_id[::3] = image_id[0], text_id[0]
    return replace(batch, image_id=image_id, text_id=text_id)


def losses_and_gradients(model: MaskVLM, batch: Batch, masks: Masks, plan, **options):
    model.zero_grad(set_to_none=True)
    losses = model(batch, masks, seed=3, step=5, plan=plan, **options)
    losses.total.backward()
    return losses.detach(), {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in model.named_parameters()
    }


def assert_implementations_agree(
    model: MaskVLM, batch: Batch, masks: Masks, fast_inputs=None, ties=(), **options
) -> None:
    """`ties` are accuracies that rounding decides."""
    plain_losses, wanted = losses_and_gradients(model, batch, masks, "plain", **options)
    fast_batch, fast_masks = fast_inputs or (batch, masks)
    fast_losses, found = losses_and_gradients(model, fast_batch, fast_masks, "fast", **options)
    assert fast_losses.keys() == plain_losses.keys()
    for name, a in plain_losses.items():
        assert name in ties or abs(a - fast_losses[name]) <= 1e-12 * max(1, abs(float(a))), name
    largest = max(g.norm() for g in wanted.values())
    for name, g in wanted.items():
        assert (found[name] - g).abs().max() <= 1e-12 * largest, name


@pytest.mark.parametrize(
    "case, sizes, lengths, duplicates",
    [pytest.param(*c, marks=[pytest.mark.slow] if c[0] >= 8 else []) for c in configurations(24)],
)
def test_implementations_agree(case, sizes, lengths, duplicates):
    model = micro_model(seed=case, **sizes)
    batch, masks = micro_batch(lengths, seed=case, config=model.config)
    assert_implementations_agree(model, with_duplicates(batch) if duplicates else batch, masks)


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=pytest.mark.extended)])
def test_implementations_agree_on_images_without_a_visible_patch(backend):
    """`drop_masked` then encodes [CLS] alone, so all images are the same to ITC."""
    model = micro_model(drop_masked=True, image_mask_ratio=1.0)
    batch, masks = micro_batch(config=model.config)
    every = torch.arange(model.config.num_patches).expand(len(batch.images), -1).contiguous()
    with use_backend(backend):
        assert_implementations_agree(model, batch, replace(masks, patch_ids=every), ties=["itc_accuracy"])


EVERY = (1, 1, 1, 1)
SOME = [(0, 0, 1, 0), (0, 0, 1, 1), (1, 0, 1, 1), (0, 1, 1, 1), (1, 0, 0, 0), (1, 1, 0, 0), (0.5, 2, 0.25, 3)]
PARTNERS = {"image_mask_ratio": 0.5, "mask_partner": True}
SIGMOID = {"contrastive": "sigmoid"}
MASKED = {"contrast_masked": True}
NORMALIZED, SQUARED = {"mim_target": "normalized"}, {"mim_loss": "mse"}
ROWS = {"mim_rows": "masked"}
TOWER = {"image_tower": "timm:test_vit2", "image_size": 64, "patch_size": 16, "mask_block": 32, "width": 68, "heads": 2}


@pytest.mark.parametrize(
    "changes, weights, how",
    [
        *(({}, weights, "") for weights in SOME),
        *((PARTNERS, weights, "padded") for weights in (EVERY, *SOME[2:4])),
        *((PARTNERS | {"drop_masked": True}, weights, "") for weights in (EVERY, *SOME[2:4])),
        *(({"drop_masked": drop}, EVERY, "padded") for drop in (False, True)),
        *((changes, EVERY, "duplicates") for changes in (SIGMOID, MASKED | SIGMOID)),
        *((MASKED | {"drop_masked": True}, weights, "") for weights in (EVERY, SOME[1])),
        *((NORMALIZED, weights, "") for weights in (EVERY, SOME[6])),
        *((SQUARED | changes, SOME[6], "padded") for changes in ({}, ROWS, NORMALIZED)),
        *((ROWS | changes, EVERY, "padded") for changes in ({}, {"cross_norm": "pre"}, PARTNERS, TOWER)),
        *((changes | {"mim_share": 0.3}, EVERY, "") for changes in ({}, ROWS, ROWS | {"drop_masked": True})),
        *((ROWS | {"drop_masked": True} | changes, EVERY, "") for changes in (NORMALIZED, PARTNERS)),
        (TOWER, EVERY, ""),
        (TOWER | PARTNERS | {"output_positions": True}, EVERY, "padded"),
    ],
    ids=str,
)
def test_implementations_agree_on_objectives_masks_and_padding(changes, weights, how):
    model = micro_model(**changes)
    batch, masks = micro_batch((7, 4, 12, 3, 9, 12), config=model.config)
    batch = with_duplicates(batch) if "duplicates" in how else batch
    inputs = pad_to_bucket(batch, masks, model.config.text_length) if "padded" in how else (batch, masks)
    assert (len(inputs[0].tokens) > len(batch.tokens)) == ("padded" in how)
    assert_implementations_agree(model, batch, masks, fast_inputs=inputs, objectives=weighted(*weights))


@pytest.mark.parametrize(
    "changes, trained",
    [(SIGMOID, {"logit_bias"}), (MASKED, set())],
)
def test_newer_objectives_change_their_loss_alone(changes, trained):
    batch, masks = micro_batch()
    paper, _ = losses_and_gradients(micro_model(), batch, masks, "fast")
    found, gradients = losses_and_gradients(micro_model(**changes), batch, masks, "fast")
    assert [n for n in ("mlm", "mim", "itc") if abs(getattr(found, n) - getattr(paper, n)) > 1e-3] == ["itc"]
    assert all(gradients[name].abs().max() > 1e-6 for name in trained)


@pytest.mark.extended
@pytest.mark.slow
def test_the_compiled_fast_step_is_one_graph_and_gives_the_same():
    """`fullgraph` raises at a graph break, such as a copy from the device to the host."""
    model = micro_model(image_layers=1, text_layers=1, cross_layers=2, decoder_layers=1)
    batch, masks = micro_batch(config=model.config)
    padded = pad_to_bucket(batch, masks, model.config.text_length)
    wanted, wanted_gradients = losses_and_gradients(model, batch, masks, "plain")
    compiled = torch.compile(
        lambda *args: model(
            *args, seed=3, step=5, plan="fast", own_loss=lambda x: 0.0 * (x.image.sum() + x.text.sum())
        ),
        fullgraph=True,
        backend="aot_eager",
    )
    model.zero_grad(set_to_none=True)
    losses = compiled(*padded)
    losses.total.backward()
    assert losses.pop("own") == 0
    torch.testing.assert_close(losses, wanted, rtol=0, atol=1e-12)
    largest = max(g.norm() for g in wanted_gradients.values())
    for name, p in model.named_parameters():
        assert p.grad is not None
        assert (p.grad - wanted_gradients[name]).abs().max() <= 1e-12 * largest, name


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=[pytest.mark.extended, pytest.mark.slow])])
def test_the_fast_step_in_fp32_gives_the_same(backend, monkeypatch):
    """Forward and backward of every op of a step, on interpreted kernels too, which it then uses."""
    launched, launch = set(), dispatch.launch
    monkeypatch.setattr(
        dispatch,
        "launch",
        lambda kernel, *args, **meta: launched.add(kernel.fn.__name__) or launch(kernel, *args, **meta),
    )
    sizes = {"image_size": 48, "patch_size": 4, "image_layers": 1, "text_layers": 1, "decoder_layers": 1}
    model = micro_model(width=32, heads=1, dtype=torch.float32, **sizes)
    batch, masks = micro_batch((7, 4), config=model.config)  # 145 rows per image: only text is the short side
    wanted, wanted_gradients = losses_and_gradients(model, batch, masks, "plain")
    model.set_attention("sdpa", "triton" if backend == "triton" else "auto")
    with use_backend(backend):
        losses, gradients = losses_and_gradients(model, batch, masks, "fast")
    torch.testing.assert_close(losses, wanted, rtol=1e-5, atol=1e-5)
    largest = max(g.norm() for g in wanted_gradients.values())
    for name, g in wanted_gradients.items():
        assert (gradients[name] - g).abs().max() <= 1e-5 * largest, name
    attention = {"short_kv_forward", "short_kv_backward", "short_q_forward", "short_q_backward", "short_q_backward_dq",
                 "long_kv_backward"}  # fmt: skip
    rows = {"gather_kernel", "place_kernel", "place_backward_kernel", "add_norm_kernel", "add_norm_backward_kernel",
            "gelu_kernel", "gelu_backward_kernel", "stack_rows_kernel", "column_sum_kernel", "sum_kernel"}  # fmt: skip
    losses_of = {"loss_kernel", "scale_slope_kernel"}
    assert launched == (attention | rows | losses_of if backend == "triton" else set())


@pytest.mark.slow
def test_the_fast_step_in_bf16_is_as_exact_as_the_plain_one():
    """Distance from fp32, of the losses and of all gradients together."""
    model = micro_model(width=32, heads=2, dtype=torch.float32)
    batch, masks = micro_batch((7, 4, 12, 3, 9, 5, 8, 6), config=model.config)
    exact, exact_gradients = losses_and_gradients(model, batch, masks, "plain")
    errors = {}
    for plan in ("plain", "fast"):
        with torch.autocast("cpu", torch.bfloat16):
            losses, gradients = losses_and_gradients(model, batch, masks, plan)
        difference = sum((gradients[name] - g).square().sum() for name, g in exact_gradients.items())
        size = sum(g.square().sum() for g in exact_gradients.values())
        errors[plan] = (abs(losses.total - exact.total), float(difference / size) ** 0.5)
    assert errors["fast"][1] <= 1.25 * errors["plain"][1]
    assert errors["fast"][0] <= errors["plain"][0] + 0.02 * exact.total


@pytest.mark.parametrize("drop_masked", [False, True])
@torch.no_grad()
def test_masked_images_are_encoded_in_evaluations_as_in_training(drop_masked):
    model = micro_model(drop_masked=drop_masked)
    batch, masks = micro_batch(config=model.config)
    wanted = plain.encode(model, batch, masks).masked_image
    assert wanted is not None
    assert (encode_masked(model, batch, masks)[0] - wanted).abs().max() < 1e-12


@pytest.mark.parametrize("plan", IMPLEMENTATIONS)
@torch.no_grad()
def test_unmasked_inputs_are_encoded_alike_with_or_without_masked_ones(plan):
    model, (batch, masks) = micro_model(), micro_batch()
    streams = IMPLEMENTATIONS[plan].encode(model, batch, masks)
    image, text = IMPLEMENTATIONS[plan].encode_unmasked(model, batch)
    torch.testing.assert_close((image, text.rows), (streams.image, streams.text.rows), rtol=0, atol=1e-12)


@pytest.mark.parametrize("plan", IMPLEMENTATIONS)
@torch.no_grad()
def test_no_loss_reads_a_dropped_patch_but_as_the_pixels_to_rebuild(plan):
    model = micro_model(drop_masked=True)
    batch, masks = micro_batch(config=model.config)
    hidden = masked_patches(masks.patch_ids, model.config.num_patches).unsqueeze(-1)
    patches = patchify(batch.images, model.config.patch_size)
    changed = unpatchify(torch.where(hidden, 255 - patches, patches), model.config.patch_size)
    before, after = (model(replace(batch, images=x), masks, plan=plan) for x in (batch.images, changed))
    assert after.mim != before.mim
    torch.testing.assert_close(dict(after, mim=before.mim, total=before.total), dict(before), rtol=0, atol=0)


@torch.no_grad()
def test_masked_captions_are_contrasted_as_captions_of_their_tokens():
    model, (batch, masks) = micro_model(contrast_masked=True), micro_batch()
    hidden = batch.tokens.index_fill(0, masks.token_ids, model.config.mask_token_id)
    usual = micro_model()
    of_captions, of_hidden = (usual(replace(batch, tokens=tokens), masks).itc for tokens in (batch.tokens, hidden))
    assert abs(model(batch, masks).itc - (of_captions + of_hidden) / 2) < 1e-12
