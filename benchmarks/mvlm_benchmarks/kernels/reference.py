"""The float64 reference of a case, and the inputs that its contenders share.

There are three passes:

    forward   the call with gradients enabled, so that it saves tensors for backward
    backward  the gradients of all leaves, from an existing output
    both      forward, then backward
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from mvlm_benchmarks.clock import Results
from mvlm_benchmarks.kernels.checks import same_bits
from mvlm_kernels.case import Case, Inputs, as_results

PASSES = ("forward", "backward", "both")
# Maximum error, relative to the reference's largest value. On a GPU float32 is TF32, which rounds operands to 10 bits.
TOLERANCES = {torch.bfloat16: 3e-2, torch.float16: 5e-3, torch.float32: 5e-3}
TOLERANCE_CPU_FLOAT32 = 1e-4
# Gradients of a mean over millions of pixels underflow in float16. The loss is therefore scaled, as in training.
LOSS_SCALE = 2.0**15
MOST_SETS = 4


def passes_of(case: Case) -> tuple[str, ...]:
    """Passes of a case. A case without gradients (uint8 images) has only `forward`."""
    return PASSES if case.minimum[1] else PASSES[:1]


@dataclass(frozen=True)
class Expected:
    """Outputs and gradients of the float64 reference for one set of inputs."""

    out: Results
    gradients: Results
    """Gradients of the leaves, in the order of `Inputs.leaves`."""
    incoming: Results
    """Gradients of the outputs, from which the gradients of the leaves are computed."""

    def of(self, name: str) -> Results:
        """Results that a pass computes: outputs, gradients or both."""
        return {"forward": self.out, "backward": self.gradients, "both": (*self.out, *self.gradients)}[name]


def run_reference(case: Case, inputs: Inputs, seed: int = 0) -> Expected:
    """Run the case's reference, forward and backward, in float64 on the inputs' device. seed: of the gradients."""
    leaves = {name: x.detach().double().requires_grad_() for name, x in inputs.leaves.items()}
    outs = as_results(case.oracle(**leaves, **inputs.fixed))
    generator = torch.Generator(outs[0].device).manual_seed(1 + seed)

    def incoming(out: Tensor) -> Tensor:
        if out.ndim == 0:
            return torch.tensor(LOSS_SCALE / 2**seed, device=out.device)
        return torch.randn(out.shape, generator=generator, device=out.device).to(case.dtype)

    drawn = tuple(incoming(out) for out in outs)
    gradients = torch.autograd.grad(outs, list(leaves.values()), [x.double() for x in drawn]) if leaves else ()
    return Expected(tuple(out.detach() for out in outs), gradients, drawn)


def number_of_sets(inputs: Inputs, device: str) -> int:
    """Sets of inputs to rotate: on a GPU as many as hold twice its L2 cache, from 2 to 4; on a CPU 2."""
    if device != "cuda":
        return 2
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    size = sum(x.nbytes for x in inputs.tensors())
    return min(MOST_SETS, max(2, 1 + -(-2 * cache // max(1, size))))


def tolerance(case: Case, device: str) -> float:
    """Maximum relative error at a case. device: "cpu" or "cuda"."""
    if device == "cpu" and case.dtype == torch.float32:
        return TOLERANCE_CPU_FLOAT32
    return TOLERANCES[case.dtype]


@dataclass
class CaseData:
    """Inputs of a case, rotated over by all of its contenders, and what they should give."""

    case: Case
    sets: list[Inputs]
    expected: list[Expected]
    limit: float
    """Largest relative error that a result may have."""
    pristine: list[list[Tensor]]
    """Copies of the tensors of each set."""

    @classmethod
    def make(cls, case: Case, device: str) -> "CaseData":
        """Make inputs and run the reference on them."""
        first = case.make(device)
        sets = [first, *(case.make(device, seed) for seed in range(1, number_of_sets(first, device)))]
        pristine = [[x.detach().clone() for x in inputs.tensors()] for inputs in sets]
        expected = [run_reference(case, inputs, seed) for seed, inputs in enumerate(sets)]
        return cls(case, sets, expected, tolerance(case, device), pristine)

    @torch.no_grad()
    def restore(self) -> bool:
        """Write the original values into inputs that were changed. True if there were any."""
        changed = False
        for inputs, copies in zip(self.sets, self.pristine, strict=True):
            for x, copy in zip(inputs.tensors(), copies, strict=True):
                if not same_bits(x, copy):
                    changed = True
                    x.copy_(copy)
        return changed
