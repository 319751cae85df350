# Arguments are unpacked from tables of cases, whose types pyright cannot follow.
# pyright: reportIndexIssue=false, reportArgumentType=false
"""The model against the method written out in numpy float64: one picture and one caption at a time, no padding."""

import itertools
import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from mvlm.config.model import MaskVLMConfig
from mvlm.model.maskvlm import MaskVLM
from mvlm.objectives import losses as objectives
from mvlm_dataloading import Batch, Masks
from support.models import micro_batch, micro_config, micro_model, uniform_of_pair

ERF = np.vectorize(math.erf)


class Reference:
    """The formulas of the method on the weights of a model, by their names."""

    def __init__(self, model: MaskVLM) -> None:
        self.config = model.config
        self.weights = {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}

    def linear(self, name: str, x: np.ndarray) -> np.ndarray:
        return x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]

    def norm(self, name: str, x: np.ndarray, eps: float = 1e-5) -> np.ndarray:
        centred = x - x.mean(-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps)
        return scaled * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]

    def mlp(self, name: str, x: np.ndarray) -> np.ndarray:
        return self.linear(f"{name}.down", gelu(self.linear(f"{name}.up", x)))

    def attention(self, name: str, x: np.ndarray, memory: np.ndarray) -> np.ndarray:
        query, key, value = (
            self.linear(f"{name}.{part}", rows) for part, rows in (("query", x), ("key", memory), ("value", memory))
        )
        width = self.config.width // self.config.heads
        heads = []
        for head in range(self.config.heads):
            part = slice(head * width, (head + 1) * width)
            scores = query[:, part] @ key[:, part].T / math.sqrt(width)
            scores = np.exp(scores - scores.max(-1, keepdims=True))
            heads.append(scores / scores.sum(-1, keepdims=True) @ value[:, part])
        return self.linear(f"{name}.out", np.concatenate(heads, -1))

    def patches(self, image: np.ndarray) -> np.ndarray:
        """Normalised pixels (N, 3*P*P) of a picture uint8 (3, S, S)."""
        side, patch = self.config.image_size, self.config.patch_size
        mean, std = (
            np.float32(values).astype(np.float64)[:, None, None]  # the model keeps them in fp32
            for values in (self.config.image_mean, self.config.image_std)
        )
        normal = (image / 255 - mean) / std
        rows = []
        for top in range(0, side, patch):
            for left in range(0, side, patch):
                rows.append(normal[:, top : top + patch, left : left + patch].ravel())
        return np.stack(rows)

    def image(self, image: np.ndarray, masked: list[int] | None = None) -> np.ndarray:
        x = self.linear("image_encoder.patch_projection", self.patches(image))
        for patch in masked or []:
            x[patch] = self.weights["image_encoder.mask_token"]
        x = np.concatenate([self.weights["image_encoder.cls_token"][None], x]) + self.weights["image_encoder.position"]
        for layer in range(self.config.image_layers):
            name = f"image_encoder.blocks.{layer}"
            y = self.norm(f"{name}.norm1", x, 1e-6)
            x = x + self.attention(f"{name}.attention", y, y)
            x = x + self.mlp(f"{name}.mlp", self.norm(f"{name}.norm2", x, 1e-6))
        return self.norm("image_encoder.norm", x, 1e-6)

    def text(self, tokens: list[int]) -> np.ndarray:
        x = self.weights["text_encoder.words.weight"][tokens] + self.weights["text_encoder.position"][: len(tokens)]
        x = self.norm("text_encoder.norm", x)
        for layer in range(self.config.text_layers):
            name = f"text_encoder.blocks.{layer}"
            x = self.norm(f"{name}.norm1", x + self.attention(f"{name}.attention", x, x))
            x = self.norm(f"{name}.norm2", x + self.mlp(f"{name}.mlp", x))
        return x

    def cross(self, stack: str, layers: int, x: np.ndarray, memory: np.ndarray) -> np.ndarray:
        for layer in range(layers):
            name = f"{stack}.blocks.{layer}"
            if self.config.cross_norm == "pre":
                y = self.norm(f"{name}.norm1", x)
                x = x + self.attention(f"{name}.self_attention", y, y)
                x = x + self.attention(f"{name}.cross_attention", self.norm(f"{name}.norm2", x), memory)
                x = x + self.mlp(f"{name}.mlp", self.norm(f"{name}.norm3", x))
            else:
                x = self.norm(f"{name}.norm1", x + self.attention(f"{name}.self_attention", x, x))
                x = self.norm(f"{name}.norm2", x + self.attention(f"{name}.cross_attention", x, memory))
                x = self.norm(f"{name}.norm3", x + self.mlp(f"{name}.mlp", x))
        return self.norm(f"{stack}.norm", x) if self.config.cross_norm == "pre" else x

    def losses(self, batch: Batch, masks: Masks, seed: int, step: int, uniform) -> dict[str, float]:
        config, number = self.config, len(batch.images)
        images, starts = batch.images.numpy(), batch.cu_seqlens.tolist()
        captions = [batch.tokens[a:b].tolist() for a, b in pairwise(starts)]
        hidden = [
            [config.mask_token_id if start + i in masks.token_ids.tolist() else t for i, t in enumerate(caption)]
            for start, caption in zip(starts[:-1], captions, strict=True)
        ]
        v, w = [self.image(image) for image in images], [self.text(caption) for caption in captions]

        nats, errors = [], []
        for b in range(number):
            x = self.cross("text_cross", config.cross_layers, self.text(hidden[b]), v[b])
            for place, (was, token) in enumerate(zip(captions[b], hidden[b], strict=True)):
                if starts[b] + place in masks.token_ids.tolist():
                    assert token == config.mask_token_id
                    y = self.norm("language_head.norm", gelu(self.linear("language_head.dense", x[place])))
                    nats.append(-log_softmax(self.linear("language_head.vocabulary", y))[was])
            masked = masks.patch_ids[b].tolist()
            x = self.cross("image_cross", config.cross_layers, self.image(images[b], masked), w[b])
            x = self.cross("image_decoder", config.decoder_layers, x, w[b])
            pixels, target = self.linear("pixel_head", x[1:]), self.patches(images[b])
            errors += [abs(pixels[p] - target[p]) for p in masked]

        a, t = (
            np.stack([unit(self.linear(name, features[0])) for features in stream])
            for name, stream in (("image_projection", v), ("text_projection", w))
        )
        logits = a @ t.T * np.exp(self.weights["log_scale"])
        itc = -np.mean([log_softmax(logits[i])[i] + log_softmax(logits[:, i])[i] for i in range(number)]) / 2

        terms = [(1.0, self.matching(v[i], w[i], 1)) for i in range(number)]
        for stream, table in ((0, logits), (1, logits.T)):
            for i in range(number):
                scores = {
                    j: table[i, j] - math.log(-math.log(uniform(seed, step, stream, i, j)))
                    for j in range(number)
                    if batch.image_id[i] != batch.image_id[j] and batch.text_id[i] != batch.text_id[j]
                }
                if scores:
                    j = max(scores, key=scores.__getitem__)
                    pair = (v[i], w[j]) if stream == 0 else (v[j], w[i])
                    terms.append((1.0, self.matching(*pair, 0)))
        itm = sum(x * weight for weight, x in terms) / sum(weight for weight, _ in terms)
        return {"mlm": float(np.mean(nats)), "mim": float(np.mean(errors)), "itc": float(itc), "itm": float(itm)}

    def matching(self, v: np.ndarray, w: np.ndarray, label: int) -> float:
        """Cross-entropy of the matching head for one picture and one caption."""
        layers = self.config.cross_layers
        joined = self.cross("image_cross", layers, v, w)[0] * self.cross("text_cross", layers, w, v)[0]
        return -log_softmax(self.linear("matching_head", joined))[label]


