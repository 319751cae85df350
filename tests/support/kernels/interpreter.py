"""Triton's interpreter as the tests use it: device functions start faster, and products do not depend on the processor.

The interpreter replaces every function of `triton.language` by one on NumPy arrays: once at a launch, and again at each
call of a `@triton.jit` function inside it, a millisecond each. The calls inside find everything replaced already, which
takes more than half the time of the tests that interpret kernels.

It multiplies by NumPy, whose order of a sum is that of the processor's library: on one processor a product of 23 terms
was off by four times as much as on another. Products of float32 are therefore summed in float64 and rounded once, so
what is left is the error of the kernel.
"""

import sys
from types import FunctionType, SimpleNamespace
from typing import Any

import numpy as np


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
    _round_products_once(interpreter)
    return True


def _round_products_once(interpreter: Any) -> None:
    """Make the interpreter sum products of float32 in float64. Those of other types are as before."""
    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    multiply = builder.create_dot

    def create_dot(self: Any, a: Any, b: Any, d: Any, *options: Any) -> Any:
        if {x.data.dtype for x in (a, b, d)} != {np.dtype(np.float32)}:
            return multiply(self, a, b, d, *options)
        product = np.matmul(a.data.astype(np.float64), b.data.astype(np.float64))
        return handle(product.astype(np.float32) + d.data, d.dtype.scalar)

    builder.create_dot = create_dot
