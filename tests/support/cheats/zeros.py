"""Zeros of the right shape, once the check before timing is over."""

from support.cheats import HONEST_CALLS


def make():
    calls = []

    def function(x):
        calls.append(1)
        return x * 2 if len(calls) <= HONEST_CALLS else x * 0

    return function