def gelu(x: np.ndarray) -> np.ndarray:
    return x / 2 * (1 + ERF(x / math.sqrt(2)))


def log_softmax(x: np.ndarray) -> np.ndarray:
    return x - x.max() - np.log(np.exp(x - x.max()).sum())


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x**2).sum())


def with_true_matches(batch: Batch, replace) -> Batch:
    """Rows 0 and 2 show one picture, rows 1 and 4 have one caption: neither pair may be drawn as a negative."""
    image_id, text_id = batch.image_id.clone(), batch.text_id.clone()
    image_id[2], text_id[4] = image_id[0], text_id[1]
    return replace(batch, image_id=image_id, text_id=text_id)


@pytest.fixture
def replace():
    from dataclasses import replace

    return replace


@pytest.mark.parametrize("cross_norm", ["post", "pre"])
def test_the_four_losses_against_the_method_in_numpy(replace, cross_norm):
    model = micro_model(cross_norm=cross_norm)
    batch, masks = micro_batch()
    batch = with_true_matches(batch, replace)
    for step in (0, 1, 2):
        found = model(batch, masks, seed=3, step=step)
        wanted = Reference(model).losses(batch, masks, 3, step, uniform_of_pair)
        for name, value in wanted.items():
            assert getattr(found, name).dtype == torch.float64
            assert getattr(found, name).item() == pytest.approx(value, abs=1e-9), name
        assert found.total.item() == pytest.approx(sum(wanted.values()), abs=1e-9)


