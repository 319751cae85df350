"""Shadow weights of a model: the parameters that have copies in the dtype of products (`mvlm_kernels.shadows`)."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from mvlm.model.attention import Attention, FeedForward, adds_bias_later
from mvlm.model.encoders import CrossBlock, ImageBlock, TextBlock
from mvlm_kernels.shadows import Shadows

Block = ImageBlock | TextBlock | CrossBlock


def shadow_weights(model: nn.Module, dtype: torch.dtype = torch.bfloat16) -> Shadows | None:
    """Copies of the linear layers of our blocks, for the fast implementation under autocast of this dtype.

    None for sharded parameters: FSDP2 gathers them in the dtype of products. Weights with an adapter have no copy, as
    they are computed in every step, nor have blocks of towers, which run the code of other libraries.
    """
    if any(isinstance(p, DTensor) for p in model.parameters()):
        return None
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    stacks = [stack for block in blocks for stack in _stacks(block) if stack]
    groups = [group for block in blocks if (group := _read_under_autocast(block))]
    return Shadows(stacks, groups, dtype)


def using(shadows: Shadows | None) -> AbstractContextManager[None]:
    """Context of the forward and backward passes of a step: the copies are made and read, if there are any."""
    return nullcontext() if shadows is None else shadows.in_use()


def _stacks(block: nn.Module) -> Iterator[list[nn.Parameter]]:
    """Parameters of a block: together those of queries, keys and values, which one product may read."""
    for module in block.modules():
        if isinstance(module, Attention):
            for name in ("weight", "bias"):
                yield [p for layer in (module.query, module.key, module.value) for p in _parameters(layer, name)]
            yield from ([p] for p in _parameters(module.out, "weight", "bias"))
        if isinstance(module, FeedForward):
            yield from ([p] for layer in (module.up, module.down) for p in _parameters(layer, "weight", "bias"))


def _read_under_autocast(block: Block) -> list[nn.Parameter]:
    """Parameters of a block that torch's linear layer reads."""
    found: list[nn.Parameter] = []
    for module in block.modules():
        if isinstance(module, Attention):
            found += _of_last(module.out)
            if isinstance(block, CrossBlock):
                found += _parameters(module.query, "weight", "bias")
        if isinstance(module, FeedForward):
            found += _of_last(module.up)
    return found


def _of_last(layer: nn.Linear) -> list[nn.Parameter]:
    """Parameters of a layer that `mvlm.model.attention.project` reads in the dtype of products."""
    later = adds_bias_later(next(layer.parameters()).device)
    return _parameters(layer, *(["weight"] if later else ["weight", "bias"]))


def _parameters(layer: nn.Linear, *names: str) -> list[nn.Parameter]:
    """Parameters of a layer with these names. A weight with an adapter is none."""
    found = dict(layer.named_parameters(recurse=False))
    return [found[name] for name in names if name in found]
