"""Sources of pretrained weights: state dicts and safetensors files. Nothing is unpickled."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mvlm.errors import RunError

log = logging.getLogger(__name__)

Source = Mapping[str, Tensor] | str | Path
"""A state dict, a .safetensors file, or a folder with a model.safetensors."""


EXACT_GELU = ("gelu", "gelu_python")
"""Names in transformers of the GELU that our encoders compute."""
TANH_GELU = ("gelu_new", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_fast", "gelu_accurate")
"""Names of its approximation by tanh. Values differ by less than 0.0005."""


def read_source(source: Source, heads: int) -> dict[str, Tensor]:
    """Read all tensors of a source by name, for an encoder with a number of attention heads.

    RunError for a file that is missing or is not safetensors, or beside which a config.json says that its model
    computes something else.
    """
    if isinstance(source, Mapping):
        return dict(source)
    path = Path(source) / "model.safetensors" if Path(source).is_dir() else Path(source)
    if path.suffix != ".safetensors":
        raise RunError(
            f"{path}: wanted a .safetensors file; another kind may run code when it is read, so convert it first"
        )
    try:
        tensors = load_file(path)
    except FileNotFoundError:
        raise RunError(f"{path}: wanted a safetensors file, found none") from None
    except (OSError, SafetensorError) as error:
        raise RunError(f"{path}: wanted a safetensors file, got one that cannot be read: {error}") from None
    _check_config(path.parent / "config.json", heads)
    return tensors


def _check_config(path: Path, heads: int) -> None:
    """Check what the tensors' shapes do not show: heads and activation, if transformers has written them to a file."""
    if not path.is_file():
        return
    try:
        config = dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise RunError(f"{path}: wanted the configuration of the weights beside it, got {error}; remove it") from None
    found = config.get("num_attention_heads", heads)
    if found != heads:
        raise RunError(
            f"{path}: wanted num_attention_heads {heads}, as in the model, got {found!r}: with other heads the same "
            f"weights compute something else; set --model.heads {found}"
        )
    activation = config.get("hidden_act", "gelu")
    if activation in TANH_GELU:
        log.warning("%s: wanted hidden_act gelu, got %s; features will differ slightly", path, activation)
    elif activation not in EXACT_GELU:
        raise RunError(f"{path}: wanted hidden_act gelu, got {activation!r}; take weights that were trained with it")


def split_prefix(tensors: Mapping[str, Tensor], anchor: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Find a model inside another one, by the prefix that its tensor `anchor` has (`vit.`, `roberta.`, `module.`).

    Returns the tensors with this prefix, without it in their names, and the other tensors. If several tensors are
    called `anchor`, the shortest prefix is taken; if none is, all tensors are returned as they are.
    """
    prefixes = sorted((name.removesuffix(anchor) for name in tensors if name.endswith(anchor)), key=len)
    prefix = prefixes[0] if prefixes else ""
    inside = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    return inside, {name: t for name, t in tensors.items() if not name.startswith(prefix)}
