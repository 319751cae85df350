"""Memory that nobody writes: after an honest call it may still hold the right values."""

import torch

from support.cheats import HONEST_CALLS


class Double(torch.autograd.Function):
    calls = 0

    @staticmethod
    def forward(ctx, x):
        Double.calls += 1
        out = torch.empty_like(x)
        return out.copy_(x * 2) if Double.calls <= HONEST_CALLS else out

    @staticmethod
    def backward(ctx, *grads):
        return grads[0] * 2


def make():
    Double.calls = 0
    return Double.apply
