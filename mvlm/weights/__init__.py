"""Pretrained encoders of timm and transformers: loading and export."""

from mvlm.weights.export import export_hf_bert, export_hf_roberta, export_hf_vit, export_timm_vit
from mvlm.weights.image_tower import load_image_tower
from mvlm.weights.load import (
    LoadReport,
    load_hf_bert,
    load_hf_roberta,
    load_hf_vit,
    load_image_weights,
    load_text_weights,
    load_timm_vit,
)

__all__ = [
    "LoadReport",
    "export_hf_bert",
    "export_hf_roberta",
    "export_hf_vit",
    "export_timm_vit",
    "load_hf_bert",
    "load_hf_roberta",
    "load_hf_vit",
    "load_image_tower",
    "load_image_weights",
    "load_text_weights",
    "load_timm_vit",
]
