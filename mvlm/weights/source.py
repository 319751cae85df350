"""Sources of pretrained weights: state dicts and safetensors files. Nothing is unpickled."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mvlm.errors import RunError

log = logging.getLogger(__name__)

Source = Mapping[str, Tensor] | str | Path
"""A state dict, a .safetensors file, or a folder with a model.safetensors."""
Tower = Literal["image", "text"]
"""The encoder that is looked for in a source."""

PARTS: dict[Tower, tuple[str, ...]] = {
    "image": ("vision_config", "image_config", "encoder"),
    "text": ("text_config", "decoder"),
}
"""Where the config.json of a model that contains an encoder keeps that encoder's settings."""
BERT, ROBERTA = "bert", "roberta"
TEXT_FAMILIES = {
    **dict.fromkeys(
        ("bert", "electra", "ernie", "splinter", "big_bird", "dpr", "chinese_clip_text_model", "align_text_model"), BERT
    ),
    **dict.fromkeys(("roberta", "xlm-roberta", "camembert", "data2vec-text", "bridgetower_text_model"), ROBERTA),
}
"""model_type in transformers of text encoders that compute what ours does -> the one whose positions they have."""
EXACT_GELU = ("gelu", "gelu_python")
"""Names in transformers of the GELU that our encoders compute."""
TANH_GELU = ("gelu_new", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_fast", "gelu_accurate")
"""Names of its approximation by tanh. Values differ by less than 0.0005."""


def read_source(source: Source, tower: Tower, heads: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read all tensors of a source by name, for one of the encoders, with a number of attention heads.

    Returns the tensors, and the encoder's settings in the config.json beside them, none if there is no such file.
    RunError for a file that is missing or is not safetensors, or beside which a config.json says that its model
    computes something else.
    """
    if isinstance(source, Mapping):
        return dict(source), {}
    path = Path(source) / "model.safetensors" if Path(source).is_dir() else Path(source)
    if path.suffix != ".safetensors":
        raise RunError(
            f"{path}: wanted a .safetensors file; another kind may run code when it is read, so convert it first"
        )
    try:
        tensors = load_file(path)
    except FileNotFoundError:
        index = path.with_name(path.name + ".index.json")
        if index.is_file():
            raise RunError(
                f"{path}: wanted one safetensors file, found {index.name} of several; join them: load the model in "
                f'transformers and save it with save_pretrained(..., max_shard_size="100GB")'
            ) from None
        raise RunError(f"{path}: wanted a safetensors file, found none") from None
    except (OSError, SafetensorError) as error:
        raise RunError(f"{path}: wanted a safetensors file, got one that cannot be read: {error}") from None
    return tensors, _checked_settings(path.parent / "config.json", tower, heads)


def _checked_settings(path: Path, tower: Tower, heads: int) -> dict[str, Any]:
    """Settings of an encoder in a config.json, if there is one, after a check of what the tensors do not show."""
    if not path.is_file():
        return {}
    try:
        config = dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise RunError(f"{path}: wanted the configuration of the weights beside it, got {error}; remove it") from None
    if "num_attention_heads" not in config:
        config = next((part for name in PARTS[tower] if isinstance(part := config.get(name), dict)), config)
    (_check_text if tower == "text" else _check_image)(path, config)
    found = config.get("num_attention_heads")
    if found is None:
        log.warning(
            "%s: wanted num_attention_heads, to compare it with the model's %d, found none; set --model.heads to the "
            "source's",
            path,
            heads,
        )
    elif found != heads:
        raise RunError(
            f"{path}: wanted num_attention_heads {heads}, as in the model, got {found!r}: with other heads the same "
            f"weights compute something else; set --model.heads {found}"
        )
    activation = config.get("hidden_act", "gelu")
    if activation in TANH_GELU:
        log.warning("%s: wanted hidden_act gelu, got %s; features will differ slightly", path, activation)
    elif activation not in EXACT_GELU:
        raise RunError(f"{path}: wanted hidden_act gelu, got {activation!r}; take weights that were trained with it")
    return config


def _check_image(path: Path, config: Mapping[str, Any]) -> None:
    """RunError for a ViT of timm with rotary positions, which may store no tensor of them."""
    architecture = str(config.get("architecture"))
    if "rope" in architecture:
        raise RunError(
            f"{path}: wanted a ViT with added positions alone, got {architecture}, which also rotates queries and "
            f"keys; take another source"
        )


def _check_text(path: Path, config: Mapping[str, Any]) -> None:
    """RunError for a text model that computes something else with tensors of the same names and shapes."""
    kind = config.get("model_type")
    if kind is not None and str(kind) not in TEXT_FAMILIES:
        raise RunError(
            f"{path}: wanted a model_type of {', '.join(TEXT_FAMILIES)}, got {kind!r}; give weights of another model a "
            f"folder of their own, and the state dict of a BERT or RoBERTa under another name to load_hf_bert or "
            f"load_hf_roberta"
        )
    if config.get("is_decoder"):
        raise RunError(
            f"{path}: wanted an encoder, got is_decoder {config['is_decoder']!r}, where no word sees the words after "
            f"it; take another source"
        )
    if config.get("rescale_embeddings"):
        raise RunError(
            f"{path}: wanted word embeddings as they are stored, got rescale_embeddings "
            f"{config['rescale_embeddings']!r}, which multiplies them by the root of the width; take another source"
        )
    pad = config.get("pad_token_id", 0)
    if TEXT_FAMILIES.get(str(kind)) == ROBERTA and (not isinstance(pad, int) or pad < 0):
        raise RunError(f"{path}: wanted pad_token_id, after which positions start, got {pad!r}; correct it")


def split_prefix(tensors: Mapping[str, Tensor], anchor: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Find a model inside another one, by the prefix that its tensor `anchor` has (`vit.`, `roberta.`, `module.`).

    Returns the tensors with this prefix, without it in their names, and the other tensors. Of a model inside another
    one with the same tensor, the outer one is taken. If no tensor is called `anchor`, all are returned as they are.
    RunError for several models side by side, such as a student and its teacher.
    """
    prefixes = sorted((name.removesuffix(anchor) for name in tensors if name.endswith(anchor)), key=len)
    prefix = prefixes[0] if prefixes else ""
    if beside := [other for other in prefixes if not other.startswith(prefix)]:
        raise RunError(
            f"{anchor}: wanted one encoder, found several, {', '.join((prefix, *beside))}; "
            f"give the state dict or file of one of them alone"
        )
    inside = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    return inside, {name: t for name, t in tensors.items() if not name.startswith(prefix)}
