"""A trained model for images of another size or texts of another length: its position embeddings resized.

Shape legend: N patches, L tokens, C width.
"""

import logging
from dataclasses import replace

import torch
from torch import Tensor

from mvlm.config.model import MaskVLMConfig
from mvlm.errors import ConfigError
from mvlm.model.encoders import resize_positions
from mvlm.model.maskvlm import MaskVLM
from mvlm.model.towers.text import TextTower
from mvlm.model.towers.timm_tower import MODULE, TimmTower

log = logging.getLogger(__name__)

IMAGE, TEXT = "image_encoder.position", "text_encoder.position"


def resized_model(
    model: MaskVLM, image_size: int | None = None, text_length: int | None = None, trained: bool = False
) -> MaskVLM:
    """A model with the same weights for images of another size or texts of another length, or the model itself.

    Positions of the image are interpolated on their grid (bicubic, as in timm); [CLS] keeps its own. Positions of the
    text are the first ones; those past the pretrained length start from random values, as in pretraining. The log says
    which sizes change.

    Args:
        image_size: side in pixels; None for the model's.
        text_length: longest text in tokens; None for the model's.
        trained: refuse random values, because nothing will train them.

    Raises:
        ConfigError: the size is not one that the model can have, or `trained` and the text is longer.
    """
    before = model.config
    config = resized_config(before, image_size, text_length)
    if config == before:
        return model
    if trained and config.text_length > before.text_length and not config.text_tower:  # which has positions for it
        raise ConfigError(
            f"text_length: wanted at most the {before.text_length} tokens that the model was trained with, got "
            f"{config.text_length}; fine-tune it with --question-length {config.text_length} first"
        )
    resized = MaskVLM(config).to(model.log_scale.device, model.log_scale.dtype)
    resized.load_state_dict(resized_tensors(model, resized))
    log_sizes(before, config)
    for name, parameter in model.named_parameters():
        resized.get_parameter(name).requires_grad_(parameter.requires_grad)
    return resized.train(model.training)


def resized_tensors(model: MaskVLM, wanted: MaskVLM) -> dict[str, Tensor]:
    """All tensors of a model, its positions resized to the sizes of the model `wanted`.

    Tensors of another architecture keep their shapes.
    """
    tensors = dict(model.state_dict())
    image, text, side = wanted.image_encoder, wanted.text_encoder, wanted.config.image_size // wanted.config.patch_size
    if not isinstance(image, TimmTower):
        tensors[IMAGE] = resize_positions(tensors[IMAGE], side)
    elif (name := f"{MODULE}pos_embed") in tensors:
        tensors[name] = image.resized_positions(tensors[name])
    own = tensors.get(TEXT)
    if own is None or isinstance(text, TextTower):
        return tensors
    fresh = text.position.detach().to(own.device)
    if own.shape[1:] == fresh.shape[1:]:
        length = min(len(own), len(fresh))
        tensors[TEXT] = torch.cat([own[:length], fresh[length:].to(own.dtype)])
    return tensors


def log_sizes(before: MaskVLMConfig, after: MaskVLMConfig) -> None:
    """Log which sizes of a model's inputs change."""
    for name, unit in (("image_size", "pixels"), ("text_length", "tokens")):
        old, new = getattr(before, name), getattr(after, name)
        if old != new:
            log.info(
                "%s: %d %s, where the model was trained with %d; position embeddings are resized", name, new, unit, old
            )


def resized_config(
    before: MaskVLMConfig, image_size: int | None = None, text_length: int | None = None
) -> MaskVLMConfig:
    """Configuration with another image size or text length, None for its own. ConfigError if it cannot have that."""
    image_size = before.image_size if image_size is None else image_size
    return replace(
        before, image_size=image_size, text_length=before.text_length if text_length is None else text_length
    )
