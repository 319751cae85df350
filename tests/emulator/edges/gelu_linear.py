"""Edge of ``gelu_linear``: the GELU that backward writes again."""

from functools import partial
from importlib import import_module

import torch

from emulator.edges import Calls
from mvlm_kernels.gelu_linear.cases import TYPES

FAST = {"bf16/again"}


def check_again(dtype: torch.dtype) -> None:
    """A GELU that backward writes again has the bits of the first one, which is saved where it fits."""
    triton = import_module("mvlm_kernels.gelu_linear.triton")
    h, grad, bias = torch.randn(17, 300).to(dtype) * 3, torch.randn(17, 300).to(dtype), torch.randn(300)
    assert torch.equal(triton.gelu_backward(grad, h, bias, True)[1], triton.gelu(h, bias))


def calls() -> Calls:
    for name, dtype in TYPES.items():
        yield f"{name}/again", partial(check_again, dtype)
