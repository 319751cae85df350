"""FLOPs and peak activation memory of one training step, counted by running the real step on fake tensors.

Fake tensors have a shape and a dtype but no data, so nothing is computed or allocated, and `base` takes seconds. The
step is that of `mvlm.distributed.global_batch`; the other ranks are simulated. Counts therefore follow the code, not a
separate formula.
"""

import contextlib
import itertools
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._tools.fake_collectives
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore  # torch has no public name for it
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from mvlm.config.groups import FULL, PartSettings
from mvlm.config.model import MaskVLMConfig
from mvlm.costs.flops import FORMULAS
from mvlm.distributed.collectives import GlobalBatchLayout
from mvlm.distributed.exchange import exchange_splits
from mvlm.distributed.global_batch import backward_global
from mvlm.distributed.parallel import checkpoint_activations, named_blocks, parallelize
from mvlm.distributed.world import World, nodes_of
from mvlm.model.adaptation import adapt
from mvlm.model.maskvlm import MaskVLM
from mvlm.model.packing import round_up_length
from mvlm.model.shadow_weights import shadow_weights, using
from mvlm.objectives.negatives import NegativeSampling
from mvlm.objectives.pretraining import ALL
from mvlm.objectives.step import Objective
from mvlm_dataloading import Batch, Masks
from mvlm_kernels.gelu_linear.room import saving_none


def fake_microbatch(config: MaskVLMConfig, pairs: int, tokens: int, longest: int) -> tuple[Batch, Masks]:
    """Microbatch of fake tensors, with as many masked patches and tokens as the configuration says.

    Captions have `tokens` tokens each; the longest is said to have `longest`.
    """
    side = config.image_size
    masked = max(1, round(config.text_mask_ratio * (tokens - 2)))

    def ids(*sizes: int) -> Tensor:
        return torch.empty(sizes, dtype=torch.int64)

    batch = Batch(
        images=torch.empty(pairs, 3, side, side, dtype=torch.uint8),
        tokens=ids(pairs * tokens),
        cu_seqlens=torch.empty(pairs + 1, dtype=torch.int32),
        max_length=min(longest, config.text_length),
        image_id=ids(pairs),
        text_id=ids(pairs),
        sample_id=ids(pairs),
    )
    return batch, Masks(patch_ids=ids(pairs, config.masked_patches), token_ids=ids(pairs * masked))


CPU = torch.device("cpu")
# Not torch's FlopCounterMode: its module hooks keep the graphs of checkpointed blocks alive, which adds memory.
COUNTED: dict[Any, Any] = {**flop_registry, **FORMULAS}
TOKENS, LONGEST = 12, 30
"""Numbers of tokens that plans assume: of a caption in the mean, and of the longest caption of a batch."""
BETWEEN_BLOCKS, BACKWARD = "between blocks", "backward"


@dataclass(frozen=True, kw_only=True, slots=True)
class StepShape:
    """Sizes and settings of one rank's step."""

    pairs: int
    """Number of pairs of a microbatch."""
    tokens: int = TOKENS
    """Mean number of tokens of a caption."""
    longest: int = LONGEST
    """Number of tokens of the longest caption of a batch."""
    ranks: int = 1
    nodes: int = 1
    """Number of nodes, with as many ranks each."""
    microbatches: int = 1
    checkpointed: bool = False
    bf16: bool = True
    gpu: bool = True
    """True for a GPU's step: LayerNorm in fp32, and tensors padded to sizes that the host knows."""
    sharded: bool = False
    """True if parameters are gathered a block at a time, by FSDP2, and have no copies in bf16."""
    parts: PartSettings = FULL
    """Learning of each part of the model: all weights, none, or adapters."""


@dataclass(frozen=True, slots=True)
class StepCost:
    """FLOPs and memory of one rank's step."""

    parameters: int
    """Number of parameters of the model."""
    trained: int
    """Number of parameters that learn."""
    forward: int
    """FLOPs of the forward passes. Gradient caching has two per microbatch; both are counted."""
    backward: int
    """FLOPs of the backward passes, with the blocks that they recompute."""
    peak: int
    """Peak bytes of the tensors that the step made, gradients included."""
    parts: dict[str, int]
    """Bytes at the peak by where they were allocated: in blocks of a part of the model, between blocks, in a backward
    pass."""
    copies: int = 0
    """Bytes of the copies of weights in bf16 (`mvlm.model.shadow_weights`), which `peak` leaves out."""

    @property
    def sizes(self) -> str:
        """Numbers of parameters in words, for a plan."""
        learning = "" if self.trained == self.parameters else f", of which {self.trained / 1e6:.1f} M learn"
        return f"{self.parameters / 1e6:.1f} M parameters{learning}"


