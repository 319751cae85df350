"""``mvlm_kernels`` on the emulator: CPU tensors treated as a GPU's, and its allocations watched.

The library runs kernels on CPU tensors only where Triton interprets them. Here it is told that Triton does, while the
kernels are compiled and emulated. Tiles are chosen as on the emulated GPU, and values of indices are not checked on the
host, as on a GPU.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch
from triton import JITFunction

from mvlm_kernels import dispatch, use_backend
from mvlm_kernels.case import Case
from support.kernels.check import check
from triton_proof import driver
from triton_proof.driver import ARCHS, install


@contextmanager
def on_gpu(arch: str) -> Iterator[None]:
    """Run every op of the library inside the block on CPU tensors as on a GPU of ``arch`` ("sm_80" or "sm_90").

    No work is split, because the GPU has no multiprocessors unless :func:`multiprocessors` says so.
    """
    install(arch)
    from mvlm_kernels.cross_attention import launch, tiles

    def of_gpu(function: Callable[..., Any], first: int) -> Callable[..., Any]:
        # The interpreter takes other tiles than a GPU, and the device, the argument after the dtype, says so.
        return lambda *args: function(*args[: first + 1], "cuda", *args[first + 2 :])

    with ExitStack() as stack:
        for owner, name, value in (
            (dispatch, "interpreting", lambda: True),
            (dispatch, "arch", lambda device: ARCHS[arch]),
            (dispatch, "multiprocessors", lambda device: 0),
            (dispatch, "checks_values", lambda device: False),
            (launch, "meta", of_gpu(tiles.meta, 1)),
            (launch, "single_pass", of_gpu(tiles.single_pass, 0)),
        ):
            stack.enter_context(patch.object(owner, name, value))
        stack.enter_context(use_backend("triton"))
        yield


def check_compiled(case: Case) -> None:
    """Check the values of a case on the emulated GPU. Skips the test if that GPU has no kernel for the case."""
    if not case.runs_on(dispatch.arch(torch.device("cpu"))):
        pytest.skip("no kernel: another backend runs on a GPU")
    with multiprocessors(case.multiprocessors):
        check(case, compiled=True, backends=("triton",))


def multiprocessors(count: int) -> Any:
    """Context in which the GPU has ``count`` multiprocessors: a large number splits all work that can be split."""
    return patch.object(dispatch, "multiprocessors", lambda device: count)


def watched_allocations() -> AbstractContextManager[None]:
    """As :func:`triton_proof.driver.watched_allocations`, of what the library allocates."""
    return driver.watched_allocations("mvlm_kernels")


def forget_kernels() -> None:
    """Drop the compiled kernels of the library, which take some MB each. Triton reads them from its cache again."""
    for name, module in list(sys.modules.items()):
        if f"{name}.".startswith("mvlm_kernels."):
            for value in vars(module).values():
                if isinstance(value, JITFunction):
                    value.device_caches.clear()
