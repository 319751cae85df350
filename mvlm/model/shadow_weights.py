"""Shadow weights of a model: which parameters have copies in the dtype of products (`mvlm_kernels.shadows`)."""

from collections.abc import Iterator

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from mvlm.model.attention import Attention, FeedForward, adds_bias_later
from mvlm.model.encoders import CrossBlock, ImageBlock, TextBlock
from mvlm_kernels.shadows import Shadows


def shadow_weights(model: nn.Module, dtype: torch.dtype = torch.bfloat16) -> Shadows | None:
    """Copies of the linear layers of our blocks, for the fast implementation under autocast of this dtype.

    None for sharded parameters, which FSDP2 gathers in the dtype of products. Weights with an adapter have no copy: they
    are computed in every step. Nor have the blocks of towers, whose code is another library's.
    """
    if any(isinstance(p, DTensor) for p in model.parameters()):
        return None
    blocks = [m for m in model.modules() if isinstance(m, ImageBlock | TextBlock | CrossBlock)]
    stacks = [stack for block in blocks for stack in _stacks(block)]
    groups = [_products_of_autocast(block) for block in blocks]
    return Shadows([stack for stack in stacks if stack], [group for group in groups if group], dtype)


def _stacks(block: nn.Module) -> Iterator[list[nn.Parameter]]:
    """Parameters of a block, those together that one product reads: of queries, keys and values."""
    for module in block.modules():
        if isinstance(module, Attention):
            projections = module.query, module.key, module.value
            yield [p for layer in projections for p in _parameters(layer, "weight")]
            yield [p for layer in projections for p in _parameters(layer, "bias")]
            yield from ([p] for p in _parameters(module.out, "weight", "bias"))
        if isinstance(module, FeedForward):
            yield from ([p] for layer in (module.up, module.down) for p in _parameters(layer, "weight", "bias"))


def _products_of_autocast(block: nn.Module) -> list[nn.Parameter]:
    """Parameters of a block that `torch.nn.functional.linear` reads."""
    found: list[nn.Parameter] = []
    for name, module in block.named_modules():
        if isinstance(module, Attention):
            found += _ending(module.out)
            # Queries of self-attention are projected with keys and values, but for a few rows of the last blocks.
            found += _parameters(module.query, "weight", "bias")
        if isinstance(module, FeedForward):
            found += _ending(module.up)
    return found


def _ending(layer: nn.Linear) -> list[nn.Parameter]:
    """Parameters of a layer that `mvlm.model.attention.project` reads in the dtype of products."""
    return _parameters(layer, *(["weight"] if adds_bias_later(layer.weight.device) else ["weight", "bias"]))


def _parameters(layer: nn.Linear, *names: str) -> list[nn.Parameter]:
    found = dict(layer.named_parameters(recurse=False))
    return [found[name] for name in names if name in found]
