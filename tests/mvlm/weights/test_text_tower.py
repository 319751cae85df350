# torch and transformers type the children of a module as Tensor or Module, whatever they are.
# pyright: reportCallIssue=false, reportAttributeAccessIssue=false, reportArgumentType=false
"""Text towers against the models of transformers that they are, one caption at a time."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from mvlm.errors import ConfigError, RunError
from mvlm.model import fast
from mvlm.model.maskvlm import MaskVLM
from mvlm.model.packing import mask_tokens
from mvlm.model.pretrained import check_sizes
from mvlm.objectives.losses import contrastive_logits
from mvlm.weights.image_tower import load_image_tower
from mvlm.weights.text_tower import load_text_tower, read_text_tower, read_tower_tokenizer
from mvlm_dataloading import Batch, DataError
from support.models import micro_batch, pretrain_config
from support.text_towers import SPECIAL, model_with_tower, text_model, tower_config, write_text_tower, write_tokenizer
from support.towers import tower_config as image_tower_config

CAPTIONS = ["a red square", "cat", "the blue circle and two green square on the left", "a cat of the cat"]
KINDS = [*SPECIAL]


def packed(folder) -> tuple[torch.Tensor, torch.Tensor, int]:
    tokens, lengths = read_tower_tokenizer(folder).encode(CAPTIONS, 12)
    return torch.from_numpy(tokens), torch.tensor([0, *lengths.cumsum()], dtype=torch.int32), int(lengths.max())


def with_all_tokens(theirs, number: int):
    """The model of transformers with one more row for each new token, the mean of the others."""
    embedding = getattr(theirs, "text_model", theirs).get_input_embeddings()
    rows = embedding.weight.detach()
    new = rows.mean(0).expand(number - len(rows), -1)
    embedding.weight = torch.nn.Parameter(torch.cat([rows, new]))
    return theirs


@torch.no_grad()
def wanted_features(theirs, kind: str, caption: torch.Tensor) -> torch.Tensor:
    """Features of one caption (L, C), of a width of its own, by transformers alone."""
    text = getattr(theirs, "text_model", theirs)
    if kind == "siglip":
        padded = torch.full((1, 20), 1)
        padded[0, : len(caption) - 1] = caption[1:]
        x = text(input_ids=padded).last_hidden_state[0]
        return torch.cat([x[-1:], x[: len(caption) - 1]])
    x = text(input_ids=caption[None], attention_mask=torch.ones(1, len(caption))).last_hidden_state[0]
    return torch.cat([x[-1:], x[1:]]) if kind == "clip" else x


@pytest.mark.parametrize("kind", KINDS)
def test_a_tower_computes_what_transformers_computes(tmp_path, kind, caplog):
    """Packed captions of mixed lengths, unmasked and masked, in both implementations; the bridge adds zeros."""
    theirs = write_text_tower(tmp_path, kind)
    model = model_with_tower(tmp_path)
    theirs = with_all_tokens(theirs, model.text_encoder.tower.get_input_embeddings().num_embeddings)
    assert ("reads from left to right" in caplog.text) == (kind == "clip")
    assert caplog.text.count("is a new one") == {"clip": 2, "siglip": 2}.get(kind, 0)
    tokens, bounds, longest = packed(tmp_path)
    masked = mask_tokens(tokens, torch.tensor([1, 6, 9, 17]), model.config.mask_token_id)
    wanted = [
        torch.cat([wanted_features(theirs, kind, caption) for caption in ids.tensor_split(bounds[1:-1].long())])
        for ids in (tokens, masked)
    ]
    batch = micro_batch((3,) * len(CAPTIONS), config=model.config)[0]
    batch = Batch(batch.images, tokens, bounds, longest, batch.image_id, batch.text_id, batch.sample_id)
    with torch.no_grad():
        both = fast.encode_texts(model, batch, (masked != tokens).nonzero()[:, 0])
        plain = [model.encode_text_packed(ids, bounds, longest) for ids in (tokens, masked)]
    for features, found, other in zip(wanted, both, plain, strict=True):
        features = torch.nn.functional.pad(features, (0, 8))
        assert found is not None
        torch.testing.assert_close(found.rows, features, rtol=0, atol=1e-5)
        torch.testing.assert_close(other.rows, features, rtol=0, atol=1e-5)


@pytest.mark.parametrize("width", [32, 40])
@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_captions_have_the_embeddings_of_a_pair(tmp_path, kind, width):
    theirs = write_text_tower(tmp_path, kind)
    model = model_with_tower(tmp_path, width=width)
    tokens, bounds, longest = packed(tmp_path)
    with torch.no_grad():
        found = model.embed_text(model.encode_text(tokens, bounds, longest)[0])
        for caption, embedding in zip(tokens.tensor_split(bounds[1:-1].long()), found, strict=True):
            caption = caption if kind == "clip" else torch.cat([caption[1:], torch.ones(20)])[:20].long()
            wanted = theirs.get_text_features(input_ids=caption[None]).pooler_output[0]
            torch.testing.assert_close(embedding, wanted / wanted.norm(), rtol=0, atol=1e-5)


PAIRS = {
    "clip": ("vit_medium_patch32_clip_224", {"hidden_size": 512, "num_attention_heads": 8, "patch_size": 32}),
    "siglip": ("vit_base_patch16_siglip_224", {"hidden_size": 768, "num_attention_heads": 12, "patch_size": 16}),
}
"""Name of the image half in timm, and its settings in transformers, by kind."""


@pytest.mark.slow
@pytest.mark.parametrize("kind", PAIRS)
def test_a_pair_has_the_logits_of_transformers_at_the_first_step(tmp_path, kind):
    """Both halves of one folder: the images behind timm's module, the captions behind transformers'."""
    name, vision = PAIRS[kind]
    width, side = vision["hidden_size"], 4 * vision["patch_size"]
    vision |= {"intermediate_size": 4 * width, "image_size": side, "num_hidden_layers": 2}
    theirs = write_text_tower(tmp_path, kind, text_model(kind, vision, projection_size=width))
    settings = read_text_tower(tmp_path)
    settings |= {"heads": 8, "mask_token_id": read_tower_tokenizer(tmp_path).mask_id}
    contrastive = {"clip": "softmax", "siglip": "sigmoid"}[kind]
    model = MaskVLM(image_tower_config(name, contrastive=contrastive, **settings)).eval()
    load_text_tower(model, tmp_path)
    load_image_tower(model, tmp_path)
    model, theirs = model.double(), theirs.double()
    tokens, bounds, longest = packed(tmp_path)
    images = torch.randint(0, 256, (2, 3, side, side), dtype=torch.uint8)
    mean, std = (torch.tensor(x).double().view(3, 1, 1) for x in (model.config.image_mean, model.config.image_std))
    with torch.no_grad():
        text = model.embed_text(model.encode_text(tokens, bounds, longest)[0])
        logits = contrastive_logits(model.embed_image(model.encode_image(images)), text, model.log_scale)
        logits = logits if model.logit_bias is None else logits + model.logit_bias
        for column, caption in zip(logits.T, tokens.tensor_split(bounds[1:-1].long()), strict=True):
            caption = caption if kind == "clip" else torch.cat([caption[1:], torch.ones(20)])[:20].long()
            found = theirs(input_ids=caption[None], pixel_values=(images / 255 - mean) / std).logits_per_image
            torch.testing.assert_close(column, found[:, 0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["bert", "clip", "siglip"])
def test_both_implementations_train_a_tower_alike(tmp_path, kind):
    write_text_tower(tmp_path, kind)
    model = model_with_tower(tmp_path).double().train()
    batch, masks = micro_batch(config=model.config)
    found = []
    for plan in ("plain", "fast"):
        model.zero_grad()
        losses = model(batch, masks, plan=plan)
        losses.total.backward()
        found.append([losses.total.detach(), *(p.grad for p in model.parameters())])
    for plain, other in zip(*found, strict=True):
        torch.testing.assert_close(other, plain, rtol=0, atol=1e-9)


def test_a_half_alone_and_a_head_are_towers_too(tmp_path):
    """CLIP's and SigLIP's text models without their images, with and without a projection; a BERT under its LM head."""
    import transformers

    clip, siglip = text_model("clip"), text_model("siglip")
    projected = transformers.CLIPTextModelWithProjection(clip.config.text_config)
    projected.text_model, projected.text_projection = clip.text_model, clip.text_projection
    bert = transformers.BertForMaskedLM(text_model("bert").config)
    parts = {"clip": [clip, projected, clip.text_model], "siglip": [siglip, siglip.text_model], "bert": [bert]}
    for kind, models in parts.items():
        found = []
        for number, part in enumerate(models):
            folder = tmp_path / f"{kind}{number}"
            write_text_tower(folder, kind, part)
            found.append(model_with_tower(folder).state_dict())
            has_projection = kind == "siglip" or (kind == "clip" and number < 2)
            assert ("itc_width" in read_text_tower(folder)) == has_projection
        for other in found[1:]:
            same = [n for n in other if n.startswith("text_encoder.")]
            assert all(torch.equal(other[name], found[0][name]) for name in same)


def broken(change):
    def folder(at):
        write_text_tower(at, "bert")
        change(at)
        return at

    return folder


def undeclared(at):
    """MPNet's tokenizer without a declared <s>, so that [CLS], which it never puts before a text, would be first."""
    write_text_tower(at, "mpnet")
    values = json.loads((at / "tokenizer.json").read_text())
    values["added_tokens"] = []
    (at / "tokenizer.json").write_text(json.dumps(values))
    return at


