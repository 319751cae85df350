"""A timer that stands still. `restore` puts the real one back."""

import time

REAL = time.perf_counter


def make():
    def function(x):
        time.perf_counter = lambda: 0.0
        return x * 2

    return function


def restore() -> None:
    time.perf_counter = REAL
