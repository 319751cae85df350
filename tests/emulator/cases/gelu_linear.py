"""Cases of ``gelu_linear``: output and gradients against autograd in float64."""

from functools import partial
from importlib import import_module

import torch

from emulator.cases import Cases
from emulator.cases.attention import TYPES
from emulator.library import multiprocessors
from mvlm_kernels import gelu_linear
from support.kernels.accuracy import RELATIVE_RMS

SIZES = ((197, 1024), (17, 300), (1, 8), (3, 3072))
FAST = {"bf16/17x300/bias", "bf16/again"}


def check(dtype: torch.dtype, rows: int, width: int, with_bias: bool, frozen: bool = False) -> None:
    h, weight = (torch.randn(rows, width).to(dtype) * 3), torch.randn(5, width).to(dtype)
    inputs = [h, weight, torch.randn(5).to(dtype), *([torch.randn(width).to(dtype)] if with_bias else [])]
    grad = torch.randn(rows, 5).to(dtype)
    leaves = [x.requires_grad_() for x in inputs]
    if frozen:  # the kernel does not write the GELU again
        leaves[1] = leaves[1].detach()
    trained = [x for x in leaves if x.requires_grad]
    with multiprocessors(1):  # each program of the backward pass takes several tiles
        out = gelu_linear(*leaves[:3], h_bias=leaves[3] if with_bias else None)
        got = [out.detach(), *torch.autograd.grad(out, trained, grad)]
    wide = [x.detach().double().requires_grad_() for x in inputs]
    shifted = wide[0] + wide[3] if with_bias else wide[0]
    wanted = torch.nn.functional.linear(torch.nn.functional.gelu(shifted), *wide[1:3])
    of_trained = [x for x, leaf in zip(wide, leaves, strict=True) if leaf.requires_grad]
    for a, b in zip(got, [wanted.detach(), *torch.autograd.grad(wanted, of_trained, grad.double())], strict=True):
        error = (a.double() - b).square().mean().sqrt() / b.square().mean().sqrt()
        assert error < 2 * RELATIVE_RMS[dtype], f"relative RMS error {float(error):.2e}"


def check_again(dtype: torch.dtype) -> None:
    """A GELU that backward writes again has the bits of the first one, which is saved where it fits."""
    triton = import_module("mvlm_kernels.gelu_linear.triton")
    h, grad, bias = torch.randn(17, 300).to(dtype) * 3, torch.randn(17, 300).to(dtype), torch.randn(300)
    assert torch.equal(triton.gelu_backward(grad, h, bias, True)[1], triton.gelu(h, bias))


def cases() -> Cases:
    for name, dtype in TYPES.items():
        yield f"{name}/again", partial(check_again, dtype)
        for rows, width in SIZES:
            for with_bias in (True, False):
                label = f"{name}/{rows}x{width}/{'bias' if with_bias else 'no-bias'}"
                yield label, partial(check, dtype, rows, width, with_bias)
        yield f"{name}/17x300/frozen", partial(check, dtype, 17, 300, True, frozen=True)
