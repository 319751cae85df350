"""Check of a case: outputs and gradients of its op against its float64 oracle, as exact as plain torch."""

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import HealthCheck, settings
from torch import Tensor

from mvlm_kernels import dispatch, use_backend
from mvlm_kernels.case import Case, Inputs, as_results
from triton_proof.allocations import guarded
from triton_proof.driver import unwritten

# Bound on rms(error) / rms(oracle) of one output. A kernel rounds its output once and a few intermediates to the
# operands' type.
RELATIVE_RMS = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}
# The same of products of float32 operands, which keep 10 bits of their mantissa in a compiled kernel (TF32).
TF32_RMS = 4e-3
# The fixtures have no state that an example could change, and interpreted kernels differ in speed.
SETTINGS = settings(
    max_examples=20,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def check(
    case: Case,
    device: str = "cpu",
    compiled: bool = False,
    backends: tuple[dispatch.Backend, ...] = ("torch", "triton"),
) -> None:
    """Compare the op on both backends with the oracle. Kernels run on `device`, on a CPU interpreted or emulated.

    Inputs lie between bands of NaN. compiled: the kernels are emulated, or run on a GPU.
    """
    inputs = case.make("cpu")
    wide = Inputs({name: x.double() for name, x in inputs.leaves.items()}, inputs.fixed)
    outs = as_results(case.oracle(**wide.leaves, **wide.fixed))
    draw = torch.Generator().manual_seed(9)
    drawn = [case.incoming(torch.randn(x.shape, generator=draw, dtype=torch.float64)) if x.dim() else torch.tensor(1.7)
             for x in outs]  # fmt: skip
    with use_backend("torch"):
        yardstick = results(case.yardstick or case.ours, inputs, drawn)
    grads = [guarded(x.to(y.dtype)) for x, y in zip(drawn, yardstick.values(), strict=False)]
    oracle = named(outs, gradients(outs, list(wide.leaves.values()), [x.double() for x in grads]), wide)
    for backend in backends:
        kernels = backend == "triton"
        with use_backend(backend):
            found = results(case.ours, inputs, drawn, device if kernels else "cpu")
        for name, got in found.items():
            what = f"{name} of {case.op} {case.label} by {backend}"
            if compiled and kernels:
                assert not unwritten(got), f"{what}: {unwritten(got)} elements unwritten"
            rms, exact = case.rms, not (compiled and kernels and case.multiplies and got.dtype == torch.float32)
            assert_accurate(
                what, got, yardstick[name] if exact else None, oracle[name], rms if exact else TF32_RMS,
                terms=case.terms.get(name, 0.0), rounded=case.rounded.get(name, 0.0),
            )  # fmt: skip


def results(
    function: Callable[..., Any], inputs: Inputs, drawn: list[Tensor], device: str = "cpu"
) -> dict[str, Tensor]:
    """Outputs and gradients by name, on the CPU. drawn: gradients of the outputs, rounded to their dtypes."""

    def at_device(x: Any) -> Any:
        return guarded(x.detach(), device) if isinstance(x, Tensor) else x

    leaves = {name: at_device(x).requires_grad_() for name, x in inputs.leaves.items()}
    outs = as_results(function(**leaves, **{name: at_device(x) for name, x in inputs.fixed.items()}))
    grads = [guarded(x.to(out.dtype), device) for x, out in zip(drawn, outs, strict=True)]
    return named(outs, gradients(outs, list(leaves.values()), grads), inputs)


def gradients(outs: tuple[Tensor, ...], leaves: list[Tensor], grads: list[Tensor]) -> tuple[Tensor, ...]:
    """Gradients of the leaves from those of the outputs; zeros of unused leaves."""
    if not leaves:
        return ()
    return torch.autograd.grad(outs, leaves, grads, allow_unused=True, materialize_grads=True)


def named(outs: tuple[Tensor, ...], grads: tuple[Tensor, ...], inputs: Inputs) -> dict[str, Tensor]:
    """Results by the names under which a case bounds their errors."""
    names = ["out"] if len(outs) == 1 else [f"out {i}" for i in range(len(outs))]
    return {name: x.detach().cpu() for name, x in zip([*names, *inputs.leaves], (*outs, *grads), strict=True)}


def assert_accurate(
    name: str,
    got: Tensor,
    yardstick: Tensor | None,
    oracle: Tensor,
    rms: float | None = None,
    terms: float = 0.0,
    rounded: float = 0.0,
) -> None:
    """Bound the error of ``got`` by twice that of the yardstick plus 2 ulp, and its relative RMS error.

    got and yardstick are in the tested dtype, oracle is float64 from the same (rounded) inputs. Without a yardstick the
    relative RMS error alone is bounded: by rms, or by RELATIVE_RMS of got's dtype. terms, rounded: size of the terms
    that cancel in a sum, in float32 or rounded to got's dtype: an ulp is one of the terms, not of the sum.
    """
    assert got.shape == oracle.shape, f"{name}: shape {tuple(got.shape)}, wanted {tuple(oracle.shape)}"
    assert yardstick is None or got.dtype == yardstick.dtype, f"{name}: dtype {got.dtype}"
    assert bool(got.isfinite().all()), f"{name}: not finite"
    if not got.numel():
        return
    if got.dtype == torch.float64:  # the oracle rounds as much as the kernel, so the two need only be close
        torch.testing.assert_close(got, oracle, rtol=1e-11, atol=1e-12, msg=lambda text: f"{name}: {text}")
    error = (got.double() - oracle).abs()
    error = error.masked_fill(error <= 2 * torch.finfo(torch.float32).eps * terms, 0)
    if yardstick is not None and got.dtype != torch.float64:
        by_torch = 2 * (yardstick.double() - oracle).abs().max()
        ulp = torch.finfo(got.dtype).eps * oracle.abs().clamp_min(max(rounded, torch.finfo(got.dtype).tiny))
        excess = (error - by_torch - 2 * ulp).max().item()
        assert excess <= 0, f"{name}: error {error.max():.3e}, allowed {by_torch:.3e} + 2 ulp"
    scale = max(oracle.square().mean().sqrt().item(), 0.02 * rounded, torch.finfo(got.dtype).tiny)
    relative = error.square().mean().sqrt().item() / scale
    bound = RELATIVE_RMS[got.dtype] if rms is None else rms
    assert (got.dtype == torch.float64 and terms) or relative <= bound, (
        f"{name}: relative RMS error {relative:.3e}, bound {bound:.1e}"
    )
