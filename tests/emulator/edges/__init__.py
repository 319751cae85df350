"""Emulated calls beyond the cases of the ops: in each module ``calls()`` yields (label, call).

A call runs an op inside :func:`emulator.library.on_gpu` and asserts its values. Labels in ``FAST`` of a module run in
every suite, all others in `make emulate`.
"""

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from typing import Any

Calls = Iterator[tuple[str, Callable[[], object]]]


def all_calls() -> dict[str, Callable[[], object]]:
    """Every call by its name, "module/label"."""
    return {f"{name}/{label}": call for name, module in _modules() for label, call in module.calls()}


def fast_calls() -> set[str]:
    """Names of the calls that run in every suite."""
    return {f"{name}/{label}" for name, module in _modules() for label in getattr(module, "FAST", ())}


def _modules() -> Iterator[tuple[str, Any]]:
    for module in pkgutil.iter_modules(__path__):
        yield module.name, importlib.import_module(f"{__name__}.{module.name}")
