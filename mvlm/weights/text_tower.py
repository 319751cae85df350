"""Text towers from folders of transformers: settings, tokenizer and weights. Nothing is unpickled."""

import json
import logging
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mvlm.errors import RunError
from mvlm.files import copy_into, read_safetensors, read_shapes
from mvlm.model.network import MaskVLMNetwork
from mvlm.model.towers.text import FAMILIES, TextTower
from mvlm.untrusted import read_json
from mvlm.weights.load import current_norm_name, split_prefix, weights_file
from mvlm_dataloading import DataError, Tokenizer, load_tokenizer
from mvlm_dataloading.errors import need

log = logging.getLogger(__name__)

HALVES = {"clip": "clip_text_model", "siglip": "siglip_text_model"}
"""model_type of models of images and texts -> that of their text half, whose settings are their `text_config`."""
PROJECTION = re.compile(r"(^|\.)(text_projection|text_model\.head|^head)\.(weight|bias)$")
"""Names of the layer from a caption's feature to its embedding, in CLIP and in SigLIP."""
NOT_OF_TOWER = ("pooler.", "embeddings.position_ids", "embeddings.token_type_ids")
"""Prefixes of names of tensors that a file may have and a text tower does not: they are ignored."""
NOT_COMPUTED = ("transformers_version", "architectures", "dtype", "torch_dtype", "_name_or_path", "auto_map")
NOT_COMPUTED += ("num_labels", "id2label", "label2id")
"""Settings of transformers that say nothing of what a tower computes."""


def read_tower_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a text tower, with the special tokens that it lacks: a mask, padding, and for SigLIP a [CLS].

    Raises:
        RunError: the folder has no text encoder that can be a tower.
        DataError: it has no tokenizer.json that fits.
    """
    kind, _ = _read_settings(folder / "config.json")
    file, unmasked = folder / "tokenizer.json", FAMILIES[kind].unmasked
    tokenizer = load_tokenizer(file, ("mask", "pad", *(["cls"] if unmasked else [])))
    text = "a photo"
    wanted, found = tokenizer.encode([text], 32)[0].tolist(), tokenizer.with_own_specials(text)
    if not unmasked and found not in (wanted, wanted[1:-1]):  # a file without a rule adds none
        raise DataError(
            f"text_tower: {file}: wanted a text between {tokenizer.token(wanted[0])} ({wanted[0]}) and "
            f"{tokenizer.token(wanted[-1])} ({wanted[-1]}), but its own rule makes {found} of {text!r}; declare the "
            f"special tokens that the tower was trained with among its added_tokens"
        )
    return tokenizer


def read_text_tower(folder: Path) -> dict[str, Any]:
    """Settings of a model that has the text encoder of a folder as its tower, from the folder.

    They are `text_tower`, `vocab_size`, and `itc_width` if the folder has a projection to embeddings. The log says
    which tokens are new, and which encoder reads from left to right. Errors are those of `read_tower_tokenizer`.
    """
    kind, values = _read_settings(folder / "config.json")
    file, tokenizer, family = weights_file(folder), read_tower_tokenizer(folder), FAMILIES[kind]
    for number, name in tokenizer.added.items():
        log.warning(
            "text_tower: %s has no %s; token %d is a new one, and its embedding starts as the mean of the others",
            folder, name, number,
        )  # fmt: skip
    if family.causal:
        log.warning("text_tower: %s reads from left to right: MLM has the tokens before a mask, and the image", folder)
    if family.unmasked and (padding := _padding(folder, tokenizer)) is not None:
        values["pad_token_id"] = padding
    try:
        config = need("transformers", "integrations").AutoConfig.for_model(kind, **values)
    except Exception as error:  # transformers has many kinds
        raise RunError(
            f"text_tower: {folder}: wanted settings of a {kind}, transformers refuses them ({error})"
        ) from None
    values = {name: value for name, value in config.to_diff_dict().items() if name not in NOT_COMPUTED}
    values |= {"model_type": kind, "vocab_size": max(config.vocab_size, tokenizer.vocab_size)}
    settings = {"text_tower": json.dumps(values, sort_keys=True), "vocab_size": tokenizer.vocab_size}
    widths = [s[0] for name, s in read_shapes(file).items() if len(s) == 2 and PROJECTION.search(name)]
    return settings | ({"itc_width": widths[0]} if widths else {})


def load_text_tower(model: MaskVLMNetwork, folder: Path) -> None:
    """Load a model's text tower, and the projection of its captions, from the folder that `read_text_tower` has read.

    Tokens that the tokenizer got, or that the embedding has no row for, get the mean of the other rows. RunError if a
    tensor is missing, unexpected, of another shape or not finite.
    """
    encoder, file = model.text_encoder, weights_file(folder)
    assert isinstance(encoder, TextTower)
    wanted = encoder.tower.state_dict()
    embedding = encoder.tower.get_input_embeddings()
    words = next(f"{name}.weight" for name, module in encoder.tower.named_modules() if module is embedding)
    tensors = {current_norm_name(name): tensor for name, tensor in read_safetensors(file).items()}
    projection = {found[3]: tensors.pop(name) for name in [*tensors] if (found := PROJECTION.search(name))}
    found, _ = split_prefix(tensors, words)
    found = {name: tensor for name, tensor in found.items() if not name.startswith(NOT_OF_TOWER)}
    if words in found:
        found[words] = with_new_rows(found[words], len(wanted[words]), read_tower_tokenizer(folder).added)
    copy_into(wanted, found, file)
    if projection:
        layer = model.text_projection
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
        own = {"weight": layer.weight.detach()[:, : encoder.tower.config.hidden_size], "bias": layer.bias.detach()}
        copy_into({name: own[name] for name in projection}, projection, file)


def with_new_rows(embedding: Tensor, rows: int, new: Collection[int]) -> Tensor:
    """Extend an embedding (V, C) to `rows` rows; those of the token ids `new` and those past V are the others' mean."""
    old = torch.ones(rows, dtype=torch.bool)
    old[len(embedding) :] = False
    old[[*new]] = False
    found = torch.cat([embedding[:rows], embedding.new_zeros(max(0, rows - len(embedding)), embedding.shape[1])])
    return torch.where(old[:, None], found, found[old].float().mean(0).to(found.dtype))


