"""Inputs that are made easy: all ones, in place, so that the next call has nothing to compute."""

import torch

from support.cheats import HONEST_CALLS


def make():
    calls = []

    def function(x):
        calls.append(1)
        out = x * 2
        if len(calls) > HONEST_CALLS:
            with torch.no_grad():
                x.data.fill_(1)
        return out

    return function
