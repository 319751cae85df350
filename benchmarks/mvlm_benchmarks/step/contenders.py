"""Contenders of the step benchmark: modules, weights, and losses of one batch."""

import contextlib
import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from mvlm.config.model import MaskVLMConfig
from mvlm.device import compute_dtype
from mvlm.distributed.parallel import MAX_GRAPHS
from mvlm.model.maskvlm import MaskVLM
from mvlm.model.packing import pad_to_bucket
from mvlm.model.shadow_weights import shadow_weights, using
from mvlm.objectives.losses import Losses
from mvlm.objectives.pretraining import ALL, ITC, ITM
from mvlm.objectives.step import Objective
from mvlm_benchmarks.step.inputs import PaddedBatch, draw_negatives, make_batch, pad_batch
from mvlm_dataloading import Batch, Masks
from mvlm_kernels.shadows import Shadows

# The baselines need timm and transformers. They are imported when one is made, so that ours can be timed without them.
if TYPE_CHECKING:
    from mvlm_benchmarks.step.baselines import Cross

SEED, STEP = 0, 0
"""Seed and step with which ITM's negatives are drawn."""

BASELINES: "dict[str, Cross]" = {
    "timm+roberta": "roberta", "timm+decoder-layer": "decoder-layer", "timm+roberta-math": "roberta"
}  # fmt: skip
MATH = "timm+roberta-math"
"""The baseline under torch's `sdpa_kernel(SDPBackend.MATH)`. On a CPU in bf16 the backward pass of SDPA's own kernel
takes several times as long."""
OTHER_METHODS: dict[str, tuple[dict[str, Any], tuple[Objective, ...]]] = {
    "drop_masked": ({"drop_masked": True}, ALL),
    "masked_rows": ({"mim_rows": "masked"}, ALL),
    "itc_itm": ({}, (ITC(), ITM())),
}
"""Contenders whose method and losses are others -> changes of the configuration, and objectives."""
IMPLEMENTATIONS: dict[str, Literal["plain", "fast"]] = {
    "plain": "plain", "fast": "fast", **dict.fromkeys(OTHER_METHODS, "fast")
}  # fmt: skip
"""Our contenders -> argument `plan` of the model."""
COMPILED = ("timm+roberta-compiled", "timm+decoder-layer-compiled", "timm+roberta-math-compiled", "fast-compiled")
CONTENDERS = (*BASELINES, *COMPILED[:-1], "plain", "fast", "fast-compiled", *OTHER_METHODS)


class StepInputs(NamedTuple):
    """One batch in packed and in padded form. The padded form includes the negatives that our model draws."""

    batch: Batch
    masks: Masks
    padded: PaddedBatch
    rounded: dict[str, tuple[Batch, Masks]]
    """Contender -> the packed form with totals rounded up as in training. Others get it as it is."""


def make_inputs(model: MaskVLM, lengths: np.ndarray, device: torch.device, buckets: int = 0) -> StepInputs:
    """Make a batch on the device, with captions of these lengths (B,), and round it for `pad_to_bucket`'s `buckets`."""
    batch, masks = make_batch(model.config, lengths)
    batch, masks = batch.to(device), masks.to(device)
    negatives = draw_negatives(model, batch, SEED, STEP)
    rounded = {}
    for name in (name for name, plan in IMPLEMENTATIONS.items() if plan == "fast" and buckets):
        rounded[name] = pad_to_bucket(batch, masks, model.config.text_length, buckets)
    rounded["fast-compiled"] = pad_to_bucket(batch, masks, model.config.text_length)
    return StepInputs(batch, masks, pad_batch(model.config, batch, masks, *negatives), rounded)


def eager_name(contender: str) -> str:
    """Name of a contender without the suffix `-compiled`."""
    return contender.removesuffix("-compiled")


def make_module(contender: str, config: MaskVLMConfig) -> nn.Module:
    """Make a new module of a contender, with its own weights."""
    name = eager_name(contender)
    if name in BASELINES:
        from mvlm_benchmarks.step.baselines import Baseline

        return Baseline(config, BASELINES[name])
    return MaskVLM(replace(config, **_method(name)[0]))


