"""The optimizer with learning rates by part of the model, the learning rate schedule, and an average of the weights."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mvlm.config.pretrain import PretrainConfig
from mvlm.config.run import RunConfig
from mvlm.device import chosen_precision
from mvlm.model.network import PIXEL_MODULES
from mvlm.training.guarded_adamw import GuardedAdamW
from mvlm.training.muon import GuardedMuon


def peak_rate(name: str, config: PretrainConfig) -> float:
    """Peak learning rate of the model's parameter with this name."""
    if name.startswith(("image_encoder.", "text_encoder.")):
        return config.lr_encoder
    if name.startswith(PIXEL_MODULES):
        return config.lr_pixels
    return config.lr_cross


def make_optimizer(
    model: nn.Module,
    config: RunConfig,
    device: torch.device,
    rate: Callable[[str, Any], float] = peak_rate,
) -> GuardedAdamW:
    """Make the optimizer, with a parameter group for each pair of peak learning rate (`peak`) and weight decay.

    Weights of linear layers decay. Biases, norms and embeddings do not. Frozen parameters are left out. `rate` gives
    the peak learning rate of a parameter by its name. With `--optimizer muon` the matrices of all blocks are a group of
    their own, with `lr_muon`.
    """
    lr_muon = config.lr_muon if isinstance(config, PretrainConfig) and config.optimizer == "muon" else None
    groups: dict[tuple[float, bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        matrix = parameter.ndim >= 2 and not name.endswith(("position", "words.weight"))
        muon = lr_muon is not None and parameter.ndim == 2 and ".blocks." in name
        peak = lr_muon if lr_muon is not None and muon else rate(name, config)
        groups.setdefault((peak, matrix, muon), []).append(parameter)
    settings: Any = [
        {
            "params": parameters,
            "peak": peak,
            "weight_decay": config.weight_decay if matrix else 0.0,
            "muon": muon,
        }
        for (peak, matrix, muon), parameters in groups.items()
    ]
    kind = GuardedAdamW if lr_muon is None else GuardedMuon
    optimizer = kind(settings, lr=config.lr_cross, betas=(0.9, config.beta2), fused=True)
    if isinstance(optimizer, GuardedMuon) and chosen_precision(device, config.precision) == "bf16":
        optimizer.precision = torch.bfloat16
    return optimizer


def learning_rate_factor(step: int, config: RunConfig) -> float:
    """Learning rate at a step (from 0) as a fraction of its peak: linear warm-up, then cosine decay to `lr_end`."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, config.max_steps - config.warmup_steps)
    return config.lr_end + (1 - config.lr_end) * 0.5 * (1 + math.cos(math.pi * done))


class ExponentialMovingAverage:
    """Exponential moving average (EMA) of a model's weights, on the same device.

    The decay of update t, from 1, is min(decay, t / (9 + t)), so that the initial weights are soon forgotten. After a
    skipped update the weights are unchanged, and the average still moves towards them.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._model, self._decay = model, decay
        self.tensors = {name: p.detach().clone() for name, p in model.named_parameters()}
        """Averages by parameter name, with the parameters' shapes and dtypes."""

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the average towards the weights after update `step`, from 1."""
        decay = min(self._decay, step / (9 + step))
        weights = [p.detach() for p in self._model.parameters()]
        # One kernel for all tensors. torch has no public name for its list-wise operations.
        torch._foreach_lerp_(list(self.tensors.values()), weights, 1 - decay)  # pyright: ignore[reportPrivateImportUsage]

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Context in which the model has the averaged weights."""
        with torch.no_grad():
            own = [p.detach().clone() for p in self._model.parameters()]
            self._set(list(self.tensors.values()))
            try:
                yield
            finally:
                self._set(own)

    def _set(self, values: list[Tensor]) -> None:
        # One by one: torch's list-wise copy does not handle DTensors.
        for parameter, value in zip(self._model.parameters(), values, strict=True):
            parameter.copy_(value)
