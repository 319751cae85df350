"""Muon: momentum whose update of a matrix is made orthogonal, so that it learns equally fast in all directions.

Source: Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024. `torch.optim.Muon` does
the same, one matrix at a time. It cannot skip an update without a host sync, and takes matrices alone.
"""

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from mvlm.training.guarded_adamw import GuardedAdamW

MOMENTUM = 0.95
"""Decay of the mean of gradients."""
ITERATIONS = 5
"""Newton-Schulz iterations of an update."""
# Coefficients of x, x^3 and x^5 that raise small singular values fast; those from 0.002 up end between 0.68 and 1.2.
_X, _X3, _X5 = 3.4445, -4.7750, 2.0315
# On a CPU so many matrices of a small model stay in a core's L2 cache.
_MATRICES_OF_A_PRODUCT = 8


class GuardedMuon(GuardedAdamW):
    """Muon for the groups of parameters that have `muon`, AdamW for the others, with the guards of `GuardedAdamW`.

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
        """Update a few matrices of one shape."""
        rate: Any = group["lr"] * (1.0 if self.found_inf is None else 1 - self.found_inf)
        rows, columns = parameters[0].shape
        directions = torch.stack([self._momentum(p).to(self.precision) for p in parameters])
        updates = orthogonalize(directions).float() * (rate * max(1, rows / columns) ** 0.5)
        for parameter, update in zip(parameters, updates, strict=True):
            _shard(parameter).mul_(1 - rate * group["weight_decay"]).sub_(_shard_of(update, parameter))

    def _momentum(self, parameter: nn.Parameter) -> Tensor:
        """Put a gradient into the mean of gradients. Returns Nesterov's mix of both, the whole matrix on every rank."""
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        whole = cast(Tensor, parameter.grad)
        mean, gradient = _shard(state["momentum"]), _shard(whole)
        if self.grad_scale is not None:
            gradient.div_(self.grad_scale)
        if self.found_inf is not None:  # a skipped gradient may be NaN, which a factor of 0 would not remove
            gradient.copy_(torch.where(self.found_inf > 0, mean, gradient))
        mean.lerp_(gradient, 1 - MOMENTUM)
        gradient.lerp_(mean, MOMENTUM)
        parameter.grad = None  # AdamW then leaves the parameter alone
        return whole.full_tensor() if isinstance(whole, DTensor) else whole


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
    """Parameters with a gradient, a few of one shape at a time."""
    shapes: dict[torch.Size, list[nn.Parameter]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            shapes.setdefault(parameter.shape, []).append(parameter)
    for same in shapes.values():
        for start in range(0, len(same), _MATRICES_OF_A_PRODUCT):
            yield same[start : start + _MATRICES_OF_A_PRODUCT]


def _shard(tensor: Tensor) -> Tensor:
    """The part of a parameter or gradient that this rank has: all of it, except with FSDP2."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _shard_of(whole: Tensor, parameter: Tensor) -> Tensor:
    """The part of a matrix that this rank has of a parameter. All ranks have the same matrix, so none is sent."""
    if not isinstance(parameter, DTensor):
        return whole
    return _shard(distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None))
