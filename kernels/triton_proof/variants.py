"""Variants of a test: the same test on inputs of other strides, or of other sizes."""

import itertools
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from triton_proof.allocations import poison_value, watched

FACTORIES = tuple((torch, name) for kind in ("rand", "randn", "randint") for name in (kind, f"{kind}_like"))
"""Functions that make inputs. Zeros and the like are more often outputs, whose strides the host code knows."""


class Gaps:
    """Puts the rows of tensors apart, with NaN between them, each tensor's by another stride."""

    def __init__(self) -> None:
        self._widths = itertools.count(3, 2)

    def __call__(self, x: Tensor) -> Tensor:
        """A copy of x with gaps; x itself if it has one dimension, or strides of its own."""
        if x.dim() < 2 or not x.numel() or not x.is_contiguous():
            return x
        shape = (*x.shape[:-1], x.shape[-1] + next(self._widths))
        wide = torch.full(shape, poison_value(x.dtype), dtype=x.dtype, device=x.device)
        out = wide[..., : x.shape[-1]]
        out.copy_(x.detach())
        return out.requires_grad_(x.requires_grad)

    def inside(self, module: str) -> AbstractContextManager[None]:
        """Context in which the inputs that this module makes by `FACTORIES` have gaps."""
        return watched(self, module, FACTORIES)


def odd_sizes(values: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of a test that hold even numbers, alone or in a shape, with 1 added to each of these."""
    changed = {name: _odd(value) for name, value in values.items()}
    return {name: value for name, value in changed.items() if value != values[name]}


def _odd(value: Any) -> Any:
    if type(value) is int and value > 0:
        return value | 1
    if isinstance(value, tuple | list | torch.Size) and all(type(x) is int for x in value):
        return type(value)(_odd(x) for x in value)
    return value
