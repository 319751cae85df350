"""A faster start of device functions in Triton's interpreter, without a change of what they compute.

The interpreter replaces every function of `triton.language` by one on NumPy arrays: once at a launch, and again at each
call of a `@triton.jit` function inside it, a millisecond each. The calls inside find everything replaced already, which
takes more than half the time of the tests that interpret kernels.
"""

import sys
from types import FunctionType, SimpleNamespace
from typing import Any


def patch_once_a_launch() -> bool:
    """Make the interpreter replace `triton.language` once a launch. True from the first call on that finds it imported.

    An interpreter without the functions that this changes keeps its own way.
    """
    interpreter: Any = sys.modules.get("triton.runtime.interpreter")
    if interpreter is None:
        return False
    patch, scope_type = getattr(interpreter, "_patch_lang", None), getattr(interpreter, "_LangPatchScope", None)
    if patch is None or scope_type is None or getattr(patch, "once", False):
        return True
    languages = (interpreter.tl, interpreter.tl.core)
    patched: set[int] = set()
    """Languages that this launch has replaced."""
    seen: dict[FunctionType, set[int]] = {}
    """Languages that each function sees."""

    class Scope(scope_type):  # what a launch restores when it ends
        def restore(self) -> None:
            patched.clear()
            super().restore()

    def patch_once(function: FunctionType) -> Any:
        own = seen.get(function)
        if own is None:
            names = function.__globals__.values()
            own = seen[function] = {id(x) for x in languages if any(value is x for value in names)}
        launches = not patched
        if own and own <= patched:
            return SimpleNamespace(restore=lambda: None)  # a call inside a launch: nothing to do, nothing to restore
        scope = patch(function)
        patched.update(own)
        if launches:
            scope.__class__ = Scope
        return scope

    patch_once.once = True
    interpreter._patch_lang = patch_once
    return True
