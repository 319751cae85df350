"""Check and measurement of one contender at one case.

There are three passes:

    forward   the call with gradients enabled, so that it saves tensors for backward
    backward  the gradients of all leaves, from an existing output
    both      forward, then backward
"""

import contextlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mvlm_benchmarks.clock import Clock, Step, Timing
from mvlm_benchmarks.kernels.cases import Case
from mvlm_benchmarks.kernels.inputs import Inputs
from mvlm_benchmarks.unavailable import one_line

PASSES = ("forward", "backward", "both")
# Maximum error, relative to the reference's largest value. On a GPU float32 is TF32, which rounds operands to 10 bits.
TOLERANCES = {torch.bfloat16: 3e-2, torch.float16: 5e-3, torch.float32: 5e-3}
TOLERANCE_CPU_FLOAT32 = 1e-4
# Gradients of a mean over millions of pixels underflow in float16. The loss is therefore scaled, as in training.
LOSS_SCALE = 2.0**15

Function = Callable[..., Tensor]


def passes_of(case: Case) -> tuple[str, ...]:
    """Passes of a case. A case without gradients (uint8 images) has only `forward`."""
    return PASSES if case.minimum[1] else PASSES[:1]


@dataclass(frozen=True)
class Expected:
    """Output and gradients of the float64 reference."""

    out: Tensor
    gradients: tuple[Tensor, ...]
    """Gradients of the leaves, in the order of `Inputs.leaves`."""
    incoming: Tensor
    """Gradient of the output, from which the gradients of the leaves are computed."""


def run_reference(case: Case, inputs: Inputs) -> Expected:
    """Run the case's reference, forward and backward, in float64 on the inputs' device."""
    leaves = {name: x.detach().double().requires_grad_() for name, x in inputs.leaves.items()}
    out = case.reference(**leaves, **inputs.fixed)
    if out.ndim:
        # Drawn on the CPU, like the inputs.
        drawn = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.device, case.dtype)
    else:
        drawn = torch.tensor(LOSS_SCALE, device=out.device)
    gradients = torch.autograd.grad(out, list(leaves.values()), drawn.double()) if leaves else ()
    return Expected(out.detach(), gradients, drawn)


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """Largest error over the largest wanted value. Infinite if a shape differs or a value is not finite."""
    if got.shape != wanted.shape or not bool(got.isfinite().all()):
        return float("inf")
    return float((got.double() - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30))


def tolerance(case: Case, device: str) -> float:
    """Maximum relative error at a case. device: "cpu" or "cuda"."""
    if device == "cpu" and case.dtype == torch.float32:
        return TOLERANCE_CPU_FLOAT32
    return TOLERANCES[case.dtype]


@dataclass(frozen=True)
class Outcome:
    """Status of a pass, and a note."""

    status: str
    """ok, missing, not applicable, error or WRONG."""
    note: str = ""


class LocalContender:
    """A contender in this process. `function` takes the leaves in order, and is always called inside `context`."""

    def __init__(
        self,
        case: Case,
        inputs: Inputs,
        function: Function,
        incoming: Tensor,
        clock: Clock,
        context: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
    ) -> None:
        self._function, self._clock, self.context = function, clock, context
        self._leaves = list(inputs.leaves.values())
        self._passes = passes_of(case)
        self._incoming = incoming

    def check(self, expected: Expected, limit: float) -> dict[str, Outcome]:
        """Run forward and backward once and compare them with the reference.

        Returns:
            The outcome of each pass. A wrong output fails all passes; a wrong gradient fails `backward` and `both`.
        """
        with warnings.catch_warnings(record=True) as caught, self.context():
            try:
                out = self._function(*self._leaves)
                error = relative_error(out.detach(), expected.out)
            except Exception as problem:
                return dict.fromkeys(self._passes, Outcome("error", _with_warnings(problem, caught)))
            if not error <= limit:
                return dict.fromkeys(self._passes, _wrong("output", error, limit))
            outcomes = dict.fromkeys(self._passes, Outcome("ok"))
            try:
                errors = self._gradient_errors(out, expected) if self._leaves else {}
                failure = next(
                    (_wrong(name, error, limit) for name, error in errors.items() if not error <= limit), None
                )
            except Exception as problem:
                failure = Outcome("error", _with_warnings(problem, caught))
            if failure is not None:
                outcomes.update(dict.fromkeys(self._passes[1:], failure))
            return outcomes

    def _gradient_errors(self, out: Tensor, expected: Expected) -> dict[str, float]:
        found = torch.autograd.grad(out, self._leaves, self._incoming.to(out.dtype))
        return {
            f"gradient {number} of {len(found)}": relative_error(got, wanted)
            for number, (got, wanted) in enumerate(zip(found, expected.gradients, strict=True), 1)
        }

    def step(self, name: str) -> Step:
        """Make a function that runs a pass once. For `backward`, this method runs forward, not the function."""
        function, leaves = self._function, self._leaves
        if name == "forward":
            return lambda: function(*leaves)
        if name == "backward":
            out = function(*leaves)
            incoming = self._incoming.to(out.dtype)
            return lambda: torch.autograd.grad(out, leaves, incoming, retain_graph=True)

        def both() -> Any:
            out = function(*leaves)
            return torch.autograd.grad(out, leaves, self._incoming.to(out.dtype))

        return both

    def time(self, name: str) -> Timing:
        with self.context():
            return self._clock.time(self.step(name))

    def graph(self, name: str) -> float | None:
        with self.context():
            return self._clock.graph(lambda: self.step(name))

    def peak_mb(self, name: str) -> float | None:
        with self.context():
            return self._clock.peak_mb(self.step(name))


def _wrong(what: str, error: float, limit: float) -> Outcome:
    return Outcome("WRONG", f"{what} is off by {error:.2g} of its largest value, allowed {limit:.0e}")


def _with_warnings(problem: Exception, caught: list[warnings.WarningMessage]) -> str:
    """Text of an exception and the warnings before it. torch says in warnings why an SDPA backend refused a call."""
    text = " ".join(dict.fromkeys(str(w.message).split(" (Triggered", 1)[0] for w in caught))
    return f"{one_line(problem)} {text}".strip()[:600]