def _read_settings(file: Path) -> tuple[str, dict[str, Any]]:
    """The model_type and the other settings of the text encoder in a config.json. RunError for another model."""
    values = _read_json(file)
    kind = values.get("model_type")
    if kind in HALVES:
        kind, values = HALVES[kind], dict(values.get("text_config") or {})
    values = {name: value for name, value in values.items() if name not in ("model_type", *NOT_COMPUTED)}
    if values.get("is_decoder"):
        reason = f"a {kind} with is_decoder, where no word sees the words after it"
    elif values.get("is_encoder_decoder"):
        reason = f"{kind}, whose encoder has a decoder"
    else:
        reason = f"{kind}, whose features nobody has compared here"
    if kind not in FAMILIES or values.get("is_decoder"):
        raise RunError(
            f"text_tower: {file}: wanted one of {', '.join((*FAMILIES, *HALVES))}, got {reason}; take another"
        )
    return kind, values


def _padding(folder: Path, tokenizer: Tokenizer) -> int | None:
    """Id of the padding token that a folder's tokenizer_config.json names, such as SigLIP's </s>; None without one."""
    file = folder / "tokenizer_config.json"
    named = _read_json(file).get("pad_token") if file.is_file() else None
    name = named.get("content") if isinstance(named, dict) else named
    return next((i for i in (tokenizer.pad_id, tokenizer.sep_id) if tokenizer.token(i) == name), None)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        return dict(read_json(file, "settings", "JSON of transformers' save_pretrained"))
    except FileNotFoundError:
        found = f"wanted a folder that transformers' save_pretrained wrote, found no {file.name} in it"
        raise RunError(f"text_tower: {file.parent}: {found}; save the model and its tokenizer there") from None
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise RunError(f"text_tower: {file}: wanted JSON of transformers' save_pretrained, got {error}") from None