class MemoryTracker(TorchDispatchMode):
    """Counts the FLOPs of a step, and the bytes of its tensors by the part of the model whose block allocated them."""

    def __init__(self, drawn_tokens: int) -> None:
        super().__init__()
        self._drawn_tokens = drawn_tokens
        self._running: list[str] = []
        """Names of the model's direct children whose blocks are running, outermost first."""
        self._known: set[int] = set()
        """Ids of storages that are counted or ignored."""
        self._ignored: list[torch.UntypedStorage] = []
        self._held_by_part: dict[str, int] = {}
        self._held = 0
        self.flops = 0
        self.backward_flops = 0
        """FLOPs of backward passes, which `flops` includes."""
        self.peak = 0
        self.parts: dict[str, int] = {}

    def track_blocks(self, model: nn.Module) -> None:
        """Attribute each tensor storage to the block of the model that is running when it is allocated."""
        for name, module in named_blocks(model):
            child = name.removeprefix("model.").split(".")[0]  # a task has the network as its `model`
            module.register_forward_pre_hook(lambda *_, child=child: self._running.append(child))
            module.register_forward_hook(lambda *_: self._leave(), always_call=True)

    def _leave(self) -> None:
        self._running.pop()

    def ignore(self, tensors: Any) -> None:
        """Do not count the storages of these tensors, which exist before the step."""
        self._ignored = [tensor.untyped_storage() for tensor in tensors]  # kept, so that no other gets an equal id
        self._known = {id(storage) for storage in self._ignored}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # A fake tensor has no value to read. A step reads one number, on a CPU only: the tokens of the drawn captions.
        if func is torch.ops.aten._local_scalar_dense.default:
            return self._drawn_tokens
        out = func(*args, **(kwargs or {}))
        if func._overloadpacket in COUNTED:
            flops = COUNTED[func._overloadpacket](*args, **(kwargs or {}), out_val=out)
            self.flops += flops
            self.backward_flops += flops if _in_backward() else 0
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                self._add(x.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self._known or not size:
            return
        part = BACKWARD if _in_backward() else self._running[0] if self._running else BETWEEN_BLOCKS
        self._known.add(key)
        weakref.finalize(storage, self._free, key, part, size)
        self._held += size
        self._held_by_part[part] = self._held_by_part.get(part, 0) + size
        if self._held > self.peak:
            self.peak, self.parts = self._held, dict(self._held_by_part)

    def _free(self, key: int, part: str, size: int) -> None:
        self._known.discard(key)
        self._held -= size
        self._held_by_part[part] -= size


def _in_backward() -> bool:
    """True while autograd runs a backward pass, also in the blocks that it recomputes."""
    return torch._C._current_graph_task_id() != -1


class GpuLayerNorm(TorchFunctionMode):
    """Computes LayerNorm in fp32 under autocast, as CUDA's autocast does. The CPU's autocast leaves it in bf16."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.layer_norm and args[0].dtype == torch.bfloat16:
            args = (args[0].float(), *args[1:])
        return func(*args, **(kwargs or {}))


class KnownNumbers(TorchFunctionMode):
    """Gives `HostNumbers.read` numbers in place of the values that fake tensors lack, one for each `Tensor.item`."""

    def __init__(self, numbers: list[int]) -> None:
        super().__init__()
        self._numbers = itertools.cycle(numbers)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return next(self._numbers) if func is Tensor.item else func(*args, **(kwargs or {}))


@contextlib.contextmanager
def _choices_of_a_gpu() -> Iterator[None]:
    """Context in which fake tensors on the CPU have the dtypes of a GPU's step and are kept for backward as there."""
    with GpuLayerNorm(), saving_none():
        yield


def step_cost(config: MaskVLMConfig, shape: StepShape, objectives: Sequence[Objective] = ALL) -> StepCost:
    """Count one step of rank 0. It takes seconds. RuntimeError inside a process group, because it makes a fake one."""
    with fake_step(config, shape, objectives) as (model, step):
        return counted(model, step, drawn_tokens(config, shape), shape)


@contextlib.contextmanager
def fake_step(
    config: MaskVLMConfig, shape: StepShape, objectives: Sequence[Objective] = ALL
) -> Iterator[tuple[MaskVLM, Callable[[], object]]]:
    """Context with a model of fake tensors, and a function that makes rank 0's step. Its collectives move nothing."""
    with torch.device("meta"):
        model = MaskVLM(config)
        adapt(model, shape.parts)
    model.set_attention("sdpa", "sdpa")  # like the backends of a GPU, it keeps no scores for backward
    if shape.checkpointed:
        checkpoint_activations(model)
    with (
        simulated_ranks(shape.ranks),
        KnownNumbers(uniform_draws(shape)),
        FakeTensorMode(),
    ):
        world = World(0, shape.ranks, 0, CPU)
        world = replace(world, nodes=nodes_of(world, shape.ranks // shape.nodes, "fake"))
        give_fake_tensors(model)
        micro = [fake_microbatch(config, shape.pairs, shape.tokens, shape.longest) for _ in range(shape.microbatches)]

        def step() -> None:
            if world.size == len(micro) == 1:
                with autocast_of(shape):
                    losses = model(*micro[0], objectives=objectives, plan="fast")
                losses.total.backward()
                return
            backward_global(
                parallelize(model, World(0, 1, 0, CPU)),
                micro,
                world,
                seed=0,
                step=0,
                plan="fast",
                objectives=objectives,
                autocast=lambda: autocast_of(shape),
            )

        yield model, step


@contextlib.contextmanager
def simulated_ranks(ranks: int) -> Iterator[None]:
    """Context with a process group of W ranks, of which this process is the first, that moves nothing.

    No group for one rank. RuntimeError inside a process group.
    """
    if ranks == 1:
        yield
        return
    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def counted(model: nn.Module, step: Callable[[], object], rows: int, shape: StepShape) -> StepCost:
    """Count FLOPs and memory of a step of a model of fake tensors, or of a task around it.

    Call it inside FakeTensorMode.

    Args:
        rows: value that a fake tensor gives if a number is read from it: the rows of ITM's captions.
        shape: of the step. For a GPU, LayerNorm is counted in the dtype of its step, and no GELU is kept for backward.
    """
    shadows = shadow_weights(model) if shape.bf16 and not (shape.sharded or shape.checkpointed) else None
    copies = [] if shadows is None else shadows.tensors
    with MemoryTracker(rows) as tracker, _choices_of_a_gpu() if shape.gpu else contextlib.nullcontext():
        tracker.ignore([*model.parameters(), *model.buffers(), *copies])
        tracker.track_blocks(model)
        with using(shadows):
            step()
    parameters = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    parts = {name: size for name, size in tracker.parts.items() if size}
    forward = tracker.flops - tracker.backward_flops
    return StepCost(
        parameters, trained, forward, tracker.backward_flops, tracker.peak, parts, sum(x.nbytes for x in copies)
    )


def autocast_of(shape: StepShape) -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=shape.bf16)


def uniform_draws(shape: StepShape) -> list[int]:
    """`Splits.numbers` of rank 0, microbatch after microbatch, if each image and each caption is drawn once.

    That is the mean of draws in which all are equally likely, without its scatter.
    """
    layout = GlobalBatchLayout(0, shape.ranks, shape.microbatches, shape.pairs)
    generator = torch.Generator().manual_seed(0)
    texts, images = (torch.randperm(layout.total, generator=generator) for _ in range(2))
    negatives = NegativeSampling(texts, texts, 0, 0).limited(texts, images)
    lengths = torch.full_like(texts, shape.tokens)
    starts = shape.tokens * torch.arange(shape.microbatches * shape.pairs)
    both_kinds = [exchange_splits(negatives, lengths, starts, a, layout) for a in range(shape.microbatches)]
    return [number for both in both_kinds for splits in both for number in splits.numbers.tolist()]


def drawn_tokens(config: MaskVLMConfig, shape: StepShape) -> int:
    """Number of token rows for captions of ITM's pairs: those they have on a CPU, the most they may have on a GPU."""
    if not shape.gpu:
        return 3 * shape.pairs * shape.tokens
    # The host knows the rows of captions that arrive from other ranks, and of others only the longest.
    alone = shape.microbatches == shape.ranks == 1
    return shape.pairs * (2 * shape.tokens + (round_up_length(shape.longest) if alone else shape.tokens))


def give_fake_tensors(module: nn.Module) -> None:
    """Replace parameters and buffers on the meta device by fake tensors that report the CPU as their device."""
    for owner in module.modules():
        for name, value in list(owner.named_parameters(recurse=False)):
            setattr(owner, name, nn.Parameter(torch.empty(value.shape, dtype=value.dtype), value.requires_grad))
        for name, value in list(owner.named_buffers(recurse=False)):
            setattr(owner, name, torch.empty(value.shape, dtype=value.dtype))
