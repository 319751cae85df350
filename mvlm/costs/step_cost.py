"""What a step of one rank costs, found by going through it with tensors that have shapes and no values.

The real step runs (`mvlm.distributed.global_batch`, all ranks but this one imagined), so that operations and memory
are those of the code and not of a formula that follows it. Nothing is computed and nothing allocated: `base` takes
seconds.
"""

import contextlib
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

# A process group that pretends: collectives return at once. torch has no public name for it.
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from mvlm.config.model import MaskVLMConfig
from mvlm.costs.flops import FORMULAS
from mvlm.distributed.global_batch import backward_global
from mvlm.distributed.loss_shares import Microbatch
from mvlm.distributed.parallel import BLOCKS, checkpoint_activations, parallelize
from mvlm.distributed.world import World
from mvlm.model.maskvlm import MaskVLM
from mvlm.model.packing import round_up_length
from mvlm_dataloading import Batch, Masks

CPU = torch.device("cpu")
# Not torch's counter: it follows modules with hooks that keep a graph which runs again alive.
COUNTED: dict[Any, Any] = {**flop_registry, **FORMULAS}
OTHER, BACKWARD = "between blocks", "backward"


@dataclass(frozen=True, kw_only=True, slots=True)
class StepShape:
    """One rank's step: its pairs and how it goes through them."""

    pairs: int
    """Of a microbatch."""
    tokens: int = 12
    """Of a caption, the mean."""
    longest: int = 30
    """Tokens of the longest caption of a batch."""
    ranks: int = 1
    microbatches: int = 1
    checkpointed: bool = False
    local_negatives: bool = False
    bf16: bool = True
    gpu: bool = True
    """Dtypes as autocast chooses them on a GPU: LayerNorm in fp32."""


@dataclass(frozen=True, slots=True)
class StepCost:
    """What was counted."""

    parameters: int
    """Elements."""
    forward: int
    """Operations of the forward passes, a second one of microbatches included."""
    backward: int
    """Operations of backward, with the blocks that it runs again."""
    peak: int
    """Bytes of all that the step made and still held when that was most, gradients included."""
    parts: dict[str, int]
    """The same by what made it: the blocks of a part of the model, what is between blocks, or a backward pass."""


