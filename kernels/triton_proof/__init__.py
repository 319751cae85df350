"""Proofs of Triton kernels without a GPU: run as compiled, on a CPU, under checks.

    python -m triton_proof tests/test_my_kernels.py               # three proofs, one after the other
    pytest -p triton_proof.plugin --proof sm_90 tests             # one of them

The plugin runs ordinary tests, which call kernels with CPU tensors. Under the proof ``interpreted`` Triton interprets
the source. Under ``sm_80`` and ``sm_90`` Triton compiles it for that GPU, and an emulator in NumPy runs the PTX. From
Python:

    from triton_proof import install, recorded

    install("sm_80")                      # or "sm_90"; before the first launch, in a process with TRITON_INTERPRET=0
    with recorded() as launches:
        kernel[grid](x, y, n, BLOCK=128)  # CPU tensors

A launch that had faults raises :class:`EmulationError`. docs/guides/prove_your_kernel.md is the guide.

    plugin.py  the pytest plugin             allocations.py  NaN and guard bands in what host code allocates
    coverage.py  what no launch has told apart       variants.py     inputs of other strides and sizes
    driver.py  Triton's driver: compiled text in, emulated launches out
    ptx/       text, read into basic blocks  machine/        threads in lockstep, and memory
    program/   instructions as functions     scalar/         what one scalar instruction computes
    report.py  findings and counters of a launch, and what to do about them

It imports NumPy, torch and Triton alone; the plugin also pytest.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from triton_proof.driver import install, recorded
    from triton_proof.report import EmulationError, Finding, Launch

__all__ = ["EmulationError", "Finding", "Launch", "install", "recorded"]
_HOME = {"install": "driver", "recorded": "driver"}


def __getattr__(name: str) -> Any:
    # Triton decides at import whether it interprets, and the plugin has to choose before that.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOME.get(name, 'report')}"), name)
