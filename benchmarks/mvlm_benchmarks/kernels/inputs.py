"""Inputs of the ops' cases, drawn from a seed: sizes, and arguments by name."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

CHANNELS, SIDE, PATCH, PATCHES, MASKED, WIDTH = 3, 224, 16, 196, 116, 768
FEATURES = CHANNELS * PATCH * PATCH
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


@dataclass(frozen=True)
class Inputs:
    """Arguments by name: ``leaves`` get gradients, ``fixed`` are the others."""

    leaves: dict[str, Tensor]
    fixed: dict[str, Any]


class Random:
    """Draws on the CPU, so that every device and every process gets the same values."""

    def __init__(self, device: str, dtype: torch.dtype) -> None:
        self._generator = torch.Generator().manual_seed(0)
        self._device, self._dtype = device, dtype

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=self._generator) * scale).to(self._device, self._dtype).requires_grad_()

    def far(self, *shape: int) -> Tensor:
        """Values around 6 or -6: no pixel (normalised, within 2.7 of 0) comes close, and the sign of L1 is certain."""
        side = torch.randint(0, 2, shape, generator=self._generator) * 12.0 - 6.0
        return (side + torch.randn(shape, generator=self._generator) * 0.5).to(self._device, self._dtype)

    def images(self, batch: int, dtype: torch.dtype) -> Tensor:
        values = torch.randint(0, 256, (batch, CHANNELS, SIDE, SIDE), generator=self._generator, dtype=torch.uint8)
        return values.to(self._device) if dtype == torch.uint8 else (values / 255).to(self._device, dtype)

    def ids(self, batch: int, count: int) -> Tensor:
        order = torch.rand(batch, PATCHES, generator=self._generator).argsort(dim=1)[:, :count]
        return order.sort(dim=1).values.int().to(self._device)

    def lengths(self, batch: int, low: int, high: int) -> Tensor:
        return torch.randint(low, high + 1, (batch,), generator=self._generator, dtype=torch.int32).to(self._device)
