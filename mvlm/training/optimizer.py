"""AdamW and Muon, learning rates by part of the model, their schedule, and an average of the weights.

Both optimizers can clip gradients and skip an update on the device, so that the host need not wait for a step.

Muon is momentum whose update of a matrix is made orthogonal, so that it learns equally fast in all directions. Source:
Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024. `torch.optim.Muon` does the same, one
matrix at a time. It cannot skip an update without a host sync, and takes matrices alone.
"""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from mvlm.config.groups import RunConfig
from mvlm.config.pretrain import PretrainConfig
from mvlm.device import chosen_precision
from mvlm.model.network import PIXEL_MODULES

# Operations on a list of tensors are one kernel on a GPU. torch has no public names for them.
_foreach_copy_ = torch._foreach_copy_  # pyright: ignore[reportPrivateImportUsage]
_foreach_div_ = torch._foreach_div_  # pyright: ignore[reportPrivateImportUsage]
_foreach_lerp_ = torch._foreach_lerp_  # pyright: ignore[reportPrivateImportUsage]
_foreach_mul_ = torch._foreach_mul_  # pyright: ignore[reportPrivateImportUsage]
_foreach_sub_ = torch._foreach_sub_  # pyright: ignore[reportPrivateImportUsage]


class GuardedAdamW(torch.optim.AdamW):
    """Fused AdamW that can clip gradients and skip an update. Neither needs a host sync or a further pass over memory.

    The fused kernels read two attributes that GradScaler sets for the same purposes.
    """

    found_inf: Tensor | None = None
    """float32 (), 1 = skip the update: weights, moments and step counts stay. None: never skip."""
    grad_scale: Tensor | None = None
    """float32 (), by which gradients are divided before the update. None: they are not."""

    def set_learning_rates(self, factor: float) -> None:
        """Set the learning rate of each parameter group to `factor` times its peak."""
        for group in self.param_groups:
            group["lr"] = group["peak"] * factor

    def clip(self, norm: Tensor, limit: float) -> None:
        """Let the next step clip the gradients to the norm `limit`, as torch's `clip_grad_norm_` does.

        norm: that of all gradients before clipping, a scalar on the device.
        """
        self.grad_scale = ((norm.float() + 1e-6) / limit).clamp(min=1)


MOMENTUM = 0.95
"""Decay of Muon's running mean of gradients."""
ITERATIONS = 5
"""Number of Newton-Schulz iterations in an update by Muon."""
# Coefficients of x, x^3 and x^5 that raise small singular values fast; those from 0.002 up end between 0.68 and 1.2.
_X, _X3, _X5 = 3.4445, -4.7750, 2.0315
_MATRICES_OF_A_PRODUCT = {"cpu": 8, "cuda": 64}
"""Most matrices that Muon updates together, by device. On a CPU so many of a small model stay in a core's L2 cache. On
a GPU each further product is a few more operations for the host."""


