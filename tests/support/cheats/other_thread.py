"""Work on another thread, which the timer does not wait for. On a GPU the same is another stream."""

import threading
import time

import torch

from support.cheats import HONEST_CALLS


class Double(torch.autograd.Function):
    calls = 0

    @staticmethod
    def forward(ctx, x):
        Double.calls += 1
        if Double.calls <= HONEST_CALLS:
            return x * 2
        out, source = torch.empty_like(x), x.detach()
        target = out.detach()

        def work() -> None:
            time.sleep(0.2)  # far longer than a timer needs to stop, also on a busy machine
            torch.mul(source, 2, out=target)

        threading.Thread(target=work).start()
        return out

    @staticmethod
    def backward(ctx, *grads):
        return grads[0] * 2


def make():
    Double.calls = 0
    return Double.apply