class MemoryTracker(TorchDispatchMode):
    """Follows the bytes of every storage that operators make, by the part of the model whose block made it."""

    def __init__(self, drawn_tokens: int) -> None:
        super().__init__()
        self._drawn_tokens = drawn_tokens
        self._open: list[str] = []
        """The blocks that are running, by the child of the model that has them."""
        self._known: set[int] = set()
        self._before: list[torch.UntypedStorage] = []
        self._sums: dict[str, int] = {}
        self._now = 0
        self.operations = 0
        self.peak = 0
        self.parts: dict[str, int] = {}
        self.stage = OTHER
        """What is in no part belongs to this."""

    def follow(self, model: MaskVLM) -> None:
        """Tell apart what blocks make."""
        for name, module in model.named_modules():
            if isinstance(module, BLOCKS):
                child = name.split(".")[0]
                module.register_forward_pre_hook(lambda *_, child=child: self._open.append(child))
                module.register_forward_hook(lambda *_: self._leave(), always_call=True)

    def _leave(self) -> None:
        self._open.pop()

    def know(self, tensors: Any) -> None:
        """Leave these out: they were there before."""
        self._before = [tensor.untyped_storage() for tensor in tensors]
        self._known = {id(storage) for storage in self._before}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if (
            func is torch.ops.aten._local_scalar_dense.default
        ):  # the one number that a step asks for, and on a CPU alone
            return self._drawn_tokens
        out = func(*args, **(kwargs or {}))
        if func._overloadpacket in COUNTED:
            self.operations += COUNTED[func._overloadpacket](*args, **(kwargs or {}), out_val=out)
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                self._add(x.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self._known or not size:
            return
        part = self._open[0] if self._open and self.stage != BACKWARD else self.stage
        self._known.add(key)
        weakref.finalize(storage, self._free, key, part, size)
        self._now += size
        self._sums[part] = self._sums.get(part, 0) + size
        if self._now > self.peak:
            self.peak, self.parts = self._now, dict(self._sums)

    def _free(self, key: int, part: str, size: int) -> None:
        self._known.discard(key)
        self._now -= size
        self._sums[part] -= size


class AsOnGpu(TorchFunctionMode):
    """LayerNorm in fp32, as CUDA's autocast has it and the CPU's has not."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.layer_norm and args[0].dtype == torch.bfloat16:
            args = (args[0].float(), *args[1:])
        return func(*args, **(kwargs or {}))


def step_cost(config: MaskVLMConfig, shape: StepShape) -> StepCost:
    """Count one step of rank 0. Takes seconds. RuntimeError inside a process group: it makes one that pretends."""
    with torch.device("meta"):
        model = MaskVLM(config)
    model.set_attention("sdpa", "sdpa")  # keeps what a GPU's attention keeps: no scores
    if shape.checkpointed:
        checkpoint_activations(model)
    with _world(shape.ranks) as world, FakeTensorMode():
        give_fake_tensors(model)
        micro = [_microbatch(config, shape) for _ in range(shape.microbatches)]
        with MemoryTracker(_drawn_tokens(config, shape)) as live, AsOnGpu() if shape.gpu else contextlib.nullcontext():
            live.know([*model.parameters(), *model.buffers()])
            live.follow(model)
            with _stages(live) as in_backward:
                if world.size == len(micro) == 1:
                    with _autocast(shape):
                        losses = model(*micro[0], plan="fast")
                    losses.total.backward()
                else:
                    backward_global(
                        parallelize(model, World(0, 1, 0, CPU)),
                        micro,
                        world,
                        seed=0,
                        step=0,
                        plan="fast",
                        local_negatives=shape.local_negatives,
                        autocast=lambda: _autocast(shape),
                    )
        total, backward = live.operations, sum(in_backward)
    parameters = sum(p.numel() for p in model.parameters())
    parts = {name: size for name, size in live.parts.items() if size}
    return StepCost(parameters, total - backward, backward, live.peak, parts)


def _autocast(shape: StepShape) -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=shape.bf16)


@contextlib.contextmanager
def _stages(live: MemoryTracker) -> Iterator[list[int]]:
    """Tells `live` when a backward pass runs; yields a list that gets the operations of each."""
    run, counts = torch.autograd.backward, []

    def backward(*args: Any, **kwargs: Any) -> None:
        before, live.stage = live.operations, BACKWARD
        run(*args, **kwargs)
        counts.append(live.operations - before)
        live.stage = OTHER

    with patch("torch.autograd.backward", backward):
        yield counts


@contextlib.contextmanager
def _world(ranks: int) -> Iterator[World]:
    if ranks > 1:
        dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    try:
        yield World(0, ranks, 0, CPU)
    finally:
        if ranks > 1:
            dist.destroy_process_group()


def _drawn_tokens(config: MaskVLMConfig, shape: StepShape) -> int:
    """Rows made for the captions that ITM draws: on a CPU as many as they have, on a GPU as many as they may have."""
    if not shape.gpu:
        return 3 * shape.pairs * shape.tokens
    alone = shape.microbatches == 1 and (shape.ranks == 1 or shape.local_negatives)
    return 3 * shape.pairs * round_up_length(shape.longest if alone else config.text_length)


def give_fake_tensors(module: nn.Module) -> None:
    """Parameters and buffers that say they are on the CPU, in place of those on the meta device."""
    for owner in module.modules():
        for name, value in list(owner.named_parameters(recurse=False)):
            setattr(owner, name, nn.Parameter(torch.empty(value.shape, dtype=value.dtype)))
        for name, value in list(owner.named_buffers(recurse=False)):
            setattr(owner, name, torch.empty(value.shape, dtype=value.dtype))


def _microbatch(config: MaskVLMConfig, shape: StepShape) -> Microbatch:
    """Shapes alone. A third of a caption's ordinary tokens is masked as the configuration says."""
    pairs, side = shape.pairs, config.image_size
    blocks = (side // config.mask_block) ** 2
    patches = round(config.image_mask_ratio * blocks) * (config.mask_block // config.patch_size) ** 2
    masked = max(1, round(config.text_mask_ratio * (shape.tokens - 2)))

    def ids(*sizes: int) -> Tensor:
        return torch.empty(sizes, dtype=torch.int64)

    batch = Batch(
        images=torch.empty(pairs, 3, side, side, dtype=torch.uint8),
        tokens=ids(pairs * shape.tokens),
        cu_seqlens=torch.empty(pairs + 1, dtype=torch.int32),
        max_length=min(shape.longest, config.text_length),
        image_id=ids(pairs),
        text_id=ids(pairs),
        sample_id=ids(pairs),
    )
    return batch, Masks(patch_ids=ids(pairs, patches), token_ids=ids(pairs * masked))
