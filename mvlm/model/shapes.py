"""Shapes of a model's tensors, from its configuration alone, and the check of a file's header before a model is built.

A model's settings may come from others, and a network of the sizes that they name may be larger than the machine. So
they are compared with the weights' own shapes first: a network then takes about the memory of its file.

Shape legend: C width, V vocabulary, L text length, N patches, P patch side, E contrastive width.
"""

import re
from collections.abc import Iterator, Mapping
from itertools import islice
from math import isqrt
from pathlib import Path
from typing import Any

from mvlm.config.model import MaskVLMConfig
from mvlm.errors import RunError
from mvlm.files import other_tensors

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


def tensor_shapes(config: MaskVLMConfig) -> Iterator[tuple[str, Shape]]:
    """Name and shape of every tensor in the state dict of a network, one after another. Nothing is allocated."""
    width, embedding = config.width, config.itc_width
    yield from _linear("image_encoder.patch_projection", config.patch_values, width)
    yield "image_encoder.mask_token", (width,)
    yield "image_encoder.cls_token", (width,)
    yield IMAGE, (1 + config.num_patches, width)
    yield from _norm("image_encoder.norm", width)
    yield WORDS, (config.vocab_size, width)
    yield TEXT, (config.text_length, width)
    yield from _norm("text_encoder.norm", width)
    yield from _linear("pixel_head", width, config.patch_values)
    yield from _linear("language_head.dense", width, width)
    yield from _norm("language_head.norm", width)
    yield from _linear("language_head.vocabulary", width, config.vocab_size)
    yield from _linear("image_projection", width, embedding)
    yield from _linear("text_projection", width, embedding)
    yield from _linear("matching_head", width, 2)
    yield "log_scale", (1,)
    if config.contrastive == "sigmoid":
        yield "logit_bias", (1,)
    if config.text_pooling:
        yield from _linear("text_pooling.query", embedding, width)
        yield from _linear("text_pooling.key", width, width)
        yield from _linear("text_pooling.value", width, width)
        yield from _linear("text_pooling.out", width, embedding)
    for name, layers in (("image_encoder", config.image_layers), ("text_encoder", config.text_layers)):
        for i in range(layers):
            yield from _block(f"{name}.blocks.{i}", width, ("attention",))
    crossing = ("image_cross", config.cross_layers), ("text_cross", config.cross_layers)
    for name, layers in (*crossing, ("image_decoder", config.decoder_layers)):
        for i in range(layers):
            yield from _block(f"{name}.blocks.{i}", width, ("self_attention", "cross_attention"))
        if config.cross_norm == "pre":
            yield from _norm(f"{name}.norm", width)


def _block(name: str, width: int, attentions: tuple[str, ...]) -> Iterator[tuple[str, Shape]]:
    """Tensors of a block: its attentions, its feed-forward layer, and a norm for each of them."""
    for attention in attentions:
        for part in ("query", "key", "value", "out"):
            yield from _linear(f"{name}.{attention}.{part}", width, width)
    yield from _linear(f"{name}.mlp.up", width, 4 * width)
    yield from _linear(f"{name}.mlp.down", 4 * width, width)
    for number in range(1, len(attentions) + 2):
        yield from _norm(f"{name}.norm{number}", width)


def _linear(name: str, inputs: int, outputs: int) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", (outputs, inputs)
    yield f"{name}.bias", (outputs,)


def _norm(name: str, width: int) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", (width,)
    yield f"{name}.bias", (width,)


def check_sizes(config: MaskVLMConfig, found: Mapping[str, Shape], file: Path, where: Path) -> None:
    """Raise RunError unless the tensors `found` in a file's header are those of a network of this configuration.

    Further tensors are allowed. The time is that of reading the header, whatever the settings are.

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
    # Few are looked at where blocks are missing, however many the settings ask for.
    differing = (
        f"{name} missing" if name not in found else f"{name} wanted {shape}, got {found[name]}"
        for name, shape in tensor_shapes(config)
        if found.get(name) != shape
    )
    if first := list(islice(differing, 4)):
        raise other_tensors(where, first[:3], " and more" if len(first) > 3 else "")


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
