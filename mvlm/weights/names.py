"""Names of the encoders' tensors in timm and in transformers, and tensors that checkpoints store in another form.

A table maps our names to theirs. If they store queries, keys and values in one tensor, it maps to that tensor and one
of its thirds.
"""

import re

import torch
from torch import Tensor

from mvlm.errors import RunError

SourceName = str | tuple[str, int]
"""Name of a tensor in the source; or the name, and 0, 1 or 2 for one third of the tensor."""
ROBERTA_FIRST_POSITION = 2
"""Row of RoBERTa's first position: positions start after its padding id, 1."""


def timm_names(layers: int) -> dict[str, SourceName]:
    """Table of our names -> timm's, for all tensors of the image encoder."""
    names: dict[str, SourceName] = {
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


def hf_vit_names(layers: int) -> dict[str, SourceName]:
    """Table of our names -> those of transformers' ViT, for all tensors of the image encoder."""
    names: dict[str, SourceName] = {
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
    """The current name of a tensor of transformers' ViT. Files on the hub have names from before a renaming."""
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


def bert_names(layers: int) -> dict[str, SourceName]:
    """Table of our names -> those of transformers' BERT and RoBERTa, for all tensors of the text encoder."""
    names: dict[str, SourceName] = {
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


def join_qkv_bias(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Join BEiT's and SimMIM's separate biases of queries and values into one, with zeros for keys.

    A bias of keys adds the same number to all scores of a query, so the softmax does not depend on it.
    """
    found = dict(tensors)
    for name in tensors:
        if name.endswith(".attn.q_bias") and name.replace("q_bias", "v_bias") in found:
            q, v = found.pop(name), found.pop(name.replace("q_bias", "v_bias"))
            found[name.replace("q_bias", "qkv.bias")] = torch.cat([q, torch.zeros_like(q), v])
    return found


def fold_layer_scale(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Fold LayerScale into the weights: x + gamma * f(x) is x + f'(x), with gamma in f's last layer.

    Tensors have timm's names.
    """
    found = join_qkv_bias(tensors)
    for gamma, layer in (
        ("ls1.gamma", "attn.proj"),
        ("ls2.gamma", "mlp.fc2"),
        ("gamma_1", "attn.proj"),
        ("gamma_2", "mlp.fc2"),
    ):
        for name in [name for name in found if re.fullmatch(rf"blocks\.\d+\.{re.escape(gamma)}", name)]:
            last = name.removesuffix(gamma) + layer
            if {f"{last}.weight", f"{last}.bias"} <= found.keys():
                scale = wide(found.pop(name))
                found[f"{last}.weight"] = scale[:, None] * wide(found[f"{last}.weight"])
                found[f"{last}.bias"] = scale * wide(found[f"{last}.bias"])
    return found


def wide(tensor: Tensor) -> Tensor:
    """The tensor in at least float32, so that sums and products of weights are rounded once. RunError for integers."""
    if not tensor.is_floating_point():
        raise RunError(f"wanted weights as floats, found {tensor.dtype}; take another source")
    return tensor if tensor.dtype == torch.float64 else tensor.float()  # torch promotes no float8
