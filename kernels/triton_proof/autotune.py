"""Autotuned kernels under a proof: nothing is timed, and each configuration has its turn."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch


class Turn:
    """One run of a test, in which each autotuned kernel takes one of its configurations.

    number: position of that configuration, modulo the kernel's number of them. most: the largest number of
    configurations of a kernel that was launched. taken: by kernel, the configuration.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        self.most = 1
        self.taken: dict[str, str] = {}

    def __str__(self) -> str:
        return "; ".join(f"{kernel}: {config}" for kernel, config in self.taken.items())


@contextmanager
def one_configuration(number: int) -> Iterator[Turn]:
    """Inside the block ``@triton.autotune`` takes the configuration of this number, and times nothing."""
    from triton.runtime.autotuner import Autotuner

    turn, run = Turn(number), Autotuner.run

    def run_one(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.nargs = dict(zip(self.arg_names, args, strict=False))
        configs = self.prune_configs(kwargs) if len(self.configs) > 1 else self.configs
        chosen = configs[number % len(configs)]
        turn.most = max(turn.most, len(configs))
        turn.taken[self.base_fn.__name__] = str(chosen)
        with patch.object(self, "configs", [chosen]):
            return run(self, *args, **kwargs)

    with patch.object(Autotuner, "run", run_one):
        yield turn