def _method(name: str) -> tuple[dict[str, Any], tuple[Objective, ...]]:
    """Changes of the configuration, and objectives, of one of our contenders."""
    return OTHER_METHODS.get(name, ({}, ALL))


def compute_losses(contender: str, module: Any, inputs: StepInputs) -> Losses:
    """Losses of the model that a benchmark times under the name `contender`, by a forward pass.

    module: its module, or the compiled form of it.
    """
    name = eager_name(contender)
    if name in BASELINES:
        with sdpa_kernel(SDPBackend.MATH) if name == MATH else contextlib.nullcontext():
            return module(inputs.padded)
    batch, masks = inputs.rounded.get(contender, (inputs.batch, inputs.masks))
    return module(batch, masks, seed=SEED, step=STEP, objectives=_method(name)[1], plan=IMPLEMENTATIONS[name])


@dataclass(frozen=True)
class Contender:
    """A contender with weights and optimizer, ready for training steps."""

    name: str
    module: nn.Module
    """Module that owns the parameters. Contenders with the same parameters share it."""
    call: Any
    """The module, or its compiled form."""
    optimizer: torch.optim.Optimizer | None
    precision: Callable[[], contextlib.AbstractContextManager[Any]]
    """Returns the context of a forward pass, such as autocast."""
    shadows: Shadows | None = None
    """Copies of the weights in bf16, as training with the fast implementation has them."""

    def losses(self, inputs: StepInputs) -> Losses:
        with self.precision():
            return compute_losses(self.name, self.call, inputs)

    def backward(self, inputs: StepInputs) -> Losses:
        with using(self.shadows):
            losses = self.losses(inputs)
            losses.total.backward()
        return losses

    def update(self) -> None:
        """Step the optimizer, unless it is None, and clear all gradients."""
        if self.optimizer is not None:
            self.optimizer.step()
        self.module.zero_grad(set_to_none=True)


def make_contenders(
    names: tuple[str, ...],
    model: MaskVLM,
    optimizer: bool,
    precision: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
) -> list[Contender]:
    """Make the named contenders. All share the model's weights in memory.

    AdamW runs with a learning rate of 0. It does all of its work, and every step of every contender starts from the
    same weights.
    """
    shared: Any = None
    if any(eager_name(name) in BASELINES for name in names):
        from mvlm_benchmarks.step.shared_weights import SharedWeights

        shared = SharedWeights(model)
    implementations: dict[str, tuple[nn.Module, torch.optim.Optimizer | None]] = {}
    contenders = []
    with precision():
        in_bf16 = compute_dtype(model.log_scale) == torch.bfloat16
    for name in names:
        key = eager_name(name) if eager_name(name) in BASELINES else "ours"
        if key not in implementations:
            module = shared.baseline(BASELINES[key]) if key in BASELINES else model
            adamw = torch.optim.AdamW(module.parameters(), lr=0.0, weight_decay=0.05, fused=True)
            implementations[key] = module, adamw if optimizer else None
        module, adamw = implementations[key]
        if name in OTHER_METHODS:  # a shallow copy shares parameters and modules, and has another configuration
            module = copy.copy(model)
            module.config = replace(model.config, **_method(name)[0])
        call = _compiled(name, module) if name in COMPILED else module
        shadows = shadow_weights(module) if in_bf16 and IMPLEMENTATIONS.get(name) == "fast" else None
        contenders.append(Contender(name, module, call, adamw, precision, shadows))
    return contenders


def raise_recompile_limit() -> None:
    """Let torch compile a function as often as in training. Beyond its limit of 8 it runs the function eagerly."""
    torch._dynamo.config.recompile_limit = max(MAX_GRAPHS, torch._dynamo.config.recompile_limit)


def _compiled(name: str, module: nn.Module) -> Any:
    """Compiled form of a contender's module: ours as `--capture compile` does it, a baseline by default."""
    if eager_name(name) in BASELINES:
        return torch.compile(module)
    raise_recompile_limit()
    return torch.compile(module, fullgraph=True, dynamic=False)
