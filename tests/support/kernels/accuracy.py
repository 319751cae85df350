"""Comparison of a kernel's output with a float64 oracle and with the same torch code in the tested dtype."""

import torch
from torch import Tensor

# Bound on rms(error) / rms(oracle) of one output. A kernel rounds its output once and a few intermediates to the
# operands' type.
RELATIVE_RMS = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}


def assert_accurate(
    name: str, got: Tensor, same_dtype: Tensor, oracle: Tensor, rms: float | None = None, terms: float = 0.0
) -> None:
    """Bound the error of ``got`` by twice that of the same-dtype torch code plus 2 ulp, and its relative RMS error.

    got and same_dtype are in the tested dtype, oracle is float64 from the same (rounded) inputs. rms is the bound of
    the relative RMS error; None takes RELATIVE_RMS of got's dtype. terms: size of the terms that cancel in the sum,
    where an ulp of the sum itself would be too small.
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


def accurate(name: str, got: Tensor, same_dtype: Tensor, oracle: Tensor, terms: float = 0.0, rms=None) -> None:
    """:func:`assert_accurate` for outputs that are differences of numbers as large as ``terms`` (0: no differences).

    Where two terms cancel, a unit in the last place is one of the terms, not of their difference. In float64 the oracle
    rounds as much as the kernel, so the two need only be close.
    """
    if got.dtype == torch.float64:
        torch.testing.assert_close(got, oracle.double(), rtol=1e-11, atol=1e-12)
        return
    unit = 2 * torch.finfo(torch.float32).eps * terms
    inexact = ~((got.double() - oracle).abs() <= unit)  # so that NaN stays
    assert got.shape == oracle.shape, f"{name}: shape {tuple(got.shape)}, wanted {tuple(oracle.shape)}"
    assert_accurate(name, torch.where(inexact, got, oracle.to(got.dtype)), same_dtype, oracle, rms)
