"""Which backend runs an op, why not the other, and the one place that launches kernels.

Backends are ``"triton"`` (fused kernels) and ``"torch"`` (the readable reference, or where an op says so SDPA or a
composition for the CPU). Tensors on a CUDA device take Triton wherever an op has no reason against it; tensors on the
CPU take torch. :func:`use_backend` overrides both: ``use_backend("triton")`` insists, and raises where a reason stands
against it, so a test can never pass on a fallback. On CPU tensors that works in a process started with
``TRITON_INTERPRET=1``, where Triton interprets.
"""

import functools
import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch

Backend = Literal["triton", "torch"]
Op = TypeVar("Op", bound=Callable[..., Any])

_forced: Backend | None = None
_reason_functions: dict[Callable[..., Any], Callable[..., Sequence[str]]] = {}

# Set by `recording`: what the launchers would launch goes here, and not to a device.
_recorder: Callable[..., None] | None = None
_recorded_arch: int | None = None


@dataclass(frozen=True)
class Explanation:
    """What :func:`explain` returns: the backend that would run, and every reason why the other would not."""

    backend: Backend
    reasons: tuple[str, ...]

    def __str__(self) -> str:
        other = "torch" if self.backend == "triton" else "triton"
        lines = [f"runs: {self.backend}"] + [f"not {other}: {reason}" for reason in self.reasons]
        return "\n".join(lines)


@contextmanager
def use_backend(backend: Backend) -> Iterator[None]:
    """Inside the block every op runs on ``backend``, in this whole process (the backward pass has its own threads).

    Raises ValueError for another name. Under ``"triton"`` an op that cannot run there raises RuntimeError with its
    reasons.
    """
    global _forced
    if backend not in ("triton", "torch"):
        raise ValueError(f'backend must be "triton" or "torch", got {backend!r}')
    before, _forced = _forced, backend
    try:
        yield
    finally:
        _forced = before


