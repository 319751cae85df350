"""Export of encoders as state dicts of timm and transformers models."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvlm.errors import ConfigError
from mvlm.model.network import MaskVLMNetwork
from mvlm.model.towers.timm_tower import TimmTower
from mvlm.weights.load import ROBERTA_FIRST_POSITION, SourceName, bert_names, hf_vit_names, timm_names


def export_timm_vit(model: MaskVLMNetwork) -> dict[str, Tensor]:
    """The image encoder, without its mask token, as the state dict of timm's VisionTransformer with num_classes=0.

    Output positions (`MaskVLMConfig.output_positions`) are no weights and are left out: add
    `model.image_encoder.output_positions` (1+N, C) to the features.
    """
    return _export_image_encoder(model, timm_names(model.config.image_layers))


def export_hf_vit(model: MaskVLMNetwork) -> dict[str, Tensor]:
    """The image encoder, without its mask token, as the state dict of transformers' ViTModel without a pooler.

    Output positions are left out, as by `export_timm_vit`.
    """
    return _export_image_encoder(model, hf_vit_names(model.config.image_layers))


def export_hf_roberta(model: MaskVLMNetwork) -> dict[str, Tensor]:
    """The text encoder as the state dict of transformers' RobertaModel without a pooler.

    The RobertaModel has text_length + 2 positions and one token type, whose embedding is zero.
    """
    return _export_text_encoder(model, ROBERTA_FIRST_POSITION, 1)


def export_hf_bert(model: MaskVLMNetwork) -> dict[str, Tensor]:
    """The text encoder as the state dict of transformers' BertModel without a pooler.

    The BertModel has text_length positions and two token types, whose embeddings are zero.
    """
    return _export_text_encoder(model, 0, 2)


def _export_image_encoder(model: MaskVLMNetwork, names: dict[str, SourceName]) -> dict[str, Tensor]:
    if isinstance(model.image_encoder, TimmTower):
        raise ConfigError(
            f"image_tower: wanted our ViT, got {model.config.image_tower}, whose module is model.image_encoder.module"
        )
    side = model.config.patch_size
    found = _renamed_copies(model.image_encoder, {ours: to for ours, to in names.items() if ours != "mask_token"})
    for ours, shape in (("patch_projection.weight", (-1, 3, side, side)), ("cls_token", (1, 1, -1))):
        name = str(names[ours])
        found[name] = found[name].reshape(shape)
    name = str(names["position"])
    found[name] = found[name].unsqueeze(0)
    return found


def _export_text_encoder(model: MaskVLMNetwork, first_position: int, token_types: int) -> dict[str, Tensor]:
    if model.config.text_tower:
        raise ConfigError("text_tower: wanted our text encoder, got a text tower, which is model.text_encoder.tower")
    found = _renamed_copies(model.text_encoder, bert_names(model.config.text_layers))
    position = found["embeddings.position_embeddings.weight"]
    found["embeddings.position_embeddings.weight"] = F.pad(position, (0, 0, first_position, 0))
    found["embeddings.token_type_embeddings.weight"] = position.new_zeros(token_types, position.shape[1])
    return found


def _renamed_copies(module: nn.Module, names: dict[str, SourceName]) -> dict[str, Tensor]:
    """Copies of a module's tensors under another library's names, as a state dict.

    names: for each of our tensors, its name there; or (name, 0, 1 or 2) if queries, keys and values are joined there.
    """
    parts: dict[str, list[Tensor]] = {}
    tensors = {name: p.detach() for name, p in module.named_parameters()}
    for ours, theirs in names.items():  # query, key, value: a table lists thirds in their order
        parts.setdefault(theirs[0] if isinstance(theirs, tuple) else theirs, []).append(tensors[ours])
    return {name: torch.cat(found) if len(found) > 1 else found[0].clone() for name, found in parts.items()}
