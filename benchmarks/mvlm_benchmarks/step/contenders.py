"""Who takes part in the step benchmark, and how each makes its losses from one batch."""

import contextlib
import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import nn

from mvlm.config import MaskVLMConfig
from mvlm.model import MaskVLM
from mvlm.objectives import Losses
from mvlm_benchmarks.step.baselines import Baseline, Cross
from mvlm_benchmarks.step.inputs import Padded, make_batch, negatives, pad
from mvlm_benchmarks.step.shared_weights import SharedWeights
from mvlm_dataloading import Batch, Masks

SEED, STEP = 0, 0
"""What ITM's negatives are drawn with."""

BASELINES: dict[str, Cross] = {"timm+roberta": "roberta", "timm+decoder-layer": "decoder-layer"}
PLANS: dict[str, Literal["plain", "fast"]] = {"plain": "plain", "fast": "fast", "drop_masked": "fast"}
"""Ours, and the plan that each runs."""
OTHER_METHOD = "drop_masked"
"""Its losses are not the others': hidden patches skip the encoder."""
COMPILED = ("timm+roberta-compiled", "timm+decoder-layer-compiled", "fast-compiled")
CONTENDERS = (*BASELINES, "timm+roberta-compiled", "timm+decoder-layer-compiled", "plain", "fast", "fast-compiled",
              "drop_masked")  # fmt: skip


class Inputs(NamedTuple):
    """One batch in the loader's form and in a collator's, with the negatives that ours draws from it."""

    batch: Batch
    masks: Masks
    padded: Padded


def make_inputs(model: MaskVLM, lengths: np.ndarray, device: torch.device) -> Inputs:
    """A batch of captions of these lengths (B,), on the device."""
    batch, masks = make_batch(model.config, lengths)
    batch, masks = batch.to(device), masks.to(device)
    return Inputs(batch, masks, pad(model.config, batch, masks, *negatives(model, batch, SEED, STEP)))


def eager_name(contender: str) -> str:
    """The contender of which this one is the compiled version, or itself."""
    return contender.removesuffix("-compiled")


def make_module(contender: str, config: MaskVLMConfig) -> nn.Module:
    """The contender's module with weights of its own."""
    name = eager_name(contender)
    if name in BASELINES:
        return Baseline(config, BASELINES[name])
    return MaskVLM(replace(config, drop_masked=name == OTHER_METHOD))


def losses_of(contender: str, module: Any, inputs: Inputs) -> Losses:
    """One forward pass of the contender's module, compiled or not."""
    name = eager_name(contender)
    if name in BASELINES:
        return module(inputs.padded)
    return module(inputs.batch, inputs.masks, seed=SEED, step=STEP, plan=PLANS[name])


@dataclass(frozen=True)
class Contender:
    """One that is ready to step."""

    name: str
    module: nn.Module
    """Holds the parameters; contenders of one implementation share it."""
    call: Any
    """The module, or its compiled form."""
    optimizer: torch.optim.Optimizer | None
    precision: Callable[[], contextlib.AbstractContextManager[Any]]
    """The context of a forward pass."""

    def losses(self, inputs: Inputs) -> Losses:
        with self.precision():
            return losses_of(self.name, self.call, inputs)

    def backward(self, inputs: Inputs) -> Losses:
        losses = self.losses(inputs)
        losses.total.backward()
        return losses

    def update(self) -> None:
        """The optimizer's step, where there is one. No gradient is left."""
        if self.optimizer is not None:
            self.optimizer.step()
        self.module.zero_grad(set_to_none=True)


def make_contenders(
    names: tuple[str, ...],
    model: MaskVLM,
    optimizer: bool,
    precision: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
) -> list[Contender]:
    """The named contenders on the model's weights, which lie in memory once.

    AdamW runs at a learning rate of 0: it does all its work, and every step of every contender starts from the same
    weights.
    """
    shared = SharedWeights(model)
    dropping = copy.copy(model)  # the same parameters and modules under another configuration
    dropping.config = replace(model.config, drop_masked=True)
    made: dict[str, tuple[nn.Module, torch.optim.Optimizer | None]] = {}
    found = []
    for name in names:
        kind = eager_name(name) if eager_name(name) in BASELINES else "ours"
        if kind not in made:
            module = shared.baseline(BASELINES[kind]) if kind in BASELINES else model
            adamw = torch.optim.AdamW(module.parameters(), lr=0.0, weight_decay=0.05, fused=True)
            made[kind] = module, adamw if optimizer else None
        module, adamw = made[kind]
        module = dropping if name == OTHER_METHOD else module
        found.append(Contender(name, module, torch.compile(module) if name in COMPILED else module, adamw, precision))
    return found
