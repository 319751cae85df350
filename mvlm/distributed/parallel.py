"""The model on several ranks: DDP or FSDP2, activation checkpointing, compilation, and unsharded copies."""

import inspect
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

from mvlm.distributed.stopwatch import Stopwatch
from mvlm.distributed.world import World
from mvlm.errors import ConfigError
from mvlm.model.encoders import CrossBlock, ImageBlock, TextBlock
from mvlm.model.maskvlm import MaskVLM
from mvlm.model.towers.text import TextTower
from mvlm.model.towers.timm_tower import TimmTower

BLOCKS = (ImageBlock, TextBlock, CrossBlock)
TOWERS = (TextTower, TimmTower)
T = TypeVar("T")
M = TypeVar("M", bound=nn.Module)
# Buffers (mean and deviation of pixels) never change: DDP need not broadcast them before every step. torch 2.13 renamed
# the setting.
_SETTINGS = inspect.signature(DistributedDataParallel).parameters
_KEEP_BUFFERS: dict[str, Any] = {
    "forward_sync_buffers" if "forward_sync_buffers" in _SETTINGS else "broadcast_buffers": False
}


class _Call(nn.Module):
    """Module whose forward calls any function of the model, so that DDP's and FSDP2's hooks run around it.

    A step of several microbatches calls several such functions instead of the model's forward.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[[Any], Any]) -> Any:
        return function(self.model)


class Parallel:
    """A model, or a task around it, whose gradients are the mean over ranks after the last backward pass of a step.

    `parallel(function, last=...)` returns `function(model)`. A step may call it several times; the last call has
    `last=True`. DDP reduces gradients over ranks in the backward pass of the last call, which must use every
    parameter. FSDP2 gathers parameters for each call, and reduces gradients after each backward pass.
    """

    def __init__(self, model: Any, call: nn.Module, last: nn.Module, device: torch.device) -> None:
        self.model, self._call, self._last = model, call, last
        self.alone = Stopwatch(device)
        """Stopwatch of the time that a step takes before this rank waits for others."""

    def __call__(self, function: Callable[[Any], T], last: bool = True) -> T:
        return (self._last if last else self._call)(function)


def parallelize(
    model: nn.Module,
    world: World,
    kind: Literal["ddp", "fsdp"] = "ddp",
    nodes: int | None = None,
    gathered: torch.dtype | None = None,
) -> Parallel:
    """Prepare a model for `backward_global`. It is on its rank's device and has the same weights on every rank.

    With "fsdp" the parameters become DTensors in place: make the optimizer afterwards. They are sharded over the ranks
    of a node and replicated on each node (HSDP). A block's parameters are gathered when it is called, and
    freed afterwards. Gradients are reduced in the parameters' own dtype.

    Args:
        nodes: number of nodes; by default as torchrun started them.
        gathered: dtype in which the parameters of blocks are gathered and used, such as bfloat16 where autocast would
            round them anyway: half the bytes. Optimizer and checkpoints have the parameters' own. Default: their own.
    """
    call = _Call(model)
    if world.size == 1:
        return Parallel(model, call, call, world.device)
    if kind == "ddp":
        devices = [world.device] if world.device.type == "cuda" else None
        # A sum over more than two ranks rounds by a gradient's place in its bucket. Without this setting DDP makes new
        # buckets after the first step of a process, and a resumed run would differ in its last bits.
        last = DistributedDataParallel(
            call, device_ids=devices, gradient_as_bucket_view=True, find_unused_parameters=True, **_KEEP_BUFFERS
        )
        warnings.filterwarnings("ignore", "find_unused_parameters=True was specified")
        return Parallel(model, call, last, world.device)
    # Keys and values are views of one product. The warning is about in-place changes of such views; there are none.
    warnings.filterwarnings("ignore", r"FSDP2-wrapped module .* returned a view tensor")
    mesh = _mesh(world, nodes)
    # Do not cast inputs: autocast decides the residual stream's dtype.
    own = next(model.parameters()).dtype
    precision = MixedPrecisionPolicy(param_dtype=gathered, reduce_dtype=own, cast_forward_inputs=False)
    for _, module in named_blocks(model):
        fully_shard(module, mesh=mesh, mp_policy=precision)
        if isinstance(module, CrossBlock):
            register_fsdp_forward_method(module, "keys_values")  # the fast implementation calls it on its own
    # Parameters outside the blocks, with the temperature and the embeddings, keep their dtype.
    fully_shard(call, mesh=mesh, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False))
    return Parallel(model, call, call, world.device)


def _mesh(world: World, nodes: int | None) -> DeviceMesh:
    """Mesh of all ranks in one dimension (FSDP), or of (nodes, ranks of a node) (HSDP)."""
    if nodes is None:
        nodes = max(1, world.size // int(os.environ.get("LOCAL_WORLD_SIZE", world.size)))
    if world.size % nodes:
        raise ConfigError(f"nodes: wanted a divisor of the {world.size} ranks, got {nodes}; start as many on each node")
    if nodes == 1:
        return init_device_mesh(world.device.type, (world.size,))
    return init_device_mesh(world.device.type, (nodes, world.size // nodes), mesh_dim_names=("replicate", "shard"))


def named_blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """(name, module) of each transformer block of a model, those of a tower too.

    Each is sharded and recomputed on its own.
    """
    of_towers = {block for module in model.modules() if isinstance(module, TOWERS) for block in module.blocks}
    found = model.named_modules()
    return [(name, module) for name, module in found if isinstance(module, BLOCKS) or module in of_towers]


def checkpoint_activations(model: nn.Module) -> None:
    """Make backward recompute the activations of every block instead of keeping them. Gradients are the same."""
    for _, module in named_blocks(model):
        # `forward`, not the module's call: FSDP2's hooks then stay outside, and gather a block's parameters once for
        # the recomputation and the backward pass.
        module.forward = partial(checkpoint, module.forward, use_reentrant=False)


MAX_GRAPHS = 64
"""Most compiled graphs of a step, or of the blocks of one class. torch's limit is 8."""


