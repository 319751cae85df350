"""Sources of pretrained weights: state dicts and safetensors files. Nothing is unpickled."""

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mvlm.errors import RunError

Source = Mapping[str, Tensor] | str | Path
"""A state dict, a .safetensors file, or a folder with a model.safetensors."""


def read_source(source: Source) -> dict[str, Tensor]:
    """Read all tensors of a source by name. RunError for a file that is missing or is not safetensors."""
    if isinstance(source, Mapping):
        return dict(source)
    path = Path(source) / "model.safetensors" if Path(source).is_dir() else Path(source)
    if path.suffix != ".safetensors":
        raise RunError(
            f"{path}: wanted a .safetensors file; another kind may run code when it is read, so convert it first"
        )
    try:
        return load_file(path)
    except FileNotFoundError:
        raise RunError(f"{path}: wanted a safetensors file, found none") from None
    except (OSError, SafetensorError) as error:
        raise RunError(f"{path}: wanted a safetensors file, got one that cannot be read: {error}") from None


def split_prefix(tensors: Mapping[str, Tensor], anchor: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Find a model inside another one, by the prefix that its tensor `anchor` has (`vit.`, `roberta.`, `module.`).

    Returns the tensors with this prefix, without it in their names, and the other tensors. If several tensors are
    called `anchor`, the shortest prefix is taken; if none is, all tensors are returned as they are.
    """
    prefixes = sorted((name.removesuffix(anchor) for name in tensors if name.endswith(anchor)), key=len)
    prefix = prefixes[0] if prefixes else ""
    inside = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    return inside, {name: t for name, t in tensors.items() if not name.startswith(prefix)}
