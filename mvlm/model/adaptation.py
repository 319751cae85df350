"""How much of each part of a model learns: all of it, or nothing."""

from mvlm.config.groups import RunConfig
from mvlm.model.network import MaskVLMNetwork

PARTS = {
    "image": ("image_encoder",),
    "text": ("text_encoder",),
    "cross": ("image_cross", "text_cross", "image_decoder"),
}
"""Parts of a model, and their modules. Settings are `train_image` and so on."""


def adapt(model: MaskVLMNetwork, config: RunConfig) -> None:
    """Freeze the parts of the model that the settings say, in place."""
    for part, names in PARTS.items():
        for module in (getattr(model, name) for name in names):
            if getattr(config, f"train_{part}") == "frozen":
                module.requires_grad_(False)