def test_the_negatives_depend_on_seed_and_step():
    model = micro_model()
    batch, masks = micro_batch()
    losses = {(seed, step): model(batch, masks, seed=seed, step=step).itm.item() for seed in (0, 1) for step in (0, 1)}
    assert len(set(losses.values())) > 1
    assert model(batch, masks, seed=1, step=1).itm.item() == losses[1, 1]


def test_reconstruction_alone():
    model = micro_model()
    batch, masks = micro_batch()
    whole, alone = model(batch, masks), model(batch, masks, reconstruction_only=True)
    assert alone.itc.item() == alone.itm.item() == 0
    assert (alone.mlm.item(), alone.mim.item()) == (whole.mlm.item(), whole.mim.item())
    assert alone.total.item() == pytest.approx(whole.mlm.item() + whole.mim.item(), abs=1e-12)
    alone.total.backward()
    unused = ("image_projection", "text_projection", "matching_head", "log_scale")
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == name.startswith(unused), name


@pytest.mark.parametrize("cross_norm", ["post", "pre"])
def test_every_parameter_learns(cross_norm):
    model = micro_model(cross_norm=cross_norm)
    batch, masks = micro_batch()
    model(batch, masks).total.backward()
    for name, parameter in model.named_parameters():
        # softmax does not see what is added to all of its scores
        if not name.endswith("key.bias"):
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 1e-12, name


@pytest.fixture
def predictions(monkeypatch):
    """A function that runs a model on a batch and returns what its two reconstruction losses were given."""

    def run(model: MaskVLM, batch: Batch, masks: Masks) -> dict[str, torch.Tensor]:
        found = {}

        def language(logits, targets):
            found["logits"], found["words"] = logits.detach(), targets
            return logits.sum() * 0

        def image(pred, target):
            found["pixels"], found["target"] = pred.detach(), target
            return pred.sum() * 0

        with monkeypatch.context() as patch:
            patch.setattr(objectives, "masked_language_loss", language)
            patch.setattr(objectives, "masked_image_loss", image)
            model(batch, masks, reconstruction_only=True)
        return found

    return run


def change_pixels(batch: Batch, masks: Masks, replace, *, masked: bool) -> Batch:
    """Other pixels in row 1: under its masked patches, or everywhere else."""
    images = batch.images.clone()
    for patch in range(16):
        if (patch in masks.patch_ids[1].tolist()) == masked:
            top, left = patch // 4 * 8, patch % 4 * 8
            images[1, :, top : top + 8, left : left + 8] = 255 - images[1, :, top : top + 8, left : left + 8]
    return replace(batch, images=images)


def change_words(batch: Batch, masks: Masks, replace, *, masked: bool) -> Batch:
    """Other words in caption 2: its masked ones, or the others."""
    tokens, (start, end) = batch.tokens.clone(), batch.cu_seqlens[2:4].tolist()
    for place in range(start + 1, end - 1):
        if (place in masks.token_ids.tolist()) == masked:
            tokens[place] = 5 + (tokens[place] + 90) % 290
    return replace(batch, tokens=tokens)


def rows_of(batch: Batch, masks: Masks) -> torch.Tensor:
    """The caption of every masked token."""
    return torch.tensor([int((batch.cu_seqlens[1:] <= t).sum()) for t in masks.token_ids])


@pytest.mark.parametrize("cross_norm", ["post", "pre"])
def test_masked_patches_never_see_their_own_pixels(replace, predictions, cross_norm):
    model = micro_model(cross_norm=cross_norm)
    batch, masks = micro_batch()
    before = predictions(model, batch, masks)
    after = predictions(model, change_pixels(batch, masks, replace, masked=True), masks)
    assert torch.equal(after["pixels"], before["pixels"])
    assert (after["target"][1] != before["target"][1]).any(-1).all()
    # What is not masked does matter, to its own picture alone.
    after = predictions(model, change_pixels(batch, masks, replace, masked=False), masks)
    assert torch.equal(after["target"], before["target"])
    for row in range(5):
        assert torch.equal(after["pixels"][row], before["pixels"][row]) == (row != 1)