class GuardedMuon(GuardedAdamW):
    """Muon for the parameter groups with `muon` True, AdamW for the others, with the guards of `GuardedAdamW`.

    Rates and weight decay mean what they do in torch's Muon: an update is the rate times an orthogonal matrix, times
    the root of rows / columns where that is above 1.
    """

    precision: torch.dtype = torch.float32
    """Dtype of the Newton-Schulz iterations."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update the weights, and drop the gradients of Muon's matrices."""
        for group in self.param_groups:
            if group["muon"]:
                for matrices in _batches(group["params"]):
                    self._update(group, matrices)
        return super().step(closure)

    def _update(self, group: dict[str, Any], parameters: Sequence[nn.Parameter]) -> None:
        """Update some matrices of one shape by Muon."""
        rate: Any = group["lr"] * (1.0 if self.found_inf is None else 1 - self.found_inf)
        rows, columns = parameters[0].shape
        # On a CPU a gradient and its mean stay in the cache from one operation to the next.
        parts = [[p] for p in parameters] if parameters[0].device.type == "cpu" else [parameters]
        mixed = [x for part in parts for x in self._momentum(part)]
        directions = mixed[0].new_empty((len(mixed), rows, columns), dtype=self.precision)
        _foreach_copy_(list(directions.unbind()), mixed)
        updates = list((orthogonalize(directions).float() * (rate * max(1, rows / columns) ** 0.5)).unbind())
        for i, parameter in enumerate(parameters):
            if isinstance(parameter, DTensor):  # all ranks have the same update, so none is sent
                mesh, placements = parameter.device_mesh, parameter.placements
                updates[i] = _shard(distribute_tensor(updates[i], mesh, placements, src_data_rank=None))
        weights = [_shard(p) for p in parameters]
        _foreach_mul_(weights, 1 - rate * group["weight_decay"])
        _foreach_sub_(weights, updates)

    def _momentum(self, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
        """Update the running means of the gradients. Returns Nesterov's mix of gradient and mean of each matrix.

        The mixes are whole matrices on every rank. The parameters' gradients are dropped.
        """
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter]["momentum"] = torch.zeros_like(parameter)
        whole = [cast(Tensor, p.grad) for p in parameters]
        means, gradients = [_shard(self.state[p]["momentum"]) for p in parameters], [_shard(x) for x in whole]
        if self.grad_scale is not None:
            _foreach_div_(gradients, self.grad_scale)
        if self.found_inf is not None:  # a skipped gradient may be NaN, which a factor of 0 would not remove
            skipped = self.found_inf > 0
            for mean, gradient in zip(means, gradients, strict=True):
                torch.where(skipped, mean, gradient, out=gradient)
        _foreach_lerp_(means, gradients, 1 - MOMENTUM)
        _foreach_lerp_(gradients, means, MOMENTUM)
        for parameter in parameters:
            parameter.grad = None  # AdamW then leaves the parameter alone
        return [x.full_tensor() if isinstance(x, DTensor) else x for x in whole]


def orthogonalize(matrices: Tensor) -> Tensor:
    """Matrices with the same singular vectors and singular values near 1, by five Newton-Schulz iterations.

    Singular values below a five-hundredth of a matrix's Frobenius norm end smaller than 0.68.

    Args:
        matrices: floating point, (matrices, rows, columns). A matrix of zeros stays one.

    Returns:
        The same shape and dtype.
    """
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    wide = torch.promote_types(x.dtype, torch.float32)
    norm = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True, dtype=wide)
    x = x / norm.clamp(min=1e-7).to(x.dtype)
    for _ in range(ITERATIONS):
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=_X3, alpha=_X5), x, beta=_X)
    return x.mT if tall else x


