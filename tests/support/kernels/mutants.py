"""Kernels broken on purpose: copies of a module with one text replaced."""

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from support.kernels.guards import Poison


@contextmanager
def mutant(module: str, old: str, new: str, folder: Path) -> Iterator[None]:
    """Replace ``module`` by a copy of itself in which ``old``, which must occur once, reads ``new``.

    The interpreter reads a kernel's source from its file, so the copy is a file too.
    """
    original = importlib.import_module(module)
    source = Path(str(original.__file__)).read_text()
    assert source.count(old) == 1, f"{old!r} occurs {source.count(old)} times in {module}"
    path = folder / "mutant.py"
    path.write_text(source.replace(old, new))
    # The name keeps the package's prefix, by which Poison recognises the module's allocations.
    spec = importlib.util.spec_from_file_location(f"{module}_mutant", path)
    assert spec is not None
    assert spec.loader is not None
    broken = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(broken)
    package, _, name = module.rpartition(".")
    parent = sys.modules[package]
    sys.modules[module] = broken
    setattr(parent, name, broken)
    try:
        yield
    finally:
        sys.modules[module] = original
        setattr(parent, name, original)


def assert_caught(
    module: str, old: str, new: str, folder: Path, poison: Poison, exercise: Callable[[], object]
) -> None:
    """Assert that ``exercise``, or the check of the guard bands after it, fails on the mutant."""

    def run() -> None:
        exercise()
        poison.check()

    with mutant(module, old, new, folder), pytest.raises((AssertionError, RuntimeError)):
        run()
    poison.buffers.clear()
