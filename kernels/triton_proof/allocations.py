"""Memory that host code allocates for kernels: filled and fenced so that wrong accesses show.

A kernel that reads what nobody wrote gets NaN or, emulated, a finding. A kernel that writes past a buffer changes a
band of poison around it.
"""

import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

BAND = 4096  # elements on either side, as many as a block stores too far; alignment is kept
LIBRARIES = ("torch", "triton", "numpy")
ALLOCATIONS = ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty"))


@contextmanager
def watched(
    change: Callable[[Tensor], Tensor], of: str = "", functions: Sequence[tuple[Any, str]] = ALLOCATIONS
) -> Iterator[None]:
    """Inside the block, some functions return ``change(x)`` in place of a tensor x that they return.

    Args:
        of: package whose calls are changed; without it all calls but those of torch, Triton and NumPy.
        functions: (owner, attribute) of each function; by default those of torch that allocate.
    """

    def wrap(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        @functools.wraps(allocate)
        def changed(*args: Any, **kwargs: Any) -> Tensor:
            x = allocate(*args, **kwargs)
            caller = sys._getframe(1).f_globals.get("__name__", "")
            meant = f"{caller}.".startswith(f"{of}.") if of else caller.partition(".")[0] not in LIBRARIES
            return change(x) if meant and type(x) is Tensor and x.device.type != "meta" else x

        return changed

    with ExitStack() as stack:
        for owner, name in functions:
            stack.enter_context(patch.object(owner, name, wrap(getattr(owner, name))))
        yield


def poison_value(dtype: torch.dtype) -> float | int | bool:
    """Value of a dtype that shows where it is read: NaN, True, or an integer's largest, out of bounds as an index."""
    if dtype.is_floating_point:
        return float("nan")
    if dtype == torch.bool:
        return True
    return torch.iinfo(dtype).max


def _touched(x: Tensor) -> int:
    clean = x.isnan() if x.dtype.is_floating_point else x == poison_value(x.dtype)
    return int((~clean).sum())


class Guarded:
    """A tensor between two bands of poison, and full of poison itself."""

    def __init__(
        self, size: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> None:
        span = 1 + sum((n - 1) * s for n, s in zip(size, stride, strict=True)) if 0 not in size else 0
        self.storage = torch.full((span + 2 * BAND,), poison_value(dtype), dtype=dtype, device=device)
        self.tensor = self.storage.as_strided(size, stride, BAND)
        self.span = span

    def fault(self) -> str | None:
        """Description of a write into the bands around an allocation; None without one."""
        shape = f"of shape {tuple(self.tensor.shape)}"
        for band, side in ((self.storage[:BAND], "in front of"), (self.storage[BAND + self.span :], "past the end of")):
            if count := _touched(band):
                return f"wrote {count} {'element' if count == 1 else 'elements'} {side} a buffer {shape}"
        return None


def guarded(x: Tensor, device: str | torch.device | None = None) -> Tensor:
    """A copy of x with its strides, between bands of NaN: reading past either end poisons the result.

    The copy is on x's device or on ``device``.
    """
    return _guarded_copy(x, device).tensor


def _guarded_copy(x: Tensor, device: str | torch.device | None = None) -> Guarded:
    copy = Guarded(tuple(x.shape), x.stride(), x.dtype, torch.device(device or x.device))
    if x.numel():
        # Expanded inputs (stride 0) alias: copy one element of each expanded dimension.
        index = tuple(slice(0, 1) if s == 0 else slice(None) for s in x.stride())
        copy.tensor[index].copy_(x.detach()[index])
    copy.tensor.requires_grad_(x.requires_grad)
    return copy


class Poison:
    """Gives host code buffers that are filled with NaN and lie between guard bands, in place of those it allocates.

    Writes beyond a buffer and reads of unwritten values are then seen.

    Args:
        of: beginning of the names of the modules whose allocations are replaced, as in :func:`watched`.
    """

    def __init__(self, of: str = "") -> None:
        self.of = of
        self.buffers: list[Guarded] = []

    def inside(self) -> Any:
        """Context in which what is allocated is guarded, and holds NaN."""
        return watched(self._guard, self.of)

    def copy(self, x: Tensor) -> Tensor:
        """Copy a tensor between bands that are checked, like :func:`guarded`."""
        self.buffers.append(_guarded_copy(x))
        return self.buffers[-1].tensor

    def _guard(self, x: Tensor) -> Tensor:
        self.buffers.append(Guarded(tuple(x.shape), x.stride(), x.dtype, x.device))
        return self.buffers[-1].tensor

    def faults(self) -> list[tuple[Guarded, str]]:
        """Buffers whose bands were written to, and what was written, in words."""
        return [(buffer, fault) for buffer in self.buffers if (fault := buffer.fault())]

    def check(self) -> None:
        """Raises AssertionError if a band was written to."""
        found = [fault for _, fault in self.faults()]
        assert not found, f"a kernel {found[0]}"
