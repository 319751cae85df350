"""Benchmark cases, the sizes of their inputs, and seeded random arguments.

Shape legend: B images, C channels, S image side, P patch side, N patches, K chosen patches, F = C*P*P.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


@dataclass(frozen=True)
class Sizes:
    """Sizes of images, patches and tokens."""

    side: int
    patch: int
    masked: int
    """Masked patches of an image."""
    width: int
    channels: int = 3

    @property
    def patches(self) -> int:
        return (self.side // self.patch) ** 2

    @property
    def features(self) -> int:
        return self.channels * self.patch**2


PAPER = Sizes(side=224, patch=16, masked=116, width=768)
SMALL = Sizes(side=24, patch=8, masked=5, width=40)
"""For rehearsals, and for tools that slow a GPU down. Odd on purpose: no length is a multiple of a tile."""


@dataclass(frozen=True)
class Inputs:
    """Arguments of an op by name. Only `leaves` get gradients."""

    leaves: dict[str, Tensor]
    fixed: dict[str, Any]

    def tensors(self) -> list[Tensor]:
        """All tensors among the arguments, the leaves first."""
        return [*self.leaves.values(), *(x for x in self.fixed.values() if isinstance(x, Tensor))]

    def values(self) -> list[Tensor]:
        """Leaves and images. The others are lengths, indices and masks, from which peers make tensors in advance."""
        return [x for x in self.tensors() if x.is_floating_point() or x.dtype == torch.uint8]


class Maker(Protocol):
    """Makes inputs on a device. The seed changes values only: shapes, lengths, indices and masks are the case's."""

    def __call__(self, device: str, seed: int = 0) -> Inputs: ...


@dataclass(frozen=True)
class Case:
    """One op at one shape and dtype."""

    op: str
    shape: str
    """Shape as text, for results."""
    dtype: torch.dtype
    make: Maker
    ours: Callable[..., Any] | None
    """Our op. Takes all arguments by name; returns a tensor or several. None: this version does not have it."""
    reference: Callable[..., Any]
    """The op in plain torch. Takes all arguments by name, the leaves in float64."""
    minimum: tuple[int, int]
    """Bytes of (forward, backward) if each input is read once and each output written once. A tensor that forward saves
    for backward counts as an output of forward and an input of backward."""
    flops: tuple[int, int] = (0, 0)
    """Number of floating-point operations of (forward, backward)."""
    core: bool = False
    """True if `--quick` includes the case."""
    product: tuple[int, int, int] | None = None
    """Sizes (M, N, K) of the matrix product that forward contains, whose time by torch alone is reported."""
    has_kernels: bool = True
    """`ours` is an op of `mvlm_kernels`, so that `explain` knows it and its launches have names."""
    left_to_torch: bool = False
    """Our op runs torch here by its own rule, on every GPU: both sides of an attention are long."""

    @property
    def gradients_in_forward(self) -> bool:
        """True if our forward pass computes the gradients, so that backward has no operations left."""
        return self.flops[0] > 0 == self.flops[1]


class RandomInputs:
    """Seeded random tensors, drawn on the device: a GPU draws gigabytes in no time, and a CPU in minutes.

    Two processes on one machine get equal values. Indices are drawn on the CPU: they belong to the case.
    """

    def __init__(self, device: str, dtype: torch.dtype, seed: int = 0, sizes: Sizes = PAPER) -> None:
        self._sizes = sizes
        # The meta device has no generator, and no values.
        self._generator = None if device == "meta" else torch.Generator(device).manual_seed(seed)
        self._indices = torch.Generator().manual_seed(0)
        self._device, self._dtype = device, dtype

    def normal(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        """Leaf of normal values, in the case's dtype or in another one."""
        drawn = torch.randn(shape, generator=self._generator, device=self._device) * scale
        return drawn.to(dtype or self._dtype).requires_grad_()

    def far_from_pixels(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Values near 6 or -6. Normalised pixels are within 2.7 of 0, so rounding flips no sign of an L1 term."""
        side = torch.randint(0, 2, shape, generator=self._generator, device=self._device) * 12.0 - 6.0
        drawn = side + torch.randn(shape, generator=self._generator, device=self._device) * 0.5
        return drawn.to(dtype or self._dtype)

    def images(self, batch: int, dtype: torch.dtype) -> Tensor:
        """Images (B, C, S, S): 0 to 255 in uint8, else values in [0, 1]."""
        shape = batch, self._sizes.channels, self._sizes.side, self._sizes.side
        values = torch.randint(0, 256, shape, generator=self._generator, dtype=torch.uint8, device=self._device)
        return values if dtype == torch.uint8 else (values / 255).to(dtype)

    def patch_ids(self, batch: int, count: int) -> Tensor:
        """Distinct patch numbers of each image, int32 (B, K), ascending."""
        order = torch.rand(batch, self._sizes.patches, generator=self._indices).argsort(dim=1)[:, :count]
        return order.sort(dim=1).values.int().to(self._device)

    def integers(self, high: int, *shape: int) -> Tensor:
        """Integers in [0, high), int64."""
        return torch.randint(0, high, shape, generator=self._indices).to(self._device)
