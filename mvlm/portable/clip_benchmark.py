"""CLIP_benchmark with models of mvlm: `python -m mvlm.portable.clip_benchmark eval --model_type mvlm ...`.

It is CLIP_benchmark's own command line with one more value of --model_type. `--pretrained` is a run, a checkpoint, an
exported folder or an id on the hub. `--no_amp` leaves the products of embeddings in fp32.
"""

import sys
from typing import Any

import torch

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
    # CLIP_benchmark 1.6 asks for `float` of an array of one value, which NumPy 2.4 refuses.
    setattr(need("clip_benchmark.metrics.zeroshot_classification", "export"), "float", _float)  # noqa: B010
    models.TYPE2FUNC[MODEL_TYPE] = load
    if MODEL_TYPE not in models.MODEL_TYPES:
        models.MODEL_TYPES.append(MODEL_TYPE)
    return models


def _float(value: Any) -> float:
    """`float`, also of an array or a tensor of one value."""
    return float(value.item() if hasattr(value, "item") else value)


if __name__ == "__main__":
    try:
        register()
    except ConfigError as error:
        say(f"mvlm: {error}", file=sys.stderr)
        sys.exit(2)
    from clip_benchmark.cli import main

    main()
