"""A gradient kept from the first backward pass."""

import torch

KEPT: list[torch.Tensor] = []


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * 2

    @staticmethod
    def backward(ctx, *grads):
        if not KEPT:
            KEPT.append(grads[0] * 2)
        return KEPT[0].clone()


def make():
    KEPT.clear()
    return Double.apply
