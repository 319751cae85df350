"""CLIP_benchmark with models of mvlm: `python -m mvlm.portable.clip_benchmark eval --model_type mvlm ...`.

It is CLIP_benchmark's own command line with one more value of --model_type. `--pretrained` is a run, a checkpoint, an
exported folder or an id on the hub. `--no_amp` leaves the products of embeddings in fp32.
"""

import sys
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from mvlm.errors import ConfigError
from mvlm.portable.clip_model import ClipParts, create_clip_model
from mvlm.terminal import say
from mvlm_dataloading.errors import need

MODEL_TYPE = "mvlm"


def load(pretrained: str, device: str | torch.device = "cpu", **unused: Any) -> ClipParts:
    """The loading function of `MODEL_TYPE`. CLIP_benchmark also gives it a model's name and a cache folder."""
    return create_clip_model(pretrained, device)


def register() -> Any:
    """Add `MODEL_TYPE` to CLIP_benchmark's model types. Returns the package; ConfigError if it is not installed."""
    try:
        models = need("clip_benchmark.models", "export")
    except ImportError:
        raise ConfigError(
            "clip_benchmark: wanted the package, which is not installed; pip install clip_benchmark"
        ) from None
    models.TYPE2FUNC[MODEL_TYPE] = load
    if MODEL_TYPE not in models.MODEL_TYPES:
        models.MODEL_TYPES.append(MODEL_TYPE)
    return models


class CountsAsScalars(TorchFunctionMode):
    """Context in which `numpy()` of a float32 tensor of shape (1,) returns an array of shape ().

    CLIP_benchmark 1.6 calls `float` on such arrays, its numbers of right answers; NumPy 2.4 refuses the shape (1,).
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.numpy and args[0].shape == (1,) and args[0].dtype == torch.float32:
            args = (args[0].squeeze(), *args[1:])
        return func(*args, **(kwargs or {}))


def main() -> None:
    """Run CLIP_benchmark's command line with `MODEL_TYPE`. ConfigError as `register`."""
    register()
    with CountsAsScalars():
        need("clip_benchmark.cli", "export").main()


if __name__ == "__main__":
    try:
        main()
    except ConfigError as error:
        say(f"mvlm: {error}", file=sys.stderr)
        sys.exit(2)
