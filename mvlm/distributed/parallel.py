"""The model on several ranks: DDP or FSDP2 around it, activation checkpointing, and unsharded copies."""

import os
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, TypeVar

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from mvlm.distributed.world import World
from mvlm.errors import ConfigError
from mvlm.model.cross_encoder import CrossBlock
from mvlm.model.encoders import ImageBlock, TextBlock
from mvlm.model.maskvlm import MaskVLM

BLOCKS = (ImageBlock, TextBlock, CrossBlock)
T = TypeVar("T")


class _Call(nn.Module):
    """Runs a function of the model as its forward, where DDP and FSDP2 hook in; a step has several parts."""

    def __init__(self, model: MaskVLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[[MaskVLM], Any]) -> Any:
        return function(self.model)


class Parallel:
    """A model whose gradients are the mean over ranks after the last backward pass of a step.

    `parallel(function, last=...)` returns `function(model)`. Parts of a step go through it one after another, and its
    last one says so: DDP adds up over ranks in the backward pass of that one, which has to use every parameter.
    FSDP2 gathers parameters for each part and adds up after each.
    """

    def __init__(self, model: MaskVLM, call: nn.Module, last: nn.Module) -> None:
        self.model, self._call, self._last = model, call, last

    def __call__(self, function: Callable[[MaskVLM], T], last: bool = True) -> T:
        return (self._last if last else self._call)(function)


def parallelize(
    model: MaskVLM,
    world: World,
    kind: Literal["ddp", "fsdp"] = "ddp",
    *,
    nodes: int | None = None,
    dtype: torch.dtype | None = None,
) -> Parallel:
    """The model, on its rank's device and with the same weights on every rank, made ready for `backward_global`.

    With "fsdp" its parameters become DTensors in place: make the optimizer afterwards. They are split over the ranks of
    a node and kept once on each of `nodes` nodes (as torchrun tells, when not given), which is HSDP. Each block is
    gathered when it is called and freed after it, in `dtype` if that is given; gradients are added up in the
    parameters' own.
    """
    call = _Call(model)
    if world.size == 1:
        return Parallel(model, call, call)
    if kind == "ddp":
        devices = [world.device] if world.device.type == "cuda" else None
        last = DistributedDataParallel(call, device_ids=devices, gradient_as_bucket_view=True)
        return Parallel(model, call, last)
    # Keys and values are views of one product. The warning is about changing them in place, which nothing does.
    warnings.filterwarnings("ignore", r"FSDP2-wrapped module .* returned a view tensor")
    mesh = _mesh(world, nodes)
    # Do not cast inputs: autocast decides the residual stream's dtype.
    precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=model.log_scale.dtype, cast_forward_inputs=False)
    for module in model.modules():
        if isinstance(module, BLOCKS):
            fully_shard(module, mesh=mesh, mp_policy=precision)
        if isinstance(module, CrossBlock):
            register_fsdp_forward_method(module, "keys_values")  # the fast plan asks for them by themselves
    # What is in no block, with the temperature and the embeddings, keeps its precision.
    fully_shard(call, mesh=mesh, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False))
    return Parallel(model, call, call)


def _mesh(world: World, nodes: int | None) -> DeviceMesh:
    """All ranks in one dimension, or (nodes, ranks of a node)."""
    if nodes is None:
        nodes = max(1, world.size // int(os.environ.get("LOCAL_WORLD_SIZE", world.size)))
    if world.size % nodes:
        raise ConfigError(f"nodes: wanted a divisor of the {world.size} ranks, got {nodes}; start as many on each node")
    if nodes == 1:
        return init_device_mesh(world.device.type, (world.size,))
    return init_device_mesh(world.device.type, (nodes, world.size // nodes), mesh_dim_names=("replicated", "split"))


def checkpoint_activations(model: MaskVLM) -> None:
    """From now on backward runs every block again instead of keeping what is inside it; the gradients are the same."""
    for module in model.modules():
        if isinstance(module, BLOCKS):
            # Inside the module's call, so that FSDP2's hooks are around it and gather parameters once for both.
            module.forward = partial(checkpoint, module.forward, use_reentrant=False)


GRAPHS = 64
"""Compiled steps that may be kept; batches come in a handful of shapes (`mvlm.model.packing.pad_to_bucket`)."""


def compile_step(model: MaskVLM, world: World, **settings: Any) -> None:
    """From now on a call of the model runs compiled, in one graph. `settings` are torch.compile's.

    ConfigError on several ranks: their step is no call of the model but of its parts.
    """
    if world.size > 1:
        raise ConfigError(f"compile: wanted one rank, got {world.size}; leave --compile out")
    torch._dynamo.config.recompile_limit = max(GRAPHS, torch._dynamo.config.recompile_limit)
    model.compile(fullgraph=True, dynamic=False, **settings)


def unsharded_copy(model: MaskVLM) -> MaskVLM:
    """The model itself if its weights are not sharded, else a copy with full weights on every rank.

    The copy is not for training.
    """
    if not any(isinstance(p, DTensor) for p in model.parameters()):
        return model
    whole = MaskVLM(model.config).to(model.log_scale.device)
    with torch.no_grad():
        for ours, theirs in zip(whole.parameters(), model.parameters(), strict=True):
            ours.data = theirs.full_tensor() if isinstance(theirs, DTensor) else theirs.detach()
    return whole.train(model.training)
