# transformers, open_clip and timm type the children of a module as Tensor or Module, whatever they are.
# pyright: reportCallIssue=false, reportAttributeAccessIssue=false, reportArgumentType=false
"""Weights of image towers, against the models of transformers, open_clip and timm that they come from."""

import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from mvlm.errors import RunError
from mvlm.model.maskvlm import MaskVLM
from mvlm.weights import load_image_tower
from mvlm.weights.resize import resized_model
from support.towers import timm_module, tower_config, without_initialization

TEXT: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 50,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
}  # fmt: skip


def vision(width: int, heads: int, patch: int, **changes: Any) -> dict[str, Any]:
    """Settings of transformers' vision model with two layers, for images of four patches a side."""
    sizes = {"hidden_size": width, "num_attention_heads": heads, "intermediate_size": 4 * width, "patch_size": patch}
    return sizes | {"num_hidden_layers": 2, "image_size": 4 * patch, "hidden_act": "gelu"} | changes


def randomized(module: Any) -> Any:
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return module.eval()


def tower(name: str, **changes: Any) -> MaskVLM:
    torch.manual_seed(1)
    with without_initialization():
        return MaskVLM(tower_config(name, **changes)).eval()


@torch.no_grad()
def embeddings(model: MaskVLM) -> tuple[Tensor, Tensor]:
    """Two images as transformers and open_clip take them, and their contrastive embeddings (2, E)."""
    config = model.config
    images = torch.randint(0, 256, (2, 3, config.image_size, config.image_size), dtype=torch.uint8)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (config.image_mean, config.image_std))
    return (images / 255 - mean) / std, model.embed_image(model.encode_image(images))


@pytest.mark.slow
@pytest.mark.parametrize("width", [512, 576], ids=["of the tower", "wider"])
def test_images_of_a_clip_of_transformers_have_its_embeddings(tmp_path, width):
    from transformers import CLIPConfig, CLIPModel

    theirs = randomized(CLIPModel(CLIPConfig(text_config=TEXT, vision_config=vision(512, 8, 32), projection_dim=24)))
    theirs.save_pretrained(tmp_path)
    model = tower("vit_medium_patch32_clip_224", itc_width=24, width=width, heads=8)
    load_image_tower(model, tmp_path)
    pixels, found = embeddings(model)
    with torch.no_grad():
        wanted = theirs.visual_projection(theirs.vision_model(pixels).pooler_output)
    torch.testing.assert_close(found, F.normalize(wanted), rtol=0, atol=1e-5)
    assert model.log_scale == theirs.logit_scale


@pytest.mark.slow
def test_images_of_a_siglip_of_transformers_have_its_embeddings(tmp_path):
    from transformers import SiglipConfig, SiglipModel

    theirs = randomized(SiglipModel(SiglipConfig(text_config=TEXT, vision_config=vision(768, 12, 16))))
    theirs.save_pretrained(tmp_path)
    model = tower("vit_base_patch16_siglip_224")
    report = load_image_tower(model, tmp_path)
    pixels, found = embeddings(model)
    with torch.no_grad():
        wanted = theirs.vision_model(pixels).pooler_output
    torch.testing.assert_close(found, F.normalize(wanted), rtol=0, atol=1e-5)
    assert model.log_scale == theirs.logit_scale
    assert model.logit_bias == theirs.logit_bias
    assert {"image_projection.weight", "log_scale", "logit_bias"} <= {*report.loaded}


@pytest.mark.slow
@pytest.mark.parametrize("timm_inside", [False, True], ids=["own ViT", "ViT of timm"])
def test_images_of_a_clip_of_open_clip_have_its_embeddings(timm_inside):
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    name = "vit_medium_patch32_clip_224"
    model = tower(name, itc_width=24)
    sizes = {"image_size": 128, "patch_size": 32, "layers": 2, "width": 512, "head_width": 64}
    own = CLIPVisionCfg(**(sizes | ({"timm_model_name": name, "timm_proj": "linear"} if timm_inside else {})))
    text = CLIPTextCfg(context_length=8, vocab_size=50, width=32, heads=2, layers=1)
    theirs = CLIP(24, own, text)
    if timm_inside:
        theirs.visual.trunk = timm_module(model.config)
    load_image_tower(model, randomized(theirs).state_dict())
    pixels, found = embeddings(model)
    with torch.no_grad():
        torch.testing.assert_close(found, theirs.encode_image(pixels, normalize=True), rtol=0, atol=1e-5)
    assert model.log_scale == theirs.logit_scale


def test_timms_own_names_are_loaded_with_mask_token_and_no_classifier(tmp_path):
    model = tower("test_vit")
    before = model.image_projection.weight.clone()
    tensors = timm_module(model.config).state_dict()
    classifier = {"head.weight": torch.ones(256, 64), "head.bias": torch.ones(256)}
    token = torch.arange(64.0)
    save_file(tensors | classifier | {"mask_token": token[None]}, tmp_path / "vit.safetensors")
    report = load_image_tower(model, tmp_path / "vit.safetensors")
    assert all(torch.equal(model.get_parameter(f"image_encoder.module.{n}"), t) for n, t in tensors.items())
    assert torch.equal(model.image_encoder.mask_token, token)
    assert torch.equal(model.image_projection.weight, before)
    assert report.missing == []


@pytest.mark.parametrize(
    "change, shown",
    [
        ({"norm.weight": None}, "norm.weight missing"),
        ({"blocks.2.norm1.weight": torch.ones(64)}, "blocks.2.norm1.weight unexpected"),
        ({"norm.weight": torch.ones(65)}, r"norm.weight wanted \(64,\)"),
        ({"norm.weight": torch.full((64,), torch.nan)}, "norm.weight"),
        ({"mask_token": torch.full((64,), torch.nan)}, "mask_token"),
    ],
    ids=str,
)
def test_weights_of_another_tower_leave_the_model_unchanged(change, shown):
    model = tower("test_vit")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tensors = {n: t for n, t in (timm_module(model.config).state_dict() | change).items() if t is not None}
    with pytest.raises(RunError, match=shown):
        load_image_tower(model, tensors)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("settings", [{"num_attention_heads": 4}, {"hidden_act": "quick_gelu"}], ids=str)
def test_a_config_that_says_the_weights_compute_something_else_is_believed(tmp_path, settings):
    model = tower("test_vit")
    save_file(timm_module(model.config).state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"vision_config": settings}))
    with pytest.raises(RunError, match=next(iter(settings))):
        load_image_tower(model, tmp_path)


def test_a_failed_download_asks_for_a_local_file(no_hub):
    model = tower("test_vit")
    with pytest.raises(RunError, match=r"ConnectError.*--image-weights FILE"):
        load_image_tower(model, "timm")


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch16_dinov3", "deit3_small_patch16_224"])
def test_a_tower_for_images_of_another_size_has_the_positions_of_timm(name):
    model = tower(name)
    module = timm_module(model.config)
    model.image_encoder.module.load_state_dict(module.state_dict())
    resized = resized_model(model, image_size=96)
    module.set_input_size(img_size=96)
    pixels = torch.rand(1, 3, 96, 96)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (model.config.image_mean, model.config.image_std))
    with torch.no_grad():
        wanted = module.forward_features((pixels - mean) / std)[:, module.num_prefix_tokens :]
        torch.testing.assert_close(resized.encode_image(pixels)[:, 1:], wanted, rtol=0, atol=1e-5)
