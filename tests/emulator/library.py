"""``mvlm_kernels`` on the emulator: CPU tensors treated as a GPU's, and its allocations watched.

The library runs kernels on CPU tensors only where Triton interprets them. Here it is told that Triton does, while the
kernels are compiled and emulated. Tiles are chosen as on the emulated GPU, and values of indices are not checked on the
host, as on a GPU.
"""

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from triton import JITFunction

from emulator.driver import ARCHS, install, settings, uninitialised
from emulator.machine.layout import PATTERN
from mvlm_kernels import dispatch, use_backend


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


def multiprocessors(count: int) -> Any:
    """Context in which the GPU has ``count`` multiprocessors: a large number splits all work that can be split."""
    return patch.object(dispatch, "multiprocessors", lambda device: count)


@contextmanager
def watched_allocations(package: str = "mvlm_kernels") -> Iterator[None]:
    """Mark what ``package`` allocates inside the block as never written.

    A kernel's load of it before a store is a finding, and :func:`unwritten` counts what nobody stored to.
    """

    def wrap(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        @functools.wraps(allocate)
        def marked(*args: Any, **kwargs: Any) -> Tensor:
            x = allocate(*args, **kwargs)
            caller = sys._getframe(1).f_globals.get("__name__", "")
            ours = caller == package or caller.startswith(f"{package}.")
            return uninitialised(x) if ours and type(x) is Tensor and x.device.type == "cpu" else x

        return marked

    try:
        with (
            patch.object(torch, "empty", wrap(torch.empty)),
            patch.object(torch, "empty_like", wrap(torch.empty_like)),
            patch.object(Tensor, "new_empty", wrap(Tensor.new_empty)),
        ):
            yield
    finally:
        settings.unwritten.clear()


def forget_kernels(package: str = "mvlm_kernels") -> None:
    """Drop the compiled kernels of ``package``, which take some MB each. Triton reads them from its cache again."""
    for name, module in list(sys.modules.items()):
        if name == package or name.startswith(f"{package}."):
            for value in vars(module).values():
                if isinstance(value, JITFunction):
                    value.device_caches.clear()


def unwritten(x: Tensor) -> int:
    """Number of elements of x that still hold the pattern of memory that nobody wrote."""
    if not x.numel():
        return 0
    raw = x.detach().contiguous().flatten().view(torch.uint8).view(x.numel(), x.element_size())
    return int((raw == PATTERN).all(1).sum())
