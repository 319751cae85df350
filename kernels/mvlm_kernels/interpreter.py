"""Triton's interpreter: does this process use it, and does it work with the installed NumPy?"""

import functools
import importlib.util

from mvlm_kernels.refusals import Refusal, refusal


@functools.cache
def interpreting() -> bool:
    """True if this process interprets kernels: TRITON_INTERPRET=1 was set when Triton was imported. Imports Triton."""
    if importlib.util.find_spec("triton") is None:
        return False
    from mvlm_kernels.language import INTERPRETING

    return INTERPRETING


def interpreter_fault(triton_version: str, numpy_version: str) -> Refusal | None:
    """Error text for versions of Triton and NumPy whose interpreter does not work; None for all others.

    Triton's interpreter before 3.7 converts arrays of one element to Python scalars, which NumPy 2.4 refuses. Package
    metadata cannot say so: a requirement on NumPy cannot depend on the installed Triton. Compiled kernels do not use
    NumPy.
    """
    if _release(triton_version) >= (3, 7) or _release(numpy_version) < (2, 4):
        return None
    return refusal(
        f"the interpreter of triton {triton_version} needs numpy<2.4, and numpy {numpy_version} is installed",
        'install triton>=3.7 or "numpy<2.4"',
    )


def _release(version: str) -> tuple[int, ...]:
    """(major, minor) of a version such as 3.6.0 or 2.4.0rc1."""
    major, minor = version.split(".")[:2]
    return int(major), int(minor)
