"""Pretrained encoders of timm and transformers, in and out."""
