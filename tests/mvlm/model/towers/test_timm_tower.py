"""Image towers against timm's own modules with the same weights."""

from dataclasses import replace

import pytest

from mvlm.config.model import MaskVLMConfig
from mvlm.errors import ConfigError
from mvlm.model.towers.timm_tower import TimmTower, tower_settings
from support.models import pretrain_config
from support.towers import COMMITTED, difference, read_rows, rows_of, tower_config

FAMILIES = (
    "vit_tiny_patch16_224",
    "vit_medium_patch32_clip_224",
    "vit_base_patch32_clip_quickgelu_224",
    "vit_base_patch16_siglip_224",
    "vit_base_patch32_siglip_256",
    "vit_small_patch14_reg4_dinov2",
    "vit_small_patch16_dinov3",
    "eva02_tiny_patch14_224",
    "eva02_base_patch16_clip_224",
    "vit_base_patch16_224.mae",
    "deit3_small_patch16_224",
    "vit_small_patch16_rope_mixed_224",
    "vit_pe_core_tiny_patch16_384",
    "test_vit4",
)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_tower_computes_what_timm_computes_with_and_without_masks(name):
    assert difference(name) < 1e-5


@pytest.mark.extended
def test_every_model_of_timm_is_a_tower_or_refused_as_committed():
    assert rows_of() == read_rows(COMMITTED)


@pytest.mark.parametrize(
    "tower, side, wanted",
    [
        ("vit_base_patch16_clip_224.openai", None, (224, 16, 32, 768, 12, 12, 512, "softmax")),
        ("vit_base_patch16_siglip_224", None, (224, 16, 32, 768, 12, 12, 768, "sigmoid")),
        ("vit_small_patch14_reg4_dinov2", None, (518, 14, 14, 384, 6, 12, 256, "softmax")),  # 37 patches a side
        ("vit_small_patch14_reg4_dinov2", 224, (224, 14, 28, 384, 6, 12, 256, "softmax")),
        ("vit_so400m_patch14_siglip_384", None, (378, 14, 42, 1152, 18, 27, 1152, "sigmoid")),  # 27 whole patches
    ],
)
def test_settings_of_a_tower_are_its_own(tower, side, wanted):
    found = MaskVLMConfig(**tower_settings(f"timm:{tower}", side))
    names = ("image_size", "patch_size", "mask_block", "width", "heads", "image_layers", "itc_width", "contrastive")
    assert tuple(getattr(found, name) for name in names) == wanted


SMALL = tower_config("test_vit")


@pytest.mark.parametrize(
    "setting, changes",
    [
        ("image_tower", {"image_tower": "vit_tiny_patch16_224"}),
        ("did you mean timm:vit_tiny_patch16_224", {"image_tower": "timm:vit_tiny_patch16_225"}),
        ("image_tower", {"image_tower": "timm:hf-hub:owner/name"}),
        (r"timm.list_models\(\) has the names", {"image_tower": "timm:ViT-B-16"}),
        ("Beit", {"image_tower": "timm:beit_base_patch16_224"}),
        ("HybridEmbed", {"image_tower": "timm:vit_tiny_r_s16_p8_224"}),
        ("VisionTransformerDistilled", {"image_tower": "timm:deit_tiny_distilled_patch16_224"}),
        ("VisionTransformerRelPos", {"image_tower": "timm:vit_relpos_small_patch16_224"}),
        ("image_tower", {"image_tower": "timm:resnet18"}),
        ("patch_size", {"patch_size": 8}),
        ("width", {"width": 32}),
        ("drop_masked", {"drop_masked": True}),
    ],
    ids=str,
)
def test_a_tower_that_cannot_be_is_refused(setting, changes):
    with pytest.raises(ConfigError, match=setting):
        TimmTower(replace(SMALL, **changes))


@pytest.mark.parametrize("capture", ["compile", "cuda-graphs"])
def test_a_step_with_a_tower_is_not_captured(tmp_path, capture):
    with pytest.raises(ConfigError, match="capture"):
        pretrain_config(tmp_path, tmp_path, model=SMALL, capture=capture)
