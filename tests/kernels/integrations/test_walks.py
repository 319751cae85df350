"""A slice of the walks of `make test-integrations`, and proof that a walk sees a fault."""

import pytest

pytest.importorskip("transformers")
pytest.importorskip("timm")

from mvlm_kernels.integrations import timm as timm_integration
from mvlm_kernels.integrations import transformers as integration
from support.kernels import walk_timm, walk_transformers
from support.kernels.tiny_transformers import exported_classes

STATUS = {
    "albert": "equal", "blip": "kept", "clip": "equal", "deepseek_v32": "kept", "gemma2": "kept", "gpt_oss": "kept",
    "llama": "equal", "siglip2": "equal", "t5": "equal",
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("architecture", STATUS)
def test_swapped_transformers_are_equal_or_kept(architecture: str):
    model_class = next(c for c in exported_classes([architecture]) if c.__name__.endswith("Model"))
    rows = walk_transformers.rows_of(model_class)
    assert {row["status"] for row in rows} == {STATUS[architecture]}, rows
    assert all(row["note"] for row in rows if row["status"] == "kept")


def test_the_walk_sees_a_wrong_attention(monkeypatch: pytest.MonkeyPatch):
    right = integration.cross_attention
    albert = next(exported_classes(["albert"]))
    monkeypatch.setattr(integration, "cross_attention", lambda *args, key_mask, **others: right(*args, **others))
    statuses = {row["case"]: row["status"] for row in walk_transformers.rows_of(albert)}
    assert statuses["no mask"] == "equal"
    assert statuses["padded"] == "different"  # the mask was dropped


def test_the_walk_sees_a_wrong_patch_embedding(monkeypatch: pytest.MonkeyPatch):
    assert [row["status"] for row in walk_timm.rows_of("test_vit", "")] == ["equal"]
    right = timm_integration.gather_patches
    monkeypatch.setattr(timm_integration, "gather_patches", lambda *args, **kwargs: right(*args, **kwargs).flip(1))
    assert [row["status"] for row in walk_timm.rows_of("test_vit", "")] == ["different"]
