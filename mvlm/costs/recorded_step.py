"""The real step of one rank among many, on fake tensors: its collectives, and the work of ITC's logits."""

from dataclasses import dataclass
from typing import Any, Literal
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mvlm.config.model import MaskVLMConfig
from mvlm.costs.fake_batch import fake_microbatch
from mvlm.costs.recording import Collective, Event, recorded_world
from mvlm.costs.step_cost import (
    CPU,
    MemoryTracker,
    StepShape,
    autocast_of,
    drawn_tokens,
    give_fake_tensors,
    uniform_draws,
)
from mvlm.distributed import parallel
from mvlm.distributed.collectives import GlobalBatchLayout, HostNumbers
from mvlm.distributed.global_batch import backward_global
from mvlm.distributed.loss_shares import Embeddings, sharded_contrastive_loss
from mvlm.distributed.parallel import checkpoint_activations, parallelize
from mvlm.distributed.world import World
from mvlm.model.maskvlm import MaskVLM
from mvlm.objectives.negatives import NegativeSampling


@dataclass(frozen=True, slots=True)
class RecordedStep:
    """Collectives of one step, and when they start and are waited for."""

    collectives: list[Collective]
    events: list[Event]
    flops: int
    """FLOPs of the step, the unit of the events' positions."""

    def received(self, label: str | None = None) -> int:
        """Bytes that enter the rank, of all collectives or of those with this label."""
        return sum(x.received for x in self.collectives if label in (None, x.label))


def record_step(
    config: MaskVLMConfig, shape: StepShape, kind: Literal["ddp", "fsdp"] = "ddp", nodes: int = 1
) -> RecordedStep:
    """Record a step of rank 0 among `shape.ranks` on `nodes` nodes. It takes seconds."""
    with torch.device("meta"):
        model = MaskVLM(config)
    model.set_attention("sdpa", "sdpa")
    if shape.checkpointed:
        checkpoint_activations(model)
    numbers, mesh_of = uniform_draws(shape), parallel._mesh  # pyright: ignore[reportPrivateUsage]

    def mesh(*args: Any) -> Any:
        with unset_fake_temporarily():  # a mesh reads its table of ranks
            return mesh_of(*args)

    with (
        recorded_world(shape.ranks) as recorder,
        patch.object(HostNumbers, "read", lambda _: numbers),
        patch.object(parallel, "_mesh", mesh),
        FakeTensorMode(),
    ):
        give_fake_tensors(model)
        world = World(0, shape.ranks, 0, CPU)
        ready = parallelize(model, world, kind, nodes=nodes)
        micro = [fake_microbatch(config, shape.pairs, shape.tokens, shape.longest) for _ in range(shape.microbatches)]
        with MemoryTracker(drawn_tokens(config, shape)) as tracker:
            recorder.clear()
            recorder.position = lambda: tracker.flops
            backward_global(
                ready,
                micro,
                world,
                seed=0,
                step=0,
                plan="fast",
                autocast=lambda: autocast_of(shape),
            )
    return RecordedStep(recorder.collectives, recorder.events, tracker.flops)


@dataclass(frozen=True, slots=True)
class LogitWork:
    """Work of one rank on the logits of ITC, and on drawing negatives from them. It grows with the global batch."""

    flops: int
    """Of matrix products, in fp32."""
    moved: int
    """Bytes that operations on blocks of logits read and write, if none of them stays in a cache."""


class _MovedBytes(TorchDispatchMode):
    """Counts the bytes of operations that read or make a tensor with `columns` columns."""

    def __init__(self, columns: int) -> None:
        super().__init__()
        self.columns, self.moved = columns, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs or {})) if isinstance(x, Tensor)]
        made = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        known = {id(x.untyped_storage()) for x in tensors}
        wide = [x for x in (*made, *tensors) if x.ndim == 2 and x.shape[1] == self.columns]
        in_place = func._schema.name.endswith("_")
        if wide and (in_place or any(id(x.untyped_storage()) not in known for x in made)):
            # An expanded tensor is smaller than its elements, and a view is smaller than its storage.
            self.moved += sum(min(x.nbytes, x.untyped_storage().nbytes()) for x in (*tensors, *made))
        return out


def logit_work(config: MaskVLMConfig, pairs: int, ranks: int) -> LogitWork:
    """Count forward and backward of the logits of a rank with `pairs` pairs, among `ranks` ranks."""
    layout = GlobalBatchLayout(0, ranks, 1, pairs)
    with recorded_world(ranks), FakeTensorMode():
        image, text = (torch.empty(pairs, config.itc_width, requires_grad=True) for _ in range(2))
        ids, scale = torch.empty(layout.total, dtype=torch.int64), torch.empty(1, requires_grad=True)
        with MemoryTracker(0) as tracker, _MovedBytes(layout.total) as counted:
            sampling = NegativeSampling(ids, ids, 0, 0)
            loss, _, _ = sharded_contrastive_loss(Embeddings(image, text, layout), scale, sampling, layout)
            loss.backward()
    return LogitWork(tracker.flops, counted.moved)
