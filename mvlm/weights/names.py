"""Names of an encoder's tensors in timm and in transformers, and what their checkpoints keep in another form.

A table maps our names to theirs; where they keep queries, keys and values in one tensor, to it and which third.
"""

import re

import torch
from torch import Tensor

Name = str | tuple[str, int]
"""Of the source's tensor that one of ours is, or of the one and which third of it."""


def timm_names(layers: int) -> dict[str, Name]:
    """Ours -> timm's, for all tensors of the image encoder."""
    names: dict[str, Name] = {
        "patch_projection.weight": "patch_embed.proj.weight",
        "patch_projection.bias": "patch_embed.proj.bias",
        "mask_token": "mask_token",
        "cls_token": "cls_token",
        "position": "pos_embed",
        "norm.weight": "norm.weight",
        "norm.bias": "norm.bias",
    }
    modules = {
        "attention.out": "attn.proj",
        "norm1": "norm1",
        "norm2": "norm2",
        "mlp.up": "mlp.fc1",
        "mlp.down": "mlp.fc2",
    }
    for kind in ("weight", "bias"):
        for i in range(layers):
            for third, part in enumerate(("query", "key", "value")):
                names[f"blocks.{i}.attention.{part}.{kind}"] = (f"blocks.{i}.attn.qkv.{kind}", third)
            names |= {f"blocks.{i}.{a}.{kind}": f"blocks.{i}.{b}.{kind}" for a, b in modules.items()}
    return names


def hf_vit_names(layers: int) -> dict[str, Name]:
    """Ours -> transformers', for all tensors of the image encoder."""
    names: dict[str, Name] = {
        "patch_projection.weight": "embeddings.patch_embeddings.projection.weight",
        "patch_projection.bias": "embeddings.patch_embeddings.projection.bias",
        "mask_token": "embeddings.mask_token",
        "cls_token": "embeddings.cls_token",
        "position": "embeddings.position_embeddings",
        "norm.weight": "layernorm.weight",
        "norm.bias": "layernorm.bias",
    }
    modules = {
        "attention.query": "attention.q_proj", "attention.key": "attention.k_proj",
        "attention.value": "attention.v_proj",
        "attention.out": "attention.o_proj", "norm1": "layernorm_before", "norm2": "layernorm_after",
        "mlp.up": "mlp.fc1", "mlp.down": "mlp.fc2",
    }  # fmt: skip
    for kind in ("weight", "bias"):
        names |= {f"blocks.{i}.{a}.{kind}": f"layers.{i}.{b}.{kind}" for i in range(layers) for a, b in modules.items()}
    return names


def current_vit_name(name: str) -> str:
    """transformers renamed ViT's modules; files on the hub have the old names."""
    found = re.fullmatch(r"encoder\.layer\.(\d+)\.(.+)\.(weight|bias)", name)
    if found is None:
        return name
    layer, module, kind = found.groups()
    modules = {
        "attention.attention.query": "attention.q_proj", "attention.attention.key": "attention.k_proj",
        "attention.attention.value": "attention.v_proj", "attention.output.dense": "attention.o_proj",
        "intermediate.dense": "mlp.fc1", "output.dense": "mlp.fc2",
    }  # fmt: skip
    return f"layers.{layer}.{modules.get(module, module)}.{kind}"


def bert_names(layers: int) -> dict[str, Name]:
    """Ours -> BERT's and RoBERTa's in transformers, for all tensors of the text encoder."""
    names: dict[str, Name] = {
        "words.weight": "embeddings.word_embeddings.weight",
        "position": "embeddings.position_embeddings.weight",
        "norm.weight": "embeddings.LayerNorm.weight",
        "norm.bias": "embeddings.LayerNorm.bias",
    }
    modules = {
        "attention.query": "attention.self.query", "attention.key": "attention.self.key",
        "attention.value": "attention.self.value", "attention.out": "attention.output.dense",
        "norm1": "attention.output.LayerNorm", "mlp.up": "intermediate.dense", "mlp.down": "output.dense",
        "norm2": "output.LayerNorm",
    }  # fmt: skip
    for kind in ("weight", "bias"):
        for i in range(layers):
            names |= {f"blocks.{i}.{a}.{kind}": f"encoder.layer.{i}.{b}.{kind}" for a, b in modules.items()}
    return names


def whole_bias(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """BEiT's and SimMIM's separate biases of queries and values as one; a bias of keys changes no softmax."""
    found = dict(tensors)
    for name in tensors:
        if name.endswith(".attn.q_bias") and name.replace("q_bias", "v_bias") in found:
            q, v = found.pop(name), found.pop(name.replace("q_bias", "v_bias"))
            found[name.replace("q_bias", "qkv.bias")] = torch.cat([q, torch.zeros_like(q), v])
    return found


def without_layer_scale(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """timm's names with LayerScale folded in: x + gamma * f(x) is x + f'(x) with gamma in f's last layer."""
    found = whole_bias(tensors)
    for gamma, layer in (
        ("ls1.gamma", "attn.proj"),
        ("ls2.gamma", "mlp.fc2"),
        ("gamma_1", "attn.proj"),
        ("gamma_2", "mlp.fc2"),
    ):
        for name in [name for name in found if re.fullmatch(rf"blocks\.\d+\.{re.escape(gamma)}", name)]:
            last = name.removesuffix(gamma) + layer
            if {f"{last}.weight", f"{last}.bias"} <= found.keys():
                scale = found.pop(name)
                found[f"{last}.weight"] = scale[:, None] * found[f"{last}.weight"]
                found[f"{last}.bias"] = scale * found[f"{last}.bias"]
    return found
