"""Small encoders of timm and transformers with random weights, in float64."""

from collections.abc import Mapping
from typing import Any

import torch

from mvlm.config.model import MaskVLMConfig
from mvlm.model.maskvlm import MaskVLM
from support.models import micro_batch


def timm_vit(seed: int = 0, **changes: Any) -> Any:
    """timm's VisionTransformer with the sizes of the micro model."""
    from timm.models.vision_transformer import VisionTransformer

    settings: dict[str, Any] = {
        "img_size": 32,
        "patch_size": 8,
        "embed_dim": 16,
        "depth": 2,
        "num_heads": 2,
        "num_classes": 0,
    }
    return randomized(VisionTransformer(**(settings | changes)), seed)


def hf_text(kind: str, **changes: Any) -> Any:
    """transformers' model `kind`, such as "Roberta" or "Bert", with the sizes of the micro model."""
    import transformers

    settings: dict[str, Any] = {
        "vocab_size": 300, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
        "layer_norm_eps": 1e-5, "max_position_embeddings": 20,
    }  # fmt: skip
    if kind == "Roberta":
        settings |= {"type_vocab_size": 1, "pad_token_id": 1}
    config = getattr(transformers, f"{kind}Config")(**(settings | changes))
    return randomized(getattr(transformers, f"{kind}Model")(config, add_pooling_layer=False), 1)


def hf_vit(seed: int = 5, **changes: Any) -> Any:
    """transformers' ViTModel with the sizes of the micro model."""
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8,
        layer_norm_eps=1e-6,
    )  # fmt: skip
    return randomized(ViTModel(config, add_pooling_layer=False, **changes), seed)


def old_vit_names(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of transformers' ViTModel under the names of files on the hub."""
    modules = {
        "attention.q_proj": "attention.attention.query", "attention.k_proj": "attention.attention.key",
        "attention.v_proj": "attention.attention.value", "attention.o_proj": "attention.output.dense",
        "mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense", "layers.": "encoder.layer.",
    }  # fmt: skip
    for new, old in modules.items():
        tensors = {name.replace(new, old): t for name, t in tensors.items()}
    return dict(tensors)


def randomized(module: Any, seed: int) -> Any:
    """The module in float64 and evaluation mode, its parameters random and large enough to matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return module.double().eval()


def normalized(config: MaskVLMConfig, images: torch.Tensor) -> torch.Tensor:
    """Images (B, 3, S, S) uint8 -> float64, as the models of timm and transformers take them."""
    mean, std = (torch.tensor(x).double().view(3, 1, 1) for x in (config.image_mean, config.image_std))
    return (images.double() / 255 - mean) / std


def assert_same_image_features(model: MaskVLM, theirs: Any) -> None:
    """The image encoder and a model of timm give the same features for a batch of images."""
    images = micro_batch()[0].images
    with torch.no_grad():
        wanted, found = theirs.forward_features(normalized(model.config, images)), model.encode_image(images)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)


def assert_same_text_features(model: MaskVLM, theirs: Any, pad: int = 1) -> None:
    """The text encoder and a model of transformers give the same features for a batch of captions."""
    batch = micro_batch()[0]
    w, key_mask = model.encode_text(batch.tokens, batch.cu_seqlens, batch.max_length)
    ids = torch.full(key_mask.shape, pad)
    ids[key_mask] = batch.tokens
    with torch.no_grad():
        wanted = theirs(input_ids=ids, attention_mask=key_mask.long()).last_hidden_state
    torch.testing.assert_close(w[key_mask].detach(), wanted[key_mask], rtol=0, atol=1e-10)