def of_kind(kind: str):
    return broken(lambda at: (at / "config.json").write_text(json.dumps({"model_type": kind})))


def change_tensors(at, change):
    tensors = load_file(at / "model.safetensors")
    change(tensors)
    save_file(tensors, at / "model.safetensors", {"format": "pt"})


def pickled(at):
    torch.save({}, at / "pytorch_model.bin")
    (at / "model.safetensors").unlink()


REFUSED = {
    "gpt2": (of_kind("gpt2"), {}, RunError, "text_tower.*gpt2"),
    "t5": (of_kind("t5"), {}, RunError, "text_tower.*t5"),
    "a decoder": (
        broken(lambda at: (at / "config.json").write_text('{"model_type": "bert", "is_decoder": true}')),
        {}, RunError, "text_tower.*is_decoder",
    ),
    "no tokenizer": (broken(lambda at: (at / "tokenizer.json").unlink()), {}, DataError, "tokenizer.json"),
    "no [CLS]": (broken(lambda at: write_tokenizer(at, "siglip")), {}, DataError, "tokenizer.json.* cls"),
    "undeclared <s>": (undeclared, {}, DataError, "its own rule"),
    "pickled": (broken(pickled), {}, RunError, "model.safetensors"),
    "no folder": (lambda at: at / "none", {}, RunError, "text_tower.*none.*found no config.json in it"),
    "no JSON": (broken(lambda at: (at / "config.json").write_text("[]")), {}, RunError, "text_tower"),
    "lost": (
        broken(lambda at: change_tensors(at, lambda t: t.pop("encoder.layer.1.output.dense.bias"))),
        {}, RunError, "encoder.layer.1.output.dense.bias",
    ),
    "NaN": (
        broken(lambda at: change_tensors(at, lambda t: t["encoder.layer.1.output.dense.bias"].fill_(torch.nan))),
        {}, RunError, "encoder.layer.1.output.dense.bias",
    ),
    "narrow": (broken(lambda at: None), {"width": 16}, ConfigError, "width"),
    "long": (broken(lambda at: None), {"text_length": 21}, ConfigError, "text_length"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_tower_is_refused(tmp_path, name):
    make, changes, error, named = REFUSED[name]
    with pytest.raises(error, match=named):
        model_with_tower(make(tmp_path), **changes)


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"text_weights": "x.safetensors"}, "text_tower"),
        ({"tokenizer": "tokenizer.json"}, "text_tower"),
        ({"initial_model": "run"}, "initial_model"),
        ({"capture": "compile"}, "capture"),
    ],
)
def test_settings_that_do_not_go_with_a_tower_are_refused(tmp_path, changes, named):
    with pytest.raises(ConfigError, match=named):
        pretrain_config(tmp_path, tmp_path, **{"text_tower": tmp_path} | changes)


CHANGES = [{"num_hidden_layers": 10**9}, {"num_hidden_layers": 1}, {"hidden_size": 2 * 10**8}, {"vocab_size": 10**9}]


def test_a_tower_that_its_weights_are_not_of_is_refused_before_it_is_made(tmp_path):
    write_text_tower(tmp_path, "bert")
    model = model_with_tower(tmp_path)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    values = json.loads(model.config.text_tower)

    def check(**changes):
        config = replace(model.config, text_tower=json.dumps(values | changes))
        check_sizes(config, shapes, tmp_path / "model.json", tmp_path / "model")

    check(num_labels=10**9)  # no setting of the tower, and a list of so many names otherwise
    for change in CHANGES:
        with pytest.raises(RunError, match=r"model(\.json)?: .*text.(tower|encoder)"):
            check(**change)


@pytest.mark.parametrize("text", ["{", "[]", '{"model_type": "gpt2"}', '{"model_type": "bert", "hidden_size": "wide"}'])
def test_settings_of_no_tower_make_no_model(text):
    with pytest.raises(ConfigError, match="text_tower"):
        MaskVLM(tower_config(text_tower=text))
