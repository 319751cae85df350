"""An image encoder of timm: its own module, with masked patches, behind the interface of our ViT.

Only timm's own code computes: patch embedding, positions (learned, rotary or both), registers, norms, blocks, pooling.
timm is imported when a tower is made.

Shape legend: B batch, N patches, C width of the model, W width of the tower, S image side.
"""

import difflib
from typing import Any

import torch
from torch import Tensor, nn

from mvlm.config.model import MaskVLMConfig
from mvlm.errors import ConfigError
from mvlm.model.encoders import BaseImageEncoder
from mvlm_dataloading.errors import need

PREFIX = "timm:"
MODULE = "image_encoder.module."
"""Prefix of the names of timm's tensors in a model."""


class TimmTower(BaseImageEncoder):
    """A VisionTransformer or Eva of timm. A learned mask token stands for each masked patch, in front of positions.

    Row 0 of its features is the output of its attention pooling, or else [CLS]; without either, and where the last norm
    is behind the pooling, what timm's own head would read. If the model is wider than the tower, the linear layer
    `bridge` follows; it starts as the identity, padded with zeros.

    ConfigError for a module that cannot be a tower, and for sizes that are not the module's.
    """

    def __init__(self, config: MaskVLMConfig) -> None:
        super().__init__(config)
        self.module = make_module(config.image_tower, img_size=config.image_size, depth=config.image_layers)
        width, patch = self.module.embed_dim, self.module.patch_embed.patch_size[0]
        if patch != config.patch_size:
            raise ConfigError(f"patch_size: wanted {patch}, as {config.image_tower} has, got {config.patch_size}")
        if config.width < width:
            raise ConfigError(f"width: wanted at least the {width} of {config.image_tower}, got {config.width}")
        self.mask_token = nn.Parameter(torch.zeros(width))
        self.bridge = nn.Identity()
        if config.width > width:
            self.bridge = nn.Linear(width, config.width)
            nn.init.eye_(self.bridge.weight)
            nn.init.zeros_(self.bridge.bias)

    @property
    def blocks(self) -> list[nn.Module]:
        """The blocks of timm's module."""
        return list(self.module.blocks)

    def forward(self, images: Tensor, masked: Tensor | None = None) -> Tensor:
        patches = self.project(images)
        return self.run(patches if masked is None else self.hide(patches, masked))

    def project(self, images: Tensor) -> Tensor:
        """Embed patches, without positions: images (B, 3, S, S), uint8 or float in 0..1 -> (B, N, W)."""
        patches = self.module.patch_embed(self.normalize(images))
        # In the parameters' dtype, which the residual stream then has under autocast too.
        return patches.flatten(1, -2).to(self.mask_token.dtype)

    def hide(self, patches: Tensor, masked: Tensor) -> Tensor:
        """Replace embedded patches (B, N, W) by the mask token where masked, bool (B, N), is True."""
        return torch.where(masked.unsqueeze(-1), self.mask_token, patches)

    def run(self, patches: Tensor) -> Tensor:
        """Run all but the patch embedding over embedded patches (B, N, W) -> features (B, 1+N, C)."""
        module = self.module
        if module.dynamic_img_size:
            patches = patches.unflatten(1, module.patch_embed.grid_size)
        placed = module._pos_embed(patches)
        x, rope = placed if isinstance(placed, tuple) else (placed, None)  # Eva returns its rotations too
        x = module.norm_pre(x)
        for number, block in enumerate(module.blocks):
            x = block(x) if rope is None else block(x, rope=rope[number] if module.rope_mixed else rope)
        x = module.norm(x)
        rows = x[:, module.num_prefix_tokens :]
        if isinstance(module.norm, nn.Identity):  # the last norm is behind the pooling; patches need one too
            rows = module.fc_norm(rows)
        x = torch.cat([self._pooled(x).unsqueeze(1), rows], dim=1)  # (B, 1+N, W)
        return self.add_output_positions(self.bridge(x).to(x.dtype))

    def _pooled(self, x: Tensor) -> Tensor:
        """Row that stands for the whole image, (B, W): the tower's [CLS], or its own pooling of the last block."""
        module = self.module
        if module.cls_token is not None and module.attn_pool is None and isinstance(module.fc_norm, nn.Identity):
            return x[:, 0]
        return module.forward_head(x, pre_logits=True)

    def resized_positions(self, position: Tensor) -> Tensor:
        """Resample position embeddings (1, P, W), of images of another size, to (1, P', W) for this tower's images."""
        from timm.layers.pos_embed import resample_abs_pos_embed

        prefix = 0 if self.module.no_embed_class else self.module.num_prefix_tokens
        grid = list(self.module.patch_embed.grid_size)
        return resample_abs_pos_embed(position, new_size=grid, num_prefix_tokens=prefix)


