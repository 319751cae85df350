"""Losses and gradients of one step over the global batch: W ranks with A microbatches of b pairs each.

They equal those of one rank with all W A b pairs (docs/guides/many_gpus.md). `mvlm.objectives.step` has the losses;
here are the forward and backward passes. With A = 1 they are one autograd graph. With more microbatches the step uses
gradient caching.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from mvlm.distributed.collectives import GlobalBatchLayout, Handle
from mvlm.distributed.exchange import FeatureExchange
from mvlm.distributed.parallel import Parallel
from mvlm.distributed.world import World
from mvlm.model.implementation import Streams
from mvlm.model.maskvlm import IMPLEMENTATIONS, MaskVLM
from mvlm.model.network import MaskVLMNetwork
from mvlm.objectives.losses import Losses
from mvlm.objectives.pretraining import ALL
from mvlm.objectives.step import ANY_PART, Features, Microbatch, Objective, Shares, Step, idle_parameters

Autocast = Callable[[], AbstractContextManager[object]]


def backward_global(
    parallel: Parallel,
    microbatches: Sequence[Microbatch],
    world: World,
    *,
    seed: int,
    step: int | Tensor,
    plan: Literal["plain", "fast"] = "plain",
    objectives: Sequence[Objective] = ALL,
    autocast: Autocast = nullcontext,
) -> Losses:
    """Compute the losses of the global batch, and the gradients of their total in the parameters' `.grad`.

    Every rank passes the same number of microbatches, all with the same number of pairs. Pair i of microbatch a of rank
    r is pair (a W + r) b + i of the global batch: the loader's order.

    Args:
        step: number of the update; with `seed` it determines ITM's negatives.
        objectives: the losses of the total, with their weights. One of weight 0 is zero and is not computed, but for
            ITC if ITM has a weight.

    Returns:
        The losses, scalars without gradient, equal on every rank.
    """
    sizes = sorted({len(batch.images) for batch, _ in microbatches})
    if len(sizes) != 1:
        raise ValueError(f"microbatches: wanted at least one, all with as many pairs, got {sizes} pairs")
    layout = GlobalBatchLayout(world.rank, world.size, len(microbatches), sizes[0], world.nodes)
    this = Step(objectives, IMPLEMENTATIONS[plan], layout, seed, step, microbatches)
    found = world.all_reduce(_Passes(parallel, microbatches, this, autocast).run())
    # A parameter that changes no loss (a bias of keys) has a gradient of 0 under DDP, and would have none under FSDP2.
    for parameter in parallel.model.parameters():
        if parameter.requires_grad and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    # `_scaled_total` gave these zero gradients, with which AdamW would still decay the weights. None skips them.
    for parameter in idle_parameters(parallel.model, objectives):
        parameter.grad = None
    return this.losses(dict(zip(this.names, found, strict=True)), found.new_zeros(()))


class _Passes:
    """Forward and backward passes of a step on one rank.

    With several microbatches a first pass computes, without a graph, the features that objectives of the global batch
    and of negatives read (ITC, ITM). Their backward pass ends at these features, whose gradients gather in `.grad`. A
    second pass computes the features again, one microbatch at a time, with the objectives of a microbatch (MLM, MIM),
    and backpropagates the cached gradients too.
    """

    def __init__(self, parallel: Parallel, microbatches: Sequence[Microbatch], step: Step, autocast: Autocast) -> None:
        self._parallel, self._microbatches, self._step, self._autocast = parallel, microbatches, step, autocast
        self._shares: list[Tensor] = []
        """For each pass, this rank's shares of all losses and accuracies, a vector in the order of `step.names`."""
        self._cached: list[Streams] = []
        """Features of each microbatch from the first pass, which objectives of the global batch and of negatives read.
        """
        self._exchange: FeatureExchange | None = None
        """Exchange of the features of negatives of several microbatches; None without an objective of them."""
        self._returning: list[Handle] = []
        """Handles of the gradients that the other ranks return for one microbatch's negatives."""

    def run(self) -> Tensor:
        """Make all passes. Returns this rank's shares of the losses and accuracies, in the order of `step.names`."""
        step, number = self._step, len(self._microbatches)
        if number == 1:
            self._pass(lambda model: (step.shares(self._features(model, 0)), []), last=True)
            return self._shares[0]
        if step.of_batch:
            self._cached = [self._parallel(lambda m, a=a: self._encode(m, a), last=False) for a in range(number)]
            self._pass(self._contrast)
        if self._exchange is not None:
            # The rows of each microbatch travel while ITM of the one before runs, those of the first during ITC's
            # backward pass. Gradients return while ITM of the next one runs, those of the last during MLM and MIM.
            self._exchange.start(0)
            for a in range(number):
                self._itm(self._exchange, a)
        for a in range(number):
            # DDP reduces gradients in the last backward pass; until then they accumulate on each rank.
            self._pass(lambda model, a=a: self._reconstruct(model, a), last=a == number - 1)
        return sum(self._shares[1:], self._shares[0])

    def _pass(
        self, function: Callable[[MaskVLM], tuple[Shares, list[tuple[Tensor, Tensor]]]], last: bool = False
    ) -> None:
        """Forward and backward pass of some losses.

        function: returns the losses' shares, and pairs of features and their known gradients, which are backpropagated
        too. last: the last pass of the step, in which DDP reduces gradients.
        """

        def forward(model: MaskVLM) -> tuple[Tensor, Tensor]:
            with self._autocast():
                shares, cached = function(model)
            total, found = _scaled_total(model, shares, self._step)
            # `total` and the cached gradients both contain the factor W already.
            for features, gradient in cached:
                total = total + (features * gradient).sum()
            return total, found

        total, found = self._parallel(forward, last=last)
        total.backward()
        self._shares.append(found)

    def _features(self, model: MaskVLM, a: int) -> Features:
        """Encode microbatch a for a pass that backpropagates through the encoders."""
        microbatch = self._microbatches[a]
        streams = self._step.implementation.encode(model, *microbatch, self._step.reads(model.config))
        self._parallel.alone.stop()
        return Features(self._step, model, [microbatch], [streams])

    @torch.no_grad()
    def _encode(self, model: MaskVLM, a: int) -> Streams:
        """Encode microbatch a for the first pass, without a graph. The features are leaves that gather gradients."""
        with self._autocast():
            reads = self._step.reads(model.config, self._step.of_batch)
            streams = self._step.implementation.encode(model, *self._microbatches[a], reads)
        self._parallel.alone.stop()
        for x in _tensors(streams).values():
            x.requires_grad_()
        return streams._replace(caches=None, partner_caches=None)

    def _contrast(self, model: MaskVLM) -> tuple[Shares, list[tuple[Tensor, Tensor]]]:
        """Shares of the objectives of the global batch, from all microbatches of this rank. ITC draws the negatives.

        Returns them with an empty list, for `_pass`.
        """
        features = Features(self._step, model, self._microbatches, self._cached)
        self._step.start_gather(features)
        shares = self._step.batch_shares(features)
        if self._step.of_negatives:
            self._exchange = self._step.exchange(features)
        return shares, []

    def _itm(self, exchange: FeatureExchange, a: int) -> None:
        """Forward and backward pass of the objectives of negatives (ITM), for microbatch a."""
        own, arrived = self._cached[a], exchange.wait(a)
        for x in arrived:  # leaves: backward stops here, and frees the graph of this microbatch
            x.requires_grad_()
        if a + 1 < len(self._cached):
            exchange.start(a + 1)
        self._pass(lambda model: (self._step.negatives_shares(model, exchange.pairs(a, own, *arrived)), []))
        self._add_returned()
        self._returning = exchange.backward(a, *map(_gradient, arrived))

    def _add_returned(self) -> None:
        """Add the gradients that other ranks return, if any are on their way, to those of the cached features."""
        if not self._returning:
            return
        (image, text), self._returning = (handle.wait() for handle in self._returning), []
        texts = text.split([own.text.packing.total for own in self._cached])
        for own, of_image, of_text in zip(self._cached, image.split(self._step.layout.pairs), texts, strict=True):
            _gradient(own.image).add_(of_image)
            _gradient(own.text.rows).add_(of_text)

    def _reconstruct(self, model: MaskVLM, a: int) -> tuple[Shares, list[tuple[Tensor, Tensor]]]:
        """Shares of the objectives that microbatch a has alone (MLM, MIM).

        Returns them, and pairs of its features, encoded again, and their gradients from the first pass, for `_pass`.
        """
        features = self._features(model, a)
        shares = self._step.microbatch_shares(features)
        self._add_returned()
        cached, again = _tensors(self._cached[a]) if self._cached else {}, _tensors(features.streams)
        return shares, [(again[name], x.grad) for name, x in cached.items() if x.grad is not None]