@pytest.mark.parametrize("cross_norm", ["post", "pre"])
def test_masked_tokens_never_see_themselves(replace, predictions, cross_norm):
    model = micro_model(cross_norm=cross_norm)
    batch, masks = micro_batch()
    before = predictions(model, batch, masks)
    after = predictions(model, change_words(batch, masks, replace, masked=True), masks)
    assert torch.equal(after["logits"], before["logits"])
    changed = after["words"] != before["words"]
    assert changed.tolist() == (rows_of(batch, masks) == 2).tolist()
    after = predictions(model, change_words(batch, masks, replace, masked=False), masks)
    assert torch.equal(after["words"], before["words"])
    for number, row in enumerate(rows_of(batch, masks).tolist()):
        assert torch.equal(after["logits"][number], before["logits"][number]) == (row != 2)


def test_pixels_are_rebuilt_with_the_whole_caption(replace, predictions):
    """One modality is masked at a time: the caption's words matter, which of them are masked does not."""
    model = micro_model()
    batch, masks = micro_batch()
    before = predictions(model, batch, masks)["pixels"]
    for masked in (True, False):
        after = predictions(model, change_words(batch, masks, replace, masked=masked), masks)["pixels"]
        for row in range(5):
            assert torch.equal(after[row], before[row]) == (row != 2)
    others = masks.token_ids.clone()
    others[0] = next(t for t in range(1, 6) if t not in masks.token_ids.tolist())
    assert torch.equal(predictions(model, batch, replace(masks, token_ids=others))["pixels"], before)


def test_words_are_filled_in_with_the_whole_picture(replace, predictions):
    model = micro_model()
    batch, masks = micro_batch()
    before = predictions(model, batch, masks)["logits"]
    for masked in (True, False):
        after = predictions(model, change_pixels(batch, masks, replace, masked=masked), masks)["logits"]
        for number, row in enumerate(rows_of(batch, masks).tolist()):
            assert torch.equal(after[number], before[number]) == (row != 1)
    others = replace(masks, patch_ids=15 - masks.patch_ids.flip(1))
    assert not torch.equal(others.patch_ids, masks.patch_ids)
    assert torch.equal(predictions(model, batch, others)["logits"], before)


def test_targets_are_what_was_hidden(predictions):
    model = micro_model()
    batch, masks = micro_batch()
    found = predictions(model, batch, masks)
    assert found["words"].tolist() == [batch.tokens[t].item() for t in masks.token_ids.tolist()]
    assert found["target"].shape == found["pixels"].shape == (5, 8, 192)
    for row in range(5):
        wanted = Reference(model).patches(batch.images[row].numpy())[masks.patch_ids[row].numpy()]
        np.testing.assert_allclose(found["target"][row].numpy(), wanted, atol=1e-12)


def test_a_row_does_not_depend_on_the_others(predictions):
    """The same pair alone, and in a batch whose longest caption is longer: padding says nothing."""
    model = micro_model()
    batch, masks = micro_batch()
    whole = predictions(model, batch, masks)
    starts = batch.cu_seqlens.tolist()
    for row in range(5):
        a, b = starts[row], starts[row + 1]
        inside = (masks.token_ids >= a) & (masks.token_ids < b)
        alone = predictions(
            model,
            Batch(
                images=batch.images[row : row + 1],
                tokens=batch.tokens[a:b],
                cu_seqlens=torch.tensor([0, b - a], dtype=torch.int32),
                max_length=b - a,
                image_id=batch.image_id[:1],
                text_id=batch.text_id[:1],
                sample_id=batch.sample_id[:1],
            ),
            Masks(patch_ids=masks.patch_ids[row : row + 1], token_ids=masks.token_ids[inside] - a),
        )
        torch.testing.assert_close(alone["logits"], whole["logits"][inside], rtol=0, atol=1e-12)
        torch.testing.assert_close(alone["pixels"][0], whole["pixels"][row], rtol=0, atol=1e-12)


@pytest.mark.parametrize("cross_norm", ["post", "pre"])
def test_words_of_every_position(cross_norm):
    """Any packed position may be asked for, in any order, the first and last of each caption too."""
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