def make_module(tower: str, pretrained: bool = False, **sizes: Any) -> Any:
    """Make timm's module of a tower, timm:NAME. ConfigError for a name that timm does not have, or that is no tower.

    pretrained: download its weights; the module then has its classifier. sizes: further arguments of timm's
    `create_model`.
    """
    name = tower.removeprefix(PREFIX)
    if name == tower:
        raise ConfigError(f"image_tower: wanted {PREFIX}NAME, a model of timm, got {tower!r}")
    timm: Any = need("timm", "integrations")
    if ":" in name or not timm.is_model(name):  # a colon is a hub's or a folder's
        near = difflib.get_close_matches(name.split(".")[0], timm.list_models(), 1)
        meant = f"; did you mean {PREFIX}{near[0]}?" if near else "; timm.list_models() has the names"
        raise ConfigError(f"image_tower: wanted a model that timm {timm.__version__} has, got {name!r}{meant}")
    try:
        module = timm.create_model(name, pretrained=pretrained, **({} if pretrained else {"num_classes": 0}), **sizes)
    except (TypeError, ValueError, AssertionError) as error:
        given = ", ".join(f"{key} {value}" for key, value in sizes.items())
        raise ConfigError(f"image_tower: wanted {name} with {given}, which timm does not make: {error}") from None
    if reason := why_no_tower(module):
        raise ConfigError(f"image_tower: wanted a VisionTransformer or Eva of square patches, got {name}: {reason}")
    if getattr(module, "rope", None) is not None:
        module.rope.aug_active = False  # random shifts of positions in training, which a resumed run would not repeat
    return module


def why_no_tower(module: Any) -> str:
    """Reason why a module of timm cannot be a tower; empty if it can."""
    from timm.layers.patch_embed import PatchEmbed
    from timm.models.eva import Eva
    from timm.models.vision_transformer import VisionTransformer

    if type(module) not in (VisionTransformer, Eva):
        return f"it is a {type(module).__name__}"
    if not hasattr(module, "attn_pool"):
        return "it has no attn_pool, so timm is too old; update it"
    embed = module.patch_embed
    if type(embed) is not PatchEmbed:
        return f"its patches come from a {type(embed).__name__}"
    if len({*embed.patch_size}) > 1 or len({*embed.grid_size}) > 1:
        return f"patches of {embed.patch_size} pixels in a grid of {embed.grid_size} are not square"
    if not isinstance(module.patch_drop, nn.Identity | None):
        return "it drops patches in training"
    return ""


def tower_settings(tower: str, image_size: int | None = None) -> dict[str, Any]:
    """Settings of a model that suit an image tower, by their names in `MaskVLMConfig`: the tower's sizes, and others.

    Masked blocks have sides near 32 pixels. With a tower from CLIP or SigLIP, contrastive embeddings have its width,
    and with one from SigLIP the loss is the sigmoid.

    Args:
        image_size: side of images in pixels; by default that of the tower's pretraining.
    """
    with torch.device("meta"):
        module = make_module(tower) if image_size is None else make_module(tower, img_size=image_size)
    source, (patch, _), (side, _) = module.pretrained_cfg, module.patch_embed.patch_size, module.patch_embed.grid_size
    width = module.embed_dim
    blocks = [patch * n for n in range(1, side + 1) if side % n == 0]
    heads = [n for n in range(1, max(1, width // 64) + 1) if width % n == 0]
    found = {
        "image_tower": tower,
        "image_size": patch * side,
        "patch_size": patch,
        "mask_block": min(blocks, key=lambda block: abs(block - 32)),
        "width": width,
        "heads": heads[-1],
        "image_layers": len(module.blocks),
        "image_mean": tuple(source["mean"]),
        "image_std": tuple(source["std"]),
    }
    if "siglip" in tower:
        found |= {"itc_width": width, "contrastive": "sigmoid", "temperature": 0.1}
    elif "clip" in tower and "_ft_" not in str(source["tag"]):
        found |= {"itc_width": source["num_classes"]}
    return found