def _batches(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Yield the parameters that have a gradient in groups of one shape, of at most `_MATRICES_OF_A_PRODUCT`."""
    shapes: dict[torch.Size, list[nn.Parameter]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            shapes.setdefault(parameter.shape, []).append(parameter)
    for same in shapes.values():
        most = _MATRICES_OF_A_PRODUCT.get(same[0].device.type, _MATRICES_OF_A_PRODUCT["cuda"])
        for start in range(0, len(same), most):
            yield same[start : start + most]


def _shard(tensor: Tensor) -> Tensor:
    """This rank's shard of a parameter or gradient: all of it, except with FSDP2."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


IN_BLOCK = re.compile(r"\.blocks\.\d|_encoder\.tower\..*\blayers?\.\d")
"""Matches the names of the parameters of all transformer blocks, of our own encoders and of towers."""
EMBEDDING_OF_TOWER = re.compile(
    r"\.tower\..*(embeddings?|relative_attention_bias)\.weight$|\.module\..*\b(pos_embed|(cls|reg)_token|latent|freqs)$"
)
"""Matches the names of the embeddings of towers. Convolutions of patches are no embeddings."""


def own_rate(name: str, config: RunConfig) -> float | None:
    """`lr_image` or `lr_text` for a parameter of that encoder, if the setting is given; None for other parameters.

    name: of the parameter in a model, or in a task around one.
    """
    return {"image_encoder": config.lr_image, "text_encoder": config.lr_text}.get(
        name.removeprefix("model.").split(".")[0]
    )


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
    """Make the optimizer, with a parameter group for each combination of peak learning rate and weight decay.

    Weights of linear layers decay. Biases, norms and embeddings do not. Frozen parameters are left out. `rate` gives
    the peak learning rate of a parameter by its name, where the settings have no `own_rate`. With `--optimizer muon`
    the matrices of all blocks are groups of their own, with `lr_muon`. A group has its peak learning rate as `peak`.
    """
    lr_muon = config.lr_muon if isinstance(config, PretrainConfig) and config.optimizer == "muon" else None
    groups: dict[tuple[float, bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        embedding = name.endswith(("position", "words.weight")) or EMBEDDING_OF_TOWER.search(name)
        matrix = parameter.ndim >= 2 and not embedding
        # An orthogonal update of each factor of an adapter would be no such update of their product.
        block = IN_BLOCK.search(name) is not None and ".parametrizations." not in name
        muon = lr_muon is not None and parameter.ndim == 2 and block
        own = own_rate(name, config)
        if lr_muon is not None and muon:
            peak = lr_muon if own is None else lr_muon * own / config.lr_cross
        else:
            peak = rate(name, config) if own is None else own
        groups.setdefault((peak, matrix, muon), []).append(parameter)
    settings: Any = [
        {"params": parameters, "peak": peak, "weight_decay": config.weight_decay if matrix else 0.0, "muon": muon}
        for (peak, matrix, muon), parameters in groups.items()
    ]
    kind = GuardedAdamW if lr_muon is None else GuardedMuon
    optimizer = kind(settings, lr=config.lr_cross, betas=(0.9, config.beta2), fused=True)
    if isinstance(optimizer, GuardedMuon) and chosen_precision(device, config.precision) == "bf16":
        optimizer.precision = torch.bfloat16
    return optimizer


def learning_rate_factor(step: int, config: RunConfig) -> float:
    """Learning rate at a step (from 0) as a fraction of its peak: linear warm-up, then the schedule, down to `lr_end`.

    `cosine` falls along half a cosine. `wsd` stays at the peak and falls in its last steps by 1 - sqrt(done), which
    Hägele et al., "Scaling laws and compute-optimal training beyond fixed training durations", 2024, found better than
    a line. Behind an end of `extensions` the rate rises again from `lr_end`, in as many steps as at the start, and
    falls again: Ibrahim et al., "Simple and scalable strategies to continually pre-train large language models", 2024.
    """
    start = max((end for end in config.extensions if end <= step), default=0)
    end = min(end for end in (*config.extensions, config.max_steps) if end > start)
    low, step = config.lr_end, step - start
    length, warm = end - start, config.warmup_steps
    if step < warm:
        risen = (step + 1) / warm
        return risen if start == 0 else low + (1 - low) * risen
    if config.schedule == "cosine":
        done = (step - warm) / max(1, length - warm)
        return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * done))
    falls = cooldown_start(config, start, end) - start
    done = max(0, step - falls) / max(1, length - falls)
    return low + (1 - low) * (1 - math.sqrt(done))


def cooldown_start(config: RunConfig, start: int, end: int) -> int:
    """Number of the update after which `wsd`'s learning rate falls, in the part of a run between two updates.

    start, end: numbers of the updates after which the part begins and ends.
    """
    steps = round((end - start) / 5) if config.cooldown_steps is None else config.cooldown_steps
    return max(start + config.warmup_steps, end - steps)


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
        _foreach_lerp_(list(self.tensors.values()), weights, 1 - decay)

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
