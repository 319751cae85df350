"""Kernels broken on purpose: copies of a module with one text replaced."""

import importlib
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType


def load_again(name: str, path: Path) -> ModuleType:
    """Run the source in ``path`` as a new module called ``name``."""
    # The name keeps the package's prefix, by which Poison recognises the module's allocations.
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextmanager
def mutant(module: str, after: str, old: str, new: str, folder: Path, importers: Sequence[str]) -> Iterator[None]:
    """Replace ``module`` by a copy of itself in which the first ``old`` behind ``after`` reads ``new``.

    importers: modules that import names from it, or that it imports, in an order in which they can be loaded. They are
    loaded again, so that they get the copy's names. The interpreter reads a kernel's source from its file, so the copy
    is a file too.
    """
    head, found, tail = Path(str(importlib.import_module(module).__file__)).read_text().partition(after)
    assert found, f"{after!r} is gone: update the mutant"
    assert old in tail, f"{old!r} is not in {module}: update the mutant"
    path = folder / "mutant.py"
    path.write_text(head + found + tail.replace(old, new, 1))
    originals = {name: importlib.import_module(name) for name in (module, *importers)}
    try:
        for name, original in originals.items():
            file = path if name == module else Path(str(original.__file__))
            replace_module(name, load_again(f"{name}_mutant", file))
        yield
    finally:
        for name, original in originals.items():
            replace_module(name, original)


def replace_module(name: str, module: ModuleType) -> None:
    package, _, attribute = name.rpartition(".")
    sys.modules[name] = module
    setattr(sys.modules[package], attribute, module)