@pytest.mark.parametrize("case", ["one pair", "equal captions", "one picture"])
def test_no_admissible_negative(replace, case):
    """ITM is then the positives' loss alone, and everything stays finite."""
    model = micro_model()
    batch, masks = micro_batch((6,) if case == "one pair" else (6, 4, 9))
    if case == "equal captions":
        batch = replace(batch, text_id=torch.full_like(batch.text_id, 7))
    if case == "one picture":
        batch = replace(batch, image_id=torch.full_like(batch.image_id, 7))
    losses = model(batch, masks)
    losses.total.backward()
    assert all(torch.isfinite(x) for x in losses)
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


def test_the_temperature_is_clamped_after_the_step_and_not_in_the_graph():
    model = micro_model()
    batch, masks = micro_batch()
    for start, end in ((20.0, 0.001), (-5.0, 0.5)):
        with torch.no_grad():
            model.log_scale.fill_(start)
        itc = model(batch, masks).itc
        itc.backward()
        assert model.log_scale.grad is not None
        assert itc.item() == pytest.approx(
            Reference(model).losses(batch, masks, 0, 0, uniform_of_pair)["itc"], rel=1e-9
        )
        model.clamp_temperature()
        assert 1 / math.exp(model.log_scale.item()) == pytest.approx(end, rel=1e-9)
    with torch.no_grad():
        model.log_scale.fill_(math.log(1 / 0.07))
    model.clamp_temperature()
    assert model.log_scale.item() == math.log(1 / 0.07)


def test_losses_are_single_precision_under_autocast():
    model = micro_model(dtype=torch.float32)
    batch, masks = micro_batch()
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(batch, masks)
    assert {x.dtype for x in losses} == {torch.float32}
    exact = model(batch, masks)
    # bf16 keeps eight bits: a per cent or two of a loss, not of nothing.
    for name in ("mlm", "mim", "itc"):
        assert getattr(losses, name).item() == pytest.approx(getattr(exact, name).item(), rel=0.03)


def test_training_and_evaluation_mode_are_the_same():
    """Dropout and drop-path are 0."""
    model = micro_model()
    batch, masks = micro_batch()
    assert model.training
    training = model(batch, masks)
    evaluating = model.eval()(batch, masks)
    assert all(torch.equal(a, b) for a, b in zip(training, evaluating, strict=True))


@pytest.mark.parametrize("initialization", ["normal", "xavier"])
@pytest.mark.parametrize("pixel_initialization", ["normal", "xavier"])
def test_weights_of_a_new_model(initialization, pixel_initialization):
    torch.manual_seed(0)
    config = micro_config(width=64, heads=1, initialization=initialization, pixel_initialization=pixel_initialization)
    model = MaskVLM(config)
    assert model.log_scale.item() == pytest.approx(math.log(1 / 0.07), abs=1e-6)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.LayerNorm):
            assert (module.weight == 1).all(), name
            assert (module.bias == 0).all(), name
        if isinstance(module, torch.nn.Linear):
            assert (module.bias == 0).all(), name
            pixels = name.startswith(("image_cross.", "image_decoder.", "pixel_head"))
            xavier = (pixel_initialization if pixels else initialization) == "xavier"
            # Xavier's uniform numbers have the variance 2 / (inputs + outputs).
            wanted = math.sqrt(2 / (module.in_features + module.out_features)) if xavier else 0.02
            deviations = 4 / math.sqrt(2 * module.weight.numel())  # four standard errors of a standard deviation
            assert module.weight.std().item() == pytest.approx(wanted, rel=deviations), name
    image, text = model.image_encoder, model.text_encoder
    for tensor in (image.mask_token, image.cls_token, image.position, text.position, text.words.weight):
        deviations = 4 / math.sqrt(2 * tensor.numel())
        assert tensor.std().item() == pytest.approx(0.02, rel=deviations)


def test_wrong_shapes_are_named():
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


def test_gradients_at_the_size_of_the_demo_are_equal_bit_for_bit():
    """Threads share work only past some size, so that a small model tells nothing. Rows read more than once by ITM are
    the danger: their gradients have to add up in a fixed order.
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
            with torch.autocast("cpu", torch.bfloat16):
                model(batch, masks).total.backward()
            runs.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    finally:
        torch.set_num_threads(threads)
    for again in runs[1:]:
        assert [name for name in runs[0] if not torch.equal(runs[0][name], again[name])] == []
