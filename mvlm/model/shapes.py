"""The check of a model's configuration against the header of a file of weights, before the model is built.

A model's settings may come from others, and a network of the sizes that they name may be larger than the machine. So
they are compared with the weights' own shapes first: a network then takes about the memory of its file.
"""

import re
from collections.abc import Mapping
from math import isqrt
from pathlib import Path
from typing import Any

import torch

from mvlm.config.model import MaskVLMConfig
from mvlm.errors import RunError
from mvlm.files import check_fit
from mvlm.model.network import MaskVLMNetwork

Shape = tuple[int, ...]

BLOCKS = {
    "image_layers": "image_encoder",
    "text_layers": "text_encoder",
    "cross_layers": "image_cross",
    "decoder_layers": "image_decoder",
}
"""Settings that count blocks, and a module with so many of them."""
WORDS, TEXT, IMAGE = "text_encoder.words.weight", "text_encoder.position", "image_encoder.position"
PATCHES, EMBEDDING = "image_encoder.patch_projection.weight", "image_projection.weight"


def check_sizes(config: MaskVLMConfig, found: Mapping[str, Shape], file: Path, where: Path) -> None:
    """Raise RunError unless the tensors `found` in a file's header are those of a network of this configuration.

    Further tensors are allowed.

    Args:
        found: names and shapes.
        file: the file of the settings, for the error, which names settings with another size than the weights have.
        where: the file or folder of the weights, for the error.
    """
    stored = stored_sizes(found)
    given = {name: getattr(config, name) for name in stored}
    if wrong := [f"{name} {stored[name]}, got {given[name]}" for name in stored if given[name] != stored[name]]:
        raise RunError(
            f"{file}: wanted the sizes of the weights in {where.name}: {'; '.join(wrong)}; restore the file, or use "
            f"another model"
        )
    # The file has as many blocks, so the network has no more tensors than a file of its kind. On `meta` they take no
    # memory, whatever their shapes are.
    with torch.device("meta"):
        wanted = {name: tuple(tensor.shape) for name, tensor in MaskVLMNetwork(config).state_dict().items()}
    check_fit(wanted, {name: shape for name, shape in found.items() if name in wanted}, where)


def stored_sizes(found: Mapping[str, Shape]) -> dict[str, Any]:
    """Settings of the model that names and shapes of its tensors show, by their names in `MaskVLMConfig`."""
    sizes: dict[str, Any] = {}
    if len(words := found.get(WORDS, ())) == 2:
        sizes |= {"vocab_size": words[0], "width": words[1]}
    if len(text := found.get(TEXT, ())) == 2:
        sizes["text_length"] = text[0]
    if len(embedding := found.get(EMBEDDING, ())) == 2:
        sizes["itc_width"] = embedding[0]
    if len(patch := found.get(PATCHES, ())) == 2:
        sizes["patch_size"] = isqrt(patch[1] // 3)
        if len(image := found.get(IMAGE, ())) == 2 and image[0] > 1:
            sizes["image_size"] = isqrt(image[0] - 1) * sizes["patch_size"]
    numbers: dict[str, set[str]] = {}
    for name in found:
        if block := re.match(r"(\w+)\.blocks\.(\d+)\.", name):
            numbers.setdefault(block[1], set()).add(block[2])
    sizes |= {name: len(numbers[module]) for name, module in BLOCKS.items() if module in numbers}
    if WORDS in found:
        sizes |= {"text_pooling": "text_pooling.out.weight" in found}
        sizes |= {"contrastive": "sigmoid" if "logit_bias" in found else "softmax"}
        sizes |= {"cross_norm": "pre" if "image_cross.norm.weight" in found else "post"}
    return sizes
