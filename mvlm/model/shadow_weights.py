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
    """Shadow weights, copies in `dtype`, of the linear layers of our blocks, which the fast implementation reads.

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
    """Context of the forward and backward passes of a step, in which the shadow weights, if any, are made and read."""
    return nullcontext() if shadows is None else shadows.in_use()


def _stacks(block: nn.Module) -> Iterator[list[nn.Parameter]]:
    """Parameters of a block in groups, each of which gets its copy in one piece of memory.

    Those of queries, keys and values are together, as one matrix product may read them.
    """
    for module in block.modules():
        if isinstance(module, Attention):
            for name in ("weight", "bias"):
                yield [p for layer in (module.query, module.key, module.value) for p in _parameters(layer, name)]
            yield from ([p] for p in _parameters(module.out, "weight", "bias"))
        if isinstance(module, FeedForward):
            yield from ([p] for layer in (module.up, module.down) for p in _parameters(layer, "weight", "bias"))


def _read_under_autocast(block: Block) -> list[nn.Parameter]:
    """Parameters of a block whose copies stand for autocast's casts (`mvlm_kernels.shadows.under_autocast`).

    Their gradients are converted together.
    """
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
    """Parameters of a sub-layer's last linear layer of which `mvlm.model.attention.project` reads copies."""
    later = adds_bias_later(next(layer.parameters()).device)
    return _parameters(layer, *(["weight"] if later else ["weight", "bias"]))


def _parameters(layer: nn.Linear, *names: str) -> list[nn.Parameter]:
    """Parameters of a layer with these names. The weight of a layer with an adapter is left out."""
    found = dict(layer.named_parameters(recurse=False))
    return [found[name] for name in names if name in found]
