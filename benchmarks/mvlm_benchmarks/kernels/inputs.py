"""Sizes and seeded random arguments of the benchmark cases.

Shape legend: B images, C channels, S image side, P patch side, N patches, K chosen patches, F = C*P*P.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

CHANNELS, SIDE, PATCH, PATCHES, MASKED, WIDTH = 3, 224, 16, 196, 116, 768
FEATURES = CHANNELS * PATCH * PATCH
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


@dataclass(frozen=True)
class Inputs:
    """Arguments of an op by name. Only `leaves` get gradients."""

    leaves: dict[str, Tensor]
    fixed: dict[str, Any]


class RandomInputs:
    """Seeded random tensors. They are drawn on the CPU, so that all devices and processes get equal values."""

    def __init__(self, device: str, dtype: torch.dtype) -> None:
        self._generator = torch.Generator().manual_seed(0)
        self._device, self._dtype = device, dtype

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=self._generator) * scale).to(self._device, self._dtype).requires_grad_()

    def far_from_pixels(self, *shape: int) -> Tensor:
        """Values near 6 or -6. Normalised pixels are within 2.7 of 0, so rounding flips no sign of an L1 term."""
        side = torch.randint(0, 2, shape, generator=self._generator) * 12.0 - 6.0
        return (side + torch.randn(shape, generator=self._generator) * 0.5).to(self._device, self._dtype)

    def images(self, batch: int, dtype: torch.dtype) -> Tensor:
        """Images (B, C, S, S): 0 to 255 in uint8, else values in [0, 1]."""
        values = torch.randint(0, 256, (batch, CHANNELS, SIDE, SIDE), generator=self._generator, dtype=torch.uint8)
        return values.to(self._device) if dtype == torch.uint8 else (values / 255).to(self._device, dtype)

    def patch_ids(self, batch: int, count: int) -> Tensor:
        """Distinct patch numbers of each image, int32 (B, K), ascending."""
        order = torch.rand(batch, PATCHES, generator=self._generator).argsort(dim=1)[:, :count]
        return order.sort(dim=1).values.int().to(self._device)

    def lengths(self, batch: int, low: int, high: int) -> Tensor:
        """Lengths from `low` to `high`, int32 (B,)."""
        return torch.randint(low, high + 1, (batch,), generator=self._generator, dtype=torch.int32).to(self._device)
