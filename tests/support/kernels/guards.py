"""What the kernel tests share: guard bands, poisoned allocations, and the comparison of a kernel with its oracle."""

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch

BAND = 64  # elements on either side; a multiple of 16 bytes in every type, so alignment is kept

# Bound on rms(error) / rms(oracle) of one output. A kernel rounds its output once and a few intermediates to the
# operands' type.
RELATIVE_RMS = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}


def poison_value(dtype: torch.dtype) -> float | int | bool:
    """NaN, or for ints a value that is out of bounds wherever it is used as an index."""
    if dtype.is_floating_point:
        return float("nan")
    if dtype == torch.bool:
        return True
    return torch.iinfo(dtype).max


def _is_poison(x: torch.Tensor) -> bool:
    return bool(x.isnan().all() if x.dtype.is_floating_point else (x == poison_value(x.dtype)).all())


class Guarded:
    """A tensor between two bands of poison; `check` raises AssertionError if a band was written to."""

    def __init__(
        self, size: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> None:
        span = 1 + sum((n - 1) * s for n, s in zip(size, stride, strict=True)) if 0 not in size else 0
        self.storage = torch.full((span + 2 * BAND,), poison_value(dtype), dtype=dtype, device=device)
        self.tensor = self.storage.as_strided(size, stride, BAND)
        self.span = span

    def check(self) -> None:
        assert _is_poison(self.storage[:BAND]), "a kernel wrote in front of a buffer"
        assert _is_poison(self.storage[BAND + self.span :]), "a kernel wrote behind a buffer"


def guarded(x: torch.Tensor, device: str | torch.device | None = None) -> torch.Tensor:
    """A copy of x, with its strides, between bands of NaN: reading past either end poisons the result. On x's device,
    or on another.
    """
    copy = Guarded(tuple(x.shape), x.stride(), x.dtype, torch.device(device or x.device))
    if x.numel():
        # Expanded inputs (stride 0) alias: copy one element of each expanded dimension.
        index = tuple(slice(0, 1) if s == 0 else slice(None) for s in x.stride())
        copy.tensor[index].copy_(x.detach()[index])
    return copy.tensor.requires_grad_(x.requires_grad)


class Poison:
    """Replaces allocations made by mvlm_kernels with guarded, NaN-filled ones."""

    def __init__(self) -> None:
        self.buffers: list[Guarded] = []

    def wrap(self, allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        @functools.wraps(allocate)
        def poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
            x = allocate(*args, **kwargs)
            caller = sys._getframe(1).f_globals.get("__name__", "")
            if not caller.startswith("mvlm_kernels.") or type(x) is not torch.Tensor or x.device.type == "meta":
                return x
            buffer = Guarded(tuple(x.shape), x.stride(), x.dtype, x.device)
            self.buffers.append(buffer)
            return buffer.tensor

        return poisoned

    def check(self) -> None:
        for buffer in self.buffers:
            buffer.check()


def assert_accurate(
    name: str,
    got: torch.Tensor,
    same_dtype: torch.Tensor,
    oracle: torch.Tensor,
    rms: float | None = None,
    terms: float = 0.0,
) -> None:
    """Hold ``got`` to twice the error of the same-dtype torch code plus 2 ulp, and to a relative RMS bound.

    got and same_dtype in the tested type, oracle in float64 from the same (rounded) inputs. rms None: RELATIVE_RMS of
    got's type. terms: size of the terms that cancel in the sum, where an ulp of the sum itself would be too little.
    """
    assert got.shape == oracle.shape, f"{name}: shape {tuple(got.shape)}, wanted {tuple(oracle.shape)}"
    assert got.dtype == same_dtype.dtype, f"{name}: dtype {got.dtype}, wanted {same_dtype.dtype}"
    if not got.numel():
        return
    oracle = oracle.double()
    assert bool(got.isfinite().all()), f"{name}: not finite"
    error = (got.double() - oracle).abs()
    by_torch = 2 * (same_dtype.double() - oracle).abs().max()
    ulp = torch.finfo(got.dtype).eps * oracle.abs().clamp_min(max(terms, torch.finfo(got.dtype).tiny))
    excess = (error - by_torch - 2 * ulp).max().item()
    # In float64 the same-dtype code is the oracle itself, and its error is not known.
    assert excess <= 0 or got.dtype == torch.float64, f"{name}: error {error.max():.3e}, allowed {by_torch:.3e} + 2 ulp"
    scale = max(oracle.square().mean().sqrt().item(), 0.02 * terms, torch.finfo(got.dtype).tiny)
    relative = error.square().mean().sqrt().item() / scale
    bound = RELATIVE_RMS[got.dtype] if rms is None else rms
    assert relative <= bound, f"{name}: relative RMS error {relative:.3e}, bound {bound:.1e}"
