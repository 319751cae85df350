"""Image towers against timm's own modules with the same weights."""

import pytest

from support.towers import difference

SLOW = pytest.mark.slow
FAMILIES = [
    pytest.param(name, marks=marks)
    for name, marks in {
        "vit_tiny_patch16_224": (),
        "vit_medium_patch32_clip_224": (),
        "vit_base_patch32_clip_quickgelu_224": SLOW,
        "vit_base_patch16_siglip_224": SLOW,
        "vit_base_patch32_siglip_256": SLOW,
        "vit_small_patch14_reg4_dinov2": (),
        "vit_small_patch16_dinov3": (),
        "eva02_tiny_patch14_224": (),
        "eva02_base_patch16_clip_224": SLOW,
        "vit_base_patch16_224.mae": SLOW,
        "deit3_small_patch16_224": (),
        "vit_small_patch16_rope_mixed_224": (),
        "vit_pe_core_tiny_patch16_384": (),
        "test_vit4": (),
    }.items()
]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_tower_computes_what_timm_computes_with_and_without_masks(name):
    assert difference(name) < 1e-5
