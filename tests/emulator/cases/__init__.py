"""Cases of the emulated kernels: in each module of this folder ``cases()`` yields (label, call).

A call runs an op inside :func:`emulator.library.on_gpu` and asserts its values. Labels in ``FAST`` of a module run in
every suite, all others in `make emulate`. To add an op, add a module here, or a case to ``small_cases`` of
:mod:`mvlm_benchmarks.kernels.cases`: all of those are emulated by :mod:`emulator.cases.counted`.
"""

import importlib
import pkgutil
from collections.abc import Callable, Iterator

Cases = Iterator[tuple[str, Callable[[], object]]]


def all_cases() -> dict[str, Callable[[], object]]:
    """Every case by its name, "module/label"."""
    found = {}
    for module in _modules():
        for label, call in importlib.import_module(module).cases():
            name = f"{module.rpartition('.')[2]}/{label}"
            assert name not in found, f"two cases are called {name}"
            found[name] = call
    return found


def fast_cases() -> set[str]:
    """Names of the cases that run in every suite."""
    return {
        f"{module.rpartition('.')[2]}/{label}"
        for module in _modules()
        for label in getattr(importlib.import_module(module), "FAST", ())
    }


def _modules() -> list[str]:
    return [f"{__name__}.{module.name}" for module in pkgutil.iter_modules(__path__)]
