"""`mvlm bench`, whose benchmarks are a package above this one."""

import importlib
from collections.abc import Sequence
from importlib.util import find_spec


def bench(arguments: Sequence[str]) -> None:
    """Measure speed: `mvlm bench kernels`, `step`, `data`, `run`.

    These are the kernels, a training step, the data loader, and a whole run.
    `mvlm bench NAME --help` lists the arguments of one.
    """
    # By name, because imports go down: mvlm_benchmarks measures mvlm.
    if find_spec("mvlm_benchmarks") is None:
        from mvlm.errors import ConfigError

        raise ConfigError("bench: wanted the package mvlm_benchmarks, found none; install the whole mvlm again")
    importlib.import_module("mvlm_benchmarks.cli").main(arguments)
