"""Forward and backward of a step, replayed from CUDA graphs: one for each bucket of shapes.

A step queues thousands of kernels. On a fast GPU and at a small batch the host takes longer to queue them than the GPU
to run them. A graph queues them all with one call. docs/guides/training.md says when that helps.
"""

import contextlib
import logging
from collections.abc import Callable, Iterable
from dataclasses import fields, replace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from mvlm.config.groups import MAX_GRAPHS
from mvlm.config.pretrain import PretrainConfig
from mvlm.distributed.world import World
from mvlm.errors import ConfigError
from mvlm.objectives.losses import Losses
from mvlm_dataloading import Batch, Masks
from mvlm_kernels.gelu_linear.room import saving_none

log = logging.getLogger(__name__)
Inputs = TypeVar("Inputs", Batch, Masks)

Bucket = tuple[Any, ...]
"""Key of a CUDA graph: shapes of the tensors of batch and masks, and their Python numbers, such as the longest caption.
"""
Step = Callable[[list[tuple[Batch, Masks]], Tensor], Losses]
"""step(microbatches, number): sets the gradients and returns the losses, detached scalars. number: of the update, int64
() on the device."""
Capture = Callable[[Callable[[], Losses]], tuple[Callable[[], None], Losses]]
"""capture(function): records the GPU work of a function without arguments. Returns a function that runs what was
recorded, and the outputs that each run fills."""


def check_graphs(config: PretrainConfig, world: World) -> None:
    """Raise ConfigError if a run cannot take CUDA graphs."""
    if world.device.type != "cuda":
        wrong = f"wanted a CUDA device, got {world.device.type}"
    elif world.size > 1:
        wrong = f"wanted one rank, got {world.size}"
    elif config.checkpoint_activations:  # it saves and restores the state of the random generators
        wrong = "wanted all activations kept, got --checkpoint-activations"
    else:
        return
    raise ConfigError(f"capture: {wrong}; leave --capture cuda-graphs out")


class CudaGraphs:
    """Training steps that are replayed from CUDA graphs, one graph for each bucket of input shapes.

    A step runs eagerly at a bucket's first batch, is captured at its second, and is replayed from then on. A bucket is
    what a graph cannot change: the shapes of the inputs, and the longest caption. Batches of
    `mvlm.model.packing.pad_to_bucket` have few of them. A bucket beyond MAX_GRAPHS stays eager. If a capture fails, no
    further graph is made, and a warning says why. Those made before are still replayed.

    Args:
        step: the eager step. It is called with other tensors of the same shapes, and must not wait for the device.
        parameters: those whose gradients the step sets.
        capture: records a step; tests without a GPU give another one.
        limit: most graphs.
    """

    def __init__(
        self,
        step: Step,
        parameters: Iterable[nn.Parameter],
        capture: Capture | None = None,
        limit: int = MAX_GRAPHS,
    ) -> None:
        # Graphs hold what they save for good, beside the eager steps' memory. So no GELU is saved.
        self._step, self._parameters = saving_none()(step), [p for p in parameters if p.requires_grad]
        self._capture, self._limit = capture or CudaCapture(), limit
        self._seen: set[Bucket] = set()
        self._graphs: dict[Bucket, _Graph] = {}
        self._full = False

    @property
    def captured(self) -> int:
        """Number of graphs captured so far."""
        return len(self._graphs)

    def forget(self) -> None:
        """Forget all graphs: those of a stage that is over would hold their memory for steps that never come."""
        self._seen.clear()
        self._graphs.clear()
        self._full = False

    def run(self, microbatches: list[tuple[Batch, Masks]], number: Tensor) -> Losses:
        """Run a step of one microbatch: set the parameters' gradients, and return the losses, detached scalars."""
        ((batch, masks),) = microbatches
        values = [getattr(part, field.name) for part in (batch, masks) for field in fields(part)]
        bucket: Bucket = tuple(tuple(x.shape) if isinstance(x, Tensor) else x for x in values)
        graph = self._graphs.get(bucket)
        if graph is None and bucket in self._seen and len(self._graphs) < self._limit:
            graph = self._try_to_capture(bucket, batch, masks, number)
        elif graph is None and bucket in self._seen and self._limit and not self._full:
            self._full = True
            log.info("CUDA graphs: all %d are made; batches of other shapes run eagerly", self._limit)
        if graph is None:
            self._seen.add(bucket)
            return self._step([(batch, masks)], number)
        for new, own in ((batch, graph.batch), (masks, graph.masks)):
            for name, value in tensors_of(new).items():
                getattr(own, name).copy_(value, non_blocking=True)
        graph.number.copy_(number)
        graph.replay()
        for parameter, gradient in zip(self._parameters, graph.gradients, strict=True):
            parameter.grad = gradient
        # The next step overwrites those of the graph.
        return Losses({name: loss.clone() for name, loss in graph.losses.items()})

    def _try_to_capture(self, bucket: Bucket, batch: Batch, masks: Masks, number: Tensor) -> "_Graph | None":
        own_batch, own_masks, own_number = static_copy(batch), static_copy(masks), number.clone()
        for parameter in self._parameters:
            parameter.grad = None  # backward then writes a gradient instead of adding to it
        try:
            replay, losses = self._capture(lambda: self._step([(own_batch, own_masks)], own_number))
        except RuntimeError as error:
            log.warning("CUDA graphs: a step could not be captured, so no further graph is made: %s", error)
            for parameter in self._parameters:
                parameter.grad = None
            self._limit = 0
            return None
        gradients = [p.grad for p in self._parameters]
        self._graphs[bucket] = graph = _Graph(own_batch, own_masks, own_number, replay, losses, gradients)
        return graph


class _Graph(NamedTuple):
    batch: Batch
    masks: Masks
    number: Tensor
    replay: Callable[[], None]
    losses: Losses
    gradients: list[Tensor | None]


class CudaCapture:
    """Captures steps in CUDA graphs whose intermediate tensors share one pool of memory."""

    def __init__(self) -> None:
        self._pool = None

    def __call__(self, function: Callable[[], Losses]) -> tuple[Callable[[], None], Losses]:
        graph, before = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        pool = self._pool or torch.cuda.graph_pool_handle()
        try:
            # Threads of the loader use the device too: only what this thread does belongs to the graph.
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                losses = function()
        except BaseException:
            _leave_capture(before, pool)
            raise
        self._pool = pool
        return graph.replay, losses


def _leave_capture(stream: Any, pool: Any) -> None:
    """Go back to the stream before a capture that failed, and let the allocator forget the capture.

    NOTE: `torch.cuda.graph` leaves its own stream current if the capture cannot be ended, and the allocator would take
    every later step for a part of it. torch's own graph trees call the same two functions.
    """
    torch.cuda.set_stream(stream)
    with contextlib.suppress(RuntimeError, AttributeError):
        # Raises if the capture did end. Its graph then releases the pool itself, and other graphs may still use it.
        torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
        torch._C._cuda_releasePool(torch.cuda.current_device(), pool)


def tensors_of(inputs: Batch | Masks) -> dict[str, Tensor]:
    """Fields of a batch or of masks that are tensors, by name."""
    values = {field.name: getattr(inputs, field.name) for field in fields(inputs)}
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}


def static_copy(inputs: Inputs) -> Inputs:
    """A copy whose tensors keep their memory while later inputs are copied into them."""
    return replace(inputs, **{name: x.clone() for name, x in tensors_of(inputs).items()})
