"""Reasons why no kernel runs a call or replaces a module, each with a way out.

Every reason is made by :func:`refusal`. A test collects its calls from the source and asks for an input that leads to
each (``tests/kernels/integrations/test_refusals.py``).
"""

from dataclasses import dataclass
from typing import Literal, NewType, cast

import torch

Backend = Literal["triton", "torch"]
Refusal = NewType("Refusal", str)
"""One line: the reason, "; ", and the way out. The type shows that a text was made by :func:`refusal`."""


def refusal(reason: str, way_out: str) -> Refusal:
    """Make a refusal. reason: a fact about the call. way_out: what runs in place of the kernel, and what to change."""
    return cast(Refusal, f"{reason}; {way_out}")  # a compiler traces a cast, and not the call of a NewType


FLOAT64 = refusal("float64 has no kernel on a GPU", "torch runs; pass float32, bfloat16 or float16")


@dataclass(frozen=True)
class Explanation:
    """Result of :func:`mvlm_kernels.explain`: the chosen backend, the reasons, and the device of the call.

    backend "torch": every reason is one against Triton, with a way out. backend "triton": the first reason is that of
    the choice. More follow under ``use_backend("triton")`` only: everything that would otherwise have been a reason
    against Triton.
    """

    backend: Backend
    reasons: tuple[str, ...]
    device: torch.device

    def __str__(self) -> str:
        if self.backend == "torch":
            kinds = ["not triton"] * len(self.reasons)
        else:
            kinds = ["because", *["against triton"] * (len(self.reasons) - 1)]
        lines = [f"{kind}: {reason}" for kind, reason in zip(kinds, self.reasons, strict=True)]
        return "\n".join([f"runs: {self.backend} on {self.device}", *lines])