def _tensors(streams: Streams) -> dict[str, Tensor]:
    """Feature tensors by name of the stream: images (B, 1+N, C), captions as packed rows (T, C).

    Missing streams are left out.
    """
    texts = {"text": streams.text, "masked_text": streams.masked_text}
    found = {"image": streams.image, "masked_image": streams.masked_image}
    found |= {name: None if x is None else x.rows for name, x in texts.items()}
    return {name: x for name, x in found.items() if x is not None}


def _gradient(leaf: Tensor) -> Tensor:
    assert leaf.grad is not None
    return leaf.grad


def _scaled_total(model: MaskVLMNetwork, shares: Shares, step: Step) -> tuple[Tensor, Tensor]:
    """W times the weighted sum of the losses' shares, to call backward on, and all shares in the order of `step.names`.

    The factor W is there because DDP and FSDP2 average gradients over ranks. A missing share is 0.
    """
    # DDP waits for a gradient of every parameter. A sum of no elements gives a zero gradient to those that this pass
    # does not use: with several microbatches, the last pass computes no ITC and no ITM.
    idle = idle_parameters(model, step.computed if step.layout.microbatches == 1 else step.of_microbatch)
    # Nor does it use the biases of keys if ITM alone reads a last block: the fast implementation needs no keys there.
    idle += [encoder.layers[-1].self_attention.key.bias for encoder in (model.image_cross, model.text_cross)]
    if any(objective.trains == ANY_PART for objective in step.computed):  # nobody knows which it uses
        idle = list(model.parameters())
    # FSDP2 waits for none. In a block that is not called, it has left its parameters sharded.
    idle = [parameter for parameter in idle if not isinstance(parameter, DTensor)]
    zero = next(iter(shares.values())).new_zeros(()) if shares else torch.zeros((), device=model.log_scale.device)
    unused = sum((p.flatten()[:0].sum() for p in idle), zero)
    found = torch.stack([shares.get(name, zero).detach() for name in step.names])
    return step.layout.ranks * step.total(shares, zero) + unused, found
