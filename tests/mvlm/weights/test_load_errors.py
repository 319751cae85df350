# torch and transformers type the children of a module as Tensor or Module, whatever they are.
# pyright: reportCallIssue=false, reportAttributeAccessIssue=false, reportArgumentType=false
# pyright: reportOptionalMemberAccess=false
"""Sources that do not fit: errors, reports, and models that stay as they were."""

import json

import pytest
import torch
from safetensors.torch import save_file

import mvlm.weights as weights
from mvlm.errors import RunError
from mvlm.model.maskvlm import MaskVLM
from support.encoders import hf_text, hf_vit, randomized, timm_vit
from support.models import micro_model


def state(model: MaskVLM) -> dict[str, torch.Tensor]:
    return {name: t.clone() for name, t in model.state_dict().items()}


def assert_unchanged(model: MaskVLM, before: dict[str, torch.Tensor]) -> None:
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


WRONG = {
    "deeper": ({"depth": 3}, ["blocks.2.norm1.weight unexpected", "blocks.2.attn.qkv.weight unexpected"]),
    "shallower": ({"depth": 1}, ["blocks.1.attn.proj.weight missing", "; and 4 more; set"]),
    "wider": ({"embed_dim": 24}, ["patch_embed.proj.weight wanted (16, 192), got (24, 192)", "cls_token wanted (16,)"]),
    "another patch size": ({"patch_size": 16}, ["patch_embed.proj.weight wanted (16, 192), got (16, 768)"]),
    "registers": ({"reg_tokens": 2}, ["reg_token unexpected"]),
    "norms of queries and keys": ({"qk_norm": True}, ["blocks.1.attn.q_norm.weight unexpected"]),
    "a norm before the blocks": ({"pre_norm": True}, ["norm_pre.weight unexpected"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", WRONG)
def test_a_vit_of_another_architecture_changes_nothing(name):
    changes, messages = WRONG[name]
    model = micro_model(3)
    before = state(model)
    with pytest.raises(
        RunError, match=r"^image_encoder: wanted weights of this architecture, found others, nothing was loaded"
    ) as error:
        weights.load_timm_vit(model, timm_vit(**changes).state_dict())
    assert all(message in str(error.value) for message in messages)
    assert_unchanged(model, before)


@pytest.mark.parametrize("name", ["blocks.1.mlp.fc2.weight", "blocks.0.attn.qkv.bias", "pos_embed", "norm.weight"])
@pytest.mark.parametrize("layer_scale", [None, 0.5])
@pytest.mark.parametrize("kind, message", [("bits", "floats, found torch.int32"), ("nan", "wanted finite values")])
def test_integers_and_values_that_are_not_finite_are_refused(name, layer_scale, kind, message):
    """Also in weights that LayerScale is folded into, and in positions, which are summed before they are copied."""
    model, tensors = micro_model(3), dict(timm_vit(init_values=layer_scale).state_dict())
    before = state(model)
    if kind == "bits":
        tensors[name] = tensors[name].float().view(torch.int32)
    else:
        tensors[name].flatten()[3] = torch.nan
    with pytest.raises(RunError, match=message):
        weights.load_timm_vit(model, tensors)
    assert_unchanged(model, before)


def test_positions_of_no_square_grid_are_refused():
    model, tensors = micro_model(3), dict(timm_vit().state_dict())
    tensors["pos_embed"] = torch.zeros(1, 13, 16)
    with pytest.raises(RunError, match=r"pos_embed .*wanted positions of a square grid, with or without .CLS., got 13"):
        weights.load_timm_vit(model, tensors)


@pytest.mark.parametrize(
    "name, further, tensor",
    [
        ("vit_base_patch16_rope_mixed_ape_224", {}, "rope.freqs"),
        ("beitv2_base_patch16_224", {"use_abs_pos_emb": True, "use_rel_pos_bias": False,
         "use_shared_rel_pos_bias": True, "global_pool": "token"}, "rel_pos_bias.relative_position_bias_table"),
    ],
)  # fmt: skip
def test_rotary_and_relative_positions_of_timm_are_refused(name, further, tensor):
    import timm

    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 0}
    theirs = randomized(timm.create_model(name, **sizes, **further), 1)
    with pytest.raises(RunError, match=f"nothing was loaded: {tensor} unexpected"):
        weights.load_image_weights(micro_model(3), theirs.state_dict())


@pytest.mark.parametrize("load", [weights.load_timm_vit, weights.load_hf_vit, weights.load_text_weights])
def test_models_side_by_side_are_refused(load):
    makes = {weights.load_timm_vit: timm_vit, weights.load_hf_vit: hf_vit}
    tensors = makes.get(load, lambda: hf_text("Bert"))().state_dict()
    pair = {f"{part}.{name}": t for part in ("teacher", "student") for name, t in tensors.items()}
    with pytest.raises(RunError, match=r"wanted one encoder, found several, teacher., student.; give .* one of them"):
        load(micro_model(3), pair)
    inner = {f"teacher.{name}": t for name, t in tensors.items()}
    assert any(name.startswith("teacher.") for name in load(micro_model(3), tensors | inner).unexpected)


def test_files_that_are_missing_or_not_safetensors_are_refused(tmp_path):
    model = micro_model(3)
    pickled, broken = tmp_path / "vit.pth", tmp_path / "broken.safetensors"
    torch.save({"x": torch.zeros(1)}, pickled)
    broken.write_bytes(b"no tensors here, but enough bytes for a header")
    for path, message in (
        (pickled, "vit.pth: wanted a .safetensors file; another kind may run code when it is read"),
        (broken, "broken.safetensors: wanted a safetensors file, could not read it"),
        (tmp_path / "none.safetensors", "none.safetensors: wanted a safetensors file, could not read it"),
        (tmp_path, "model.safetensors: wanted a safetensors file, could not read it"),
    ):
        with pytest.raises(RunError, match=message):
            weights.load_image_weights(model, path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(RunError, match=r"wanted one .*, found model.safetensors.index.json of several; join them"):
        weights.load_image_weights(model, tmp_path)


@pytest.mark.parametrize("load", [weights.load_text_weights, weights.load_hf_roberta])
def test_a_config_that_says_otherwise_is_refused(tmp_path, caplog, load):
    """Heads and activation leave no mark on the tensors' shapes."""
    model, theirs = micro_model(3), hf_text("Roberta")
    save_file(dict(theirs.state_dict()), tmp_path / "model.safetensors")
    before, config = state(model), tmp_path / "config.json"
    for settings, message in (
        ({"num_attention_heads": 4}, "num_attention_heads 2, as in the model, got 4: .*; set --model.heads 4"),
        ({"hidden_act": "relu"}, "hidden_act gelu, got 'relu'"),
        ({"hidden_act": "quick_gelu"}, "hidden_act gelu, got 'quick_gelu'"),
        ({"text_config": {"num_attention_heads": 4}}, "num_attention_heads 2, as in the model, got 4"),
        ({"decoder": {"num_attention_heads": 2, "hidden_act": "relu"}}, "hidden_act gelu, got 'relu'"),
        ({"is_decoder": True}, "an encoder, got is_decoder True"),
        ({"model_type": "big_bird", "rescale_embeddings": True}, "word embeddings as .*, got rescale_embeddings True"),
        ({"model_type": "yoso"}, "a model_type of bert, .*, got 'yoso'"),
        ({"model_type": "roberta", "pad_token_id": None}, "pad_token_id, after which positions start, got None"),
        ([1, 2], "the configuration of the weights beside it, got "),
        ("[" * 100_000, "the configuration of the weights beside it, got "),
    ):
        config.write_text(settings if isinstance(settings, str) else json.dumps(settings))
        for source in (tmp_path, tmp_path / "model.safetensors"):
            with pytest.raises(RunError, match=f"config.json: wanted {message}"):
                load(model, source)
    assert_unchanged(model, before)

    theirs.config.save_pretrained(tmp_path)  # two heads, gelu
    load(model, tmp_path)
    assert "hidden_act" not in caplog.text
    config.write_text(json.dumps({"vision_config": {"num_attention_heads": 4}, "hidden_act": "gelu_new"}))
    load(model, tmp_path)
    assert "config.json: wanted num_attention_heads, to compare it with the model's 2, found none" in caplog.text
    assert "config.json: wanted hidden_act gelu, got gelu_new; features will differ slightly" in caplog.text


@pytest.mark.parametrize("part", ["vision_config", "image_config", "encoder"])
def test_the_heads_of_an_image_encoder_inside_another_model_are_checked(tmp_path, part):
    save_file({f"x.{name}": t for name, t in hf_vit().state_dict().items()}, tmp_path / "model.safetensors")
    settings = {"text_config": {"num_attention_heads": 2}, part: {"num_attention_heads": 4}}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(RunError, match=r"config.json: wanted num_attention_heads 2, as in the model, got 4"):
        weights.load_image_weights(micro_model(3), tmp_path)


def test_a_text_encoder_of_unknown_positions_is_refused(tmp_path):
    """By the number of its token types, or where its config names another model than the function."""
    theirs = hf_text("Bert", type_vocab_size=4)
    with pytest.raises(RunError, match=r"wanted 1 token type, as RoBERTa has, or 2, as BERT has, found 4"):
        weights.load_text_weights(micro_model(3), theirs.state_dict())
    weights.load_hf_bert(micro_model(3), theirs.state_dict())
    save_file(dict(theirs.state_dict()), tmp_path / "model.safetensors")
    theirs.config.save_pretrained(tmp_path)
    with pytest.raises(RunError, match="wanted a roberta, got model_type bert; load it with load_hf_bert"):
        weights.load_hf_roberta(micro_model(3), tmp_path)