def explain(op: Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """Say which backend ``op(*args, **kwargs)`` would run on, and every reason why the other would not. Runs nothing.

    op is a public function of :mod:`mvlm_kernels`. Raises ValueError for any other, and whatever op itself raises on
    bad arguments.
    """
    if op not in _reason_functions:
        names = ", ".join(sorted(f.__name__ for f in _reason_functions))
        raise ValueError(f"op must be one of {names}, got {op!r}")
    reasons = _reason_functions[op](*args, **kwargs)
    if _forced is not None:
        return Explanation(_forced, (f'use_backend("{_forced}") is in force', *reasons))
    if reasons:
        return Explanation("torch", tuple(reasons))
    return Explanation("triton", ("the fused kernel covers this call",))


def explained_by(reason_function: Callable[..., Sequence[str]]) -> Callable[[Op], Op]:
    """Decorator for a public op: ``reason_function``, called with the op's arguments, lists every reason against
    Triton.
    """

    def register(op: Op) -> Op:
        _reason_functions[op] = reason_function
        return op

    return register


def choose(reasons: Sequence[str]) -> Backend:
    """The backend that runs, given an op's reasons against Triton (empty: none), those of :func:`device_reasons`
    included.
    """
    if _forced == "torch":
        return "torch"
    if _forced == "triton":
        # Away from a GPU Triton still runs where it interprets, so being on the CPU is no reason there.
        hard = [r for r in reasons if not (r == _ON_CPU and interpreting())] if _recorder is None else []
        if hard:
            raise RuntimeError('use_backend("triton") is in force, but: ' + "; ".join(hard))
        return "triton"
    return "torch" if reasons else "triton"


def refuse_if_forced(reason: str) -> None:
    """Raises RuntimeError with the reason where the caller insists on Triton; for calls that never reach a kernel."""
    if _forced == "triton":
        raise RuntimeError(f'use_backend("triton") is in force, but: {reason}')


_ON_CPU = "the tensors are on the CPU"


@functools.cache
def device_reasons(device: torch.device) -> tuple[str, ...]:
    """Reasons against Triton that hold for every op on this device."""
    kind = device.type
    if importlib.util.find_spec("triton") is None:
        return ("triton is not installed",) + ((_ON_CPU,) if kind == "cpu" else ())
    if kind == "cpu":
        return (_ON_CPU,)
    if kind == "cuda":
        if torch.version.hip is not None:
            return ("the kernels are written for NVIDIA GPUs, and this torch is built for ROCm",)
        major, minor = torch.cuda.get_device_capability(device.index)
        if major < 8:
            return (f"compute capability 8.0 or later is needed, this GPU has {major}.{minor}",)
        if interpreting():
            return ("TRITON_INTERPRET=1 is set, and interpreted kernels run on CPU tensors",)
        return ()
    return (f"device type is {kind}, the kernels run on cuda",)


def tf32_allowed() -> bool:
    """Whether float32 products may run in TF32: ``torch.set_float32_matmul_precision`` above "highest", or the newer
    setting by backend, beside which the older may not be read."""
    try:
        return torch.get_float32_matmul_precision() != "highest"
    except RuntimeError:
        return torch.backends.cuda.matmul.fp32_precision == "tf32"


@functools.cache
def interpreting() -> bool:
    """Whether this process interprets kernels (TRITON_INTERPRET=1 when Triton was imported). Imports Triton."""
    if importlib.util.find_spec("triton") is None:
        return False
    from mvlm_kernels.language import INTERPRETING

    return INTERPRETING


@functools.cache
def _device_arch(index: int | None) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return major * 10 + minor


def arch(device: torch.device) -> int:
    """Compute capability of the device as an int (80, 90, 100), of the recorded target while recording, else 80."""
    if _recorded_arch is not None:
        return _recorded_arch
    return _device_arch(device.index) if device.type == "cuda" else 80


def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of the device, or of the recorded target. On the CPU 0: no grid is too small for the
    interpreter, so it never splits work unasked."""
    if _recorded_arch is not None:
        return {80: 108, 90: 132, 100: 148}.get(_recorded_arch, 64)
    return _device_multiprocessors(device.index) if device.type == "cuda" else 0


@functools.cache
def _device_multiprocessors(index: int | None) -> int:
    return torch.cuda.get_device_properties(index or 0).multi_processor_count


def checks_values(device: torch.device) -> bool:
    """Whether values of indices and lengths are read and checked: on the CPU, and on a GPU, where that synchronises,
    with MVLM_KERNELS_DEBUG=1 alone. Not while recording, as nothing runs on the values then.
    """
    if device.type == "cpu":
        return _recorder is None
    return os.environ.get("MVLM_KERNELS_DEBUG", "0") not in ("", "0")


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
    """Run a Triton kernel: ``kernel[grid](*args, **meta)``. Every launcher goes through here, so that the ahead-of-time
    compiler and the byte counter see the very arguments that a GPU would get."""
    if _recorder is not None:
        _recorder(kernel, grid, args, meta)
    elif 0 not in grid:
        # Triton launches on the current device, whatever its arguments lie on.
        device = next(x.device for x in args if isinstance(x, torch.Tensor))
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                kernel[grid](*args, **meta)
        else:
            kernel[grid](*args, **meta)


@contextmanager
def recording(recorder: Callable[..., None], target_arch: int) -> Iterator[None]:
    """Inside the block :func:`launch` calls ``recorder(kernel, grid, args, meta)`` and runs nothing, tiles are chosen
    for ``target_arch``, and ops called on meta tensors take their launchers.
    """
    global _recorder, _recorded_arch
    before = _recorder, _recorded_arch
    _recorder, _recorded_arch = recorder, target_arch
    try:
        yield
    finally:
        _recorder, _recorded_arch = before


def ceil_div(a: int, b: int) -> int:
    """a / b rounded up, for grids. Triton's own ``cdiv`` serves kernels too and unwraps its arguments first, which
    costs several times as much in every call."""
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The least power of two that is at least n >= 1; cheaper than Triton's ``next_power_of_2``, as above."""
    return 1 << (n - 1).bit_length()
