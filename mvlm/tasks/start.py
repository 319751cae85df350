"""The model that fine-tuning starts from: a pretrained one, with its position embeddings resized where needed."""

import logging
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from mvlm.model.maskvlm import MaskVLM
from mvlm.runs.load import load_model
from mvlm.weights.load import resize_positions
from mvlm_dataloading import Tokenizer

log = logging.getLogger(__name__)


def starting_model(
    checkpoint: Path, image_size: int | None = None, text_length: int | None = None, random_weights: bool = False
) -> tuple[MaskVLM, Tokenizer]:
    """A pretrained model for images of another size or texts of another length, and its tokenizer.

    Image positions are interpolated (bicubic, as in timm). Text positions are kept; those past the pretrained length
    start from random values, as in pretraining. Both are logged.

    Args:
        image_size: side in pixels; None for the pretrained one.
        text_length: longest text in tokens; None for the pretrained one.
        random_weights: keep the random weights of the new model, from torch's generator.
    """
    pretrained, tokenizer = load_model(checkpoint)
    before = pretrained.config
    config = replace(before, image_size=image_size or before.image_size, text_length=text_length or before.text_length)
    model = MaskVLM(config)
    if random_weights:
        log.info("%s: only its architecture and tokenizer are used; weights are random", checkpoint)
        return model, tokenizer
    tensors = pretrained.state_dict()
    names = "image_encoder.position", "text_encoder.position"
    image, text = (tensors[name] for name in names)
    tensors[names[0]] = resize_positions(image, config.image_size // config.patch_size)
    tensors[names[1]] = extend_positions(text, model.text_encoder.position.detach())
    for name, old in zip(names, (image, text), strict=True):
        if tensors[name].shape != old.shape:
            log.info("%s: resized from %s to %s", name, tuple(old.shape), tuple(tensors[name].shape))
    model.load_state_dict(tensors)
    return model, tokenizer


def extend_positions(old: Tensor, fresh: Tensor) -> Tensor:
    """Positions with the shape of `fresh`: the first rows of `old`, and rows of `fresh` where `old` has none."""
    length = min(len(old), len(fresh))
    return torch.cat([old[:length], fresh[length:].to(old.dtype)])
