# torch and timm type the children of a module as Tensor or Module, whatever they are.
# pyright: reportCallIssue=false, reportAttributeAccessIssue=false, reportArgumentType=false
"""Image towers of timm with random weights, compared with timm's own modules.

    PYTHONPATH=tests python -m support.towers --csv benchmarks/results/towers-timm.csv

walks over every model of timm that is a VisionTransformer or an Eva, or comes from the same files, with two layers.
"""

from typing import Any

import timm
import torch
from torch import Tensor, nn

from mvlm.config.model import MaskVLMConfig
from mvlm.model.towers.timm_tower import TimmTower, tower_settings


def tower_config(name: str, **changes: Any) -> MaskVLMConfig:
    """Configuration of a model with a tower of two layers, for images of four patches a side."""
    settings = tower_settings(f"timm:{name}")
    side = 4 * settings["patch_size"]
    sizes: dict[str, Any] = {
        "image_size": side, "mask_block": side // 2, "image_layers": 2, "text_layers": 1, "cross_layers": 1,
        "decoder_layers": 1, "vocab_size": 300, "mask_token_id": 4, "text_length": 12,
    }  # fmt: skip
    return MaskVLMConfig(**(settings | sizes | changes))


def timm_module(config: MaskVLMConfig) -> Any:
    """timm's module with the sizes of a tower, random weights that matter, in float64 and evaluation mode."""
    name = config.image_tower.removeprefix("timm:")
    module = timm.create_model(name, num_classes=0, img_size=config.image_size, depth=config.image_layers)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return module.eval()


def masked_by_a_loop(module: Any, images: Tensor, masked: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
    """Features and pooled rows of timm's module whose embedded patches are replaced one by one where masked (B, N)."""

    def replace(_: nn.Module, __: Any, patches: Tensor) -> Tensor:
        rows = patches.clone().view(len(images), -1, patches.shape[-1])
        for image in range(len(images)):
            for patch in range(rows.shape[1]):
                if masked[image, patch]:
                    rows[image, patch] = token
        return rows.view(patches.shape)

    handle = module.patch_embed.register_forward_hook(replace)
    try:
        features = module.forward_features(images)
    finally:
        handle.remove()
    return features, module.forward_head(features, pre_logits=True)


@torch.no_grad()
def difference(name: str) -> float:
    """Largest difference of a tower's features from timm's, relative to the largest, with and without masks."""
    torch.manual_seed(0)
    config = tower_config(name)
    module, tower = timm_module(config), TimmTower(config).eval()
    tower.module.load_state_dict(module.state_dict())
    tower.mask_token.normal_()
    images = torch.randint(0, 256, (2, 3, config.image_size, config.image_size), dtype=torch.uint8)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (config.image_mean, config.image_std))
    pixels, largest = (images / 255 - mean) / std, 0.0
    for masked in (torch.zeros(2, 16, dtype=torch.bool), torch.rand(2, 16) < 0.5):
        features, pooled = masked_by_a_loop(module, pixels, masked, tower.mask_token)
        rows = features[:, module.num_prefix_tokens :]
        if isinstance(module.norm, nn.Identity):
            rows = module.fc_norm(rows)
        if module.cls_token is not None and module.attn_pool is None and isinstance(module.fc_norm, nn.Identity):
            pooled = features[:, 0]
        wanted, found = torch.cat([pooled[:, None], rows], dim=1), tower(images, masked if masked.any() else None)
        largest = max(largest, float((found - wanted).abs().max() / wanted.abs().max()))
    return largest
