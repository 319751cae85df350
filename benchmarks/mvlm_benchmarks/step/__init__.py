"""`mvlm bench step`: one pretraining step against the same model built from timm and transformers."""
