"""Guard bands around tensors and poisoned allocations, which show accesses out of bounds and unwritten outputs."""

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch

BAND = 64  # elements on either side; a multiple of 16 bytes in every type, so alignment is kept


def poison_value(dtype: torch.dtype) -> float | int | bool:
    """NaN; for integers a value that is out of bounds of anything it indexes."""
    if dtype.is_floating_point:
        return float("nan")
    if dtype == torch.bool:
        return True
    return torch.iinfo(dtype).max


def _is_poison(x: torch.Tensor) -> bool:
    return bool(x.isnan().all() if x.dtype.is_floating_point else (x == poison_value(x.dtype)).all())


class Guarded:
    """A tensor between two bands of poison. ``check`` raises AssertionError if a band was written to."""

    def __init__(
        self, size: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> None:
        span = 1 + sum((n - 1) * s for n, s in zip(size, stride, strict=True)) if 0 not in size else 0
        self.storage = torch.full((span + 2 * BAND,), poison_value(dtype), dtype=dtype, device=device)
        self.tensor = self.storage.as_strided(size, stride, BAND)
        self.span = span

    def check(self) -> None:
        assert _is_poison(self.storage[:BAND]), "a kernel wrote in front of a buffer"
        assert _is_poison(self.storage[BAND + self.span :]), "a kernel wrote past the end of a buffer"


def guarded(x: torch.Tensor, device: str | torch.device | None = None) -> torch.Tensor:
    """A copy of x with its strides, between bands of NaN: reading past either end poisons the result.

    The copy is on x's device or on ``device``.
    """
    copy = Guarded(tuple(x.shape), x.stride(), x.dtype, torch.device(device or x.device))
    if x.numel():
        # Expanded inputs (stride 0) alias: copy one element of each expanded dimension.
        index = tuple(slice(0, 1) if s == 0 else slice(None) for s in x.stride())
        copy.tensor[index].copy_(x.detach()[index])
    return copy.tensor.requires_grad_(x.requires_grad)


class Poison:
    """Replacement of allocations in a package by guarded ones filled with NaN."""

    def __init__(self, package: str = "mvlm_kernels") -> None:
        self.package = package
        self.buffers: list[Guarded] = []

    def wrap(self, allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        @functools.wraps(allocate)
        def poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
            x = allocate(*args, **kwargs)
            caller = sys._getframe(1).f_globals.get("__name__", "")
            ours = f"{caller}.".startswith(f"{self.package}.")
            if not ours or type(x) is not torch.Tensor or x.device.type == "meta":
                return x
            buffer = Guarded(tuple(x.shape), x.stride(), x.dtype, x.device)
            self.buffers.append(buffer)
            return buffer.tensor

        return poisoned

    def check(self) -> None:
        for buffer in self.buffers:
            buffer.check()