def compile_step(model: MaskVLM, world: World, accumulate: int, checkpointed: bool, **settings: Any) -> None:
    """Compile the work of a step; before `checkpoint_activations` and `parallelize`. `settings` are torch.compile's.

    On one rank, with one microbatch and without checkpointed activations, the model's forward is one graph, for the
    few shapes that `mvlm.model.packing.pad_to_bucket` leaves. Else each block is compiled by itself, for all lengths at
    once: hooks of DDP and FSDP2, checkpoints and the losses stay outside of the graphs. Blocks of one class share them.
    """
    torch._dynamo.config.recompile_limit = max(MAX_GRAPHS, torch._dynamo.config.recompile_limit)
    if world.size == accumulate == 1 and not checkpointed:
        model.compile(fullgraph=True, dynamic=False, **settings)
        return
    # Under DDP torch would split the graph of a block between two buckets of gradients.
    torch._dynamo.config.optimize_ddp = False
    for _, module in named_blocks(model):
        # `forward`, not the module's call, as in `checkpoint_activations`.
        module.forward = torch.compile(module.forward, fullgraph=True, **settings)


def unsharded_copy(model: M, build: Callable[[], M]) -> M:
    """Return the model itself if its weights are not sharded, else a copy with full weights on every rank.

    The copy is for evaluation only. build: makes a new model with parameters of these shapes.
    """
    if not any(isinstance(p, DTensor) for p in model.parameters()):
        return model
    copy = build().to(next(model.parameters()).device)
    with torch.no_grad():
        for ours, theirs in zip(copy.parameters(), model.parameters(), strict=True):
            ours.data = theirs.full_tensor() if isinstance(theirs, DTensor) else theirs.detach()
    return copy.train(model.training)
