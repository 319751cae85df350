"""Choice of the backend for each op, the reasons for it, and the launch of kernels.

There are two backends: ``"triton"`` (fused kernels) and ``"torch"`` (the readable reference; some ops use SDPA or a
composition for the CPU instead, see their documentation). Tensors on a CUDA device take Triton unless the op has a
reason against it. Tensors on the CPU take torch. :func:`use_backend` overrides the choice. Under
``use_backend("triton")`` an op raises an error if Triton cannot run the call, so that a test cannot pass on a fallback.
CPU tensors can take Triton only in a process started with ``TRITON_INTERPRET=1``, where Triton interprets kernels.
"""

import functools
import importlib.util
import inspect
import os
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal, NewType, TypeVar, cast

import torch

from mvlm_kernels import launch_cache

Op = TypeVar("Op", bound=Callable[..., Any])
Result = TypeVar("Result")

Backend = Literal["triton", "torch"]
Refusal = NewType("Refusal", str)
"""One line: the reason, "; ", and the way out. The type shows that a text was made by :func:`refusal`."""


def refusal(reason: str, way_out: str) -> Refusal:
    """Make a refusal. reason: a fact about the call. way_out: what runs in place of the kernel, and what to change."""
    return cast(Refusal, f"{reason}; {way_out}")  # a compiler traces a cast, and not the call of a NewType


FLOAT64 = refusal("float64 has no kernel on a GPU", "torch runs; pass float32, bfloat16 or float16")
NO_TF32 = refusal(
    'float32 kernels use TF32, which float32_matmul_precision "highest" forbids',
    'torch runs; torch.set_float32_matmul_precision("high") allows TF32',
)


@dataclass(frozen=True)
class Explanation:
    """Result of :func:`mvlm_kernels.explain`: the chosen backend, the reasons, and the device of the call.

    backend "torch": every reason is one against Triton, with a way out. backend "triton": the first reason is that of
    the choice. More follow under ``use_backend("triton")`` only: everything that would otherwise have been a reason
    against Triton.
    """

    backend: Backend
    reasons: tuple[str, ...]
    device: torch.device
    as_if: str = ""
    """The GPU that was imagined, such as sm_90; empty for the device of the tensors."""

    def __str__(self) -> str:
        if self.backend == "torch":
            kinds = ["not triton"] * len(self.reasons)
        else:
            kinds = ["because", *["against triton"] * (len(self.reasons) - 1)]
        lines = [f"{kind}: {reason}" for kind, reason in zip(kinds, self.reasons, strict=True)]
        where, runs = (self.as_if, "would run") if self.as_if else (self.device, "runs")
        return "\n".join([f"{runs}: {self.backend} on {where}", *lines])


_forced: Backend | None = None
# Of each public op: the functions of its arguments that list the reasons against Triton, and that check a call.
_explained: dict[Callable[..., Any], tuple[Callable[..., Sequence[Refusal]], Callable[..., Any] | None]] = {}

# Kernel -> its options, by `override_launch`.
_options_in_force: dict[str, dict[str, Any]] = {}
# Set by `recording`: receives the launches instead of a device.
_recorder: Callable[..., None] | None = None
# Compute capability that `recording` or `explain(.., as_if=..)` takes for the device's.
_recorded_arch: int | None = None
# Autocast's dtype on the meta device, which torch's autocast does not know; set by `recording`.
_recorded_autocast: torch.dtype | None = None


@contextmanager
def use_backend(backend: Backend) -> Iterator[None]:
    """Run every op inside the block on ``backend``, in all threads: autograd runs the backward pass in other threads.

    backend is ``"triton"`` or ``"torch"``; any other name is a ValueError. Under ``"triton"`` an op that Triton cannot
    run raises RuntimeError with the reasons.
    """
    global _forced
    if not isinstance(backend, str) or backend not in ("triton", "torch"):
        raise ValueError(f'backend must be "triton" or "torch", got {backend!r}')
    before, _forced = _forced, backend
    try:
        yield
    finally:
        _forced = before


def forced() -> Backend | None:
    """The backend of the :func:`use_backend` block in force; None outside."""
    return _forced


def explain(op: Callable[..., Any], *args: Any, as_if: str | None = None, **kwargs: Any) -> Explanation:
    """Explain which backend ``op(*args, **kwargs)`` takes. Runs no kernel.

    op is a public op of :mod:`mvlm_kernels`. Raises ValueError for any other function, and the op's own ValueError for
    bad arguments, but does not read lengths and ids. Under ``use_backend("triton")`` it lists the reasons against
    Triton, and does not raise them.

    as_if: a GPU, as ``"sm_90"`` for compute capability 9.0: explain the call with its tensors on one, on any machine.
    Autocast is that of CUDA then, so give tensors in the dtypes that the op is to get. For a moment the whole process
    takes its GPUs for such ones: run no op in another thread.
    """
    if as_if is not None:
        return _explain_as_if(as_if, op, args, kwargs)
    if op not in _explained:
        names = ", ".join(sorted(f.__name__ for f in _explained))
        given = getattr(op, "__name__", type(op).__name__)
        hint = "; a layer calls an op: explain that" if isinstance(op, torch.nn.Module) else ""
        raise ValueError(f"op must be one of {names}, got {given}{hint}")
    try:
        call = inspect.signature(op).bind(*args, **kwargs)
    except TypeError as error:
        raise TypeError(f"explain({op.__name__}, ...) takes the arguments of a call: {error}") from None
    call.apply_defaults()
    reasons_of, check = _explained[op]
    if check is not None:
        check(**_named(check, call.arguments))
    reasons = reasons_of(**_named(reasons_of, call.arguments))
    device = next(x.device for x in call.arguments.values() if isinstance(x, torch.Tensor))
    if _forced is not None:
        in_block = refusal(f'use_backend("{_forced}") is in force', "leave its block for the usual choice")
        return Explanation(_forced, (in_block, *reasons), device)
    if reasons:
        return Explanation("torch", tuple(reasons), device)
    return Explanation("triton", ("the fused kernel covers this call",), device)


def _explain_as_if(gpu: str, op: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Explanation:
    """Explain a call on fake tensors of a GPU, after the checks of the call as it is."""
    global _recorded_arch
    name = re.fullmatch(r"sm_(\d{2,3})", str(gpu))
    if name is None:
        raise ValueError(f'as_if must be a compute capability, such as "sm_90" of an H100, got {gpu!r}')
    explain(op, *args, **kwargs)
    from torch._subclasses.fake_tensor import FakeTensorMode

    def moved(x: Any) -> Any:
        given = isinstance(x, torch.Tensor)
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda") if given else x

    before, _recorded_arch = _recorded_arch, int(name[1])
    device_reasons.cache_clear()
    try:
        with FakeTensorMode():
            found = explain(op, *map(moved, args), **{key: moved(x) for key, x in kwargs.items()})
    finally:
        _recorded_arch = before
        device_reasons.cache_clear()
    return replace(found, device=torch.device("cuda"), as_if=gpu)


def _named(function: Callable[..., Any], arguments: dict[str, Any]) -> dict[str, Any]:
    """Select the arguments that a function has parameters for; all of them if it takes keywords."""
    parameters = inspect.signature(function).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return arguments
    return {name: arguments[name] for name in parameters}


def explained_by(
    reasons_of: Callable[..., Sequence[Refusal]], check: Callable[..., Any] | None = None
) -> Callable[[Op], Op]:
    """Decorator of a public op, which lets :func:`explain` explain its calls.

    reasons_of lists all reasons against Triton of a call that `check` has checked. Both take some of the op's
    arguments, by the op's names.
    """

    def register(op: Op) -> Op:
        _explained[op] = reasons_of, check
        return op

    return register


def choose(reasons: Sequence[Refusal]) -> Backend:
    """Choose the backend, given all reasons of an op against Triton, those of :func:`device_reasons` included.

    Raises RuntimeError with the reasons if ``use_backend("triton")`` is in force and Triton cannot run the call.
    """
    if _forced == "torch":
        return "torch"
    if _forced == "triton":
        hard: list[Refusal] = []
        if _recorder is None:  # while recording no kernel runs, so device limits do not apply
            for reason in reasons:
                # An interpreting process runs Triton on CPU tensors.
                hard += interpreter_reasons() if reason == ON_CPU else (reason,)
        if hard:
            raise RuntimeError('use_backend("triton") is in force, but: ' + "; ".join(hard))
        return "triton"
    return "torch" if reasons else "triton"


_without_resources: dict[tuple[Any, ...], Refusal] = {}


def without_resources(*kind: Any) -> tuple[Refusal, ...]:
    """The reason against Triton of a kind of call that is too large for this GPU; empty for other calls.

    It is too large if an earlier :func:`run_kernels` of this `kind` could not launch for lack of resources.
    """
    return (_without_resources[kind],) if kind in _without_resources else ()


def run_kernels(
    kind: tuple[Any, ...], launcher: Callable[..., Result], reference: Callable[..., Result], *args: Any
) -> Result:
    """Result of the launcher; of torch if Triton cannot launch a kernel for lack of resources, now and for later calls.

    kind: the op, the device, and what else decides about the tiles. ``use_backend("triton")`` raises Triton's error.
    """
    try:
        return launcher(*args)
    except Exception as error:
        if type(error).__name__ != "OutOfResources" or _forced == "triton":
            raise
        said = str(error).split("\n")[0]
        _without_resources[kind] = refusal(f"a kernel does not fit this GPU: {said}", "torch runs; use smaller shapes")
        warnings.warn(f"{kind[0]}: {_without_resources[kind]}", RuntimeWarning, stacklevel=2)
    return reference(*args)


def reasons_for(op: str, device: torch.device) -> tuple[Refusal, ...]:
    """Reasons against Triton that hold for all calls of an op on a device."""
    return device_reasons(device) + without_resources(op, device)


def refuse_if_forced(reason: Refusal) -> None:
    """Raise RuntimeError with the reason if ``use_backend("triton")`` is in force. For calls that have no kernel."""
    if _forced == "triton":
        raise RuntimeError(f'use_backend("triton") is in force, but: {reason}')


ON_CPU = refusal("the tensors are on the CPU", "torch runs; kernels need a CUDA device")


@functools.cache
def device_reasons(device: torch.device) -> tuple[Refusal, ...]:
    """Reasons against Triton that hold for every op on this device."""
    kind = device.type
    if importlib.util.find_spec("triton") is None:
        return (refusal("triton is not installed", "pip install triton"),) + ((ON_CPU,) if kind == "cpu" else ())
    if kind == "cpu":
        return (ON_CPU,)
    if kind == "cuda":
        if torch.version.hip is not None:
            return (refusal("the kernels are for NVIDIA GPUs, and this torch is for AMD's", "torch runs"),)
        if arch(device) < 80:
            major, minor = divmod(arch(device), 10)
            reason = f"compute capability 8.0 or later is needed, {device} has {major}.{minor}"
            return (refusal(reason, "torch runs; use an A100 or a later GPU"),)
        if interpreting():
            reason = "TRITON_INTERPRET=1 is set, and interpreted kernels run on CPU tensors"
            return (refusal(reason, f"torch runs; unset it for {device}"),)
        return ()
    return (refusal(f"the kernels run on cuda, and the tensors are on {kind}", "torch runs; move them to cuda"),)


def tf32_allowed() -> bool:
    """True if float32 products may run in TF32, by torch's setting ``float32_matmul_precision``."""
    try:
        return torch.get_float32_matmul_precision() != "highest"
    except RuntimeError:  # set by torch's newer switch for each backend, after which the older one cannot be read
        return torch.backends.cuda.matmul.fp32_precision == "tf32"


def constant_when_compiled(function: Op) -> Op:
    """Mark a function as a constant of compiled graphs, as ``torch.compiler.assume_constant_result`` does.

    That function imports the compiler, which takes longer than all other imports of this package together.
    """
    vars(function)["_dynamo_marked_constant"] = True
    return function


@constant_when_compiled  # torch 2.11 cannot trace it
def _has_autocast(kind: str) -> bool:
    return torch.amp.is_autocast_available(kind)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """Autocast's dtype on this device; None if autocast is off, or if the device type does not have it."""
    kind = device.type
    if kind == "meta":
        return _recorded_autocast
    known = kind in ("cpu", "cuda") or _has_autocast(kind)  # every op asks, so the usual answer costs no call
    if not known or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Context in which torch ops on this device keep the dtypes of their inputs."""
    if device.type == "meta" or autocast_dtype(device) is None:
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


@functools.cache
def interpreting() -> bool:
    """True if this process interprets kernels: it was started with TRITON_INTERPRET=1. Imports Triton."""
    if importlib.util.find_spec("triton") is None:
        return False
    from triton import knobs

    return bool(knobs.runtime.interpret)


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


@functools.cache
def interpreter_reasons() -> tuple[Refusal, ...]:
    """Reasons why this process cannot interpret kernels on CPU tensors; empty where it can. Imports Triton."""
    if not interpreting():
        return (ON_CPU,)
    import numpy
    import triton

    fault = interpreter_fault(triton.__version__, numpy.__version__)
    return () if fault is None else (fault,)


@functools.cache
def _device_arch(index: int | None) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return major * 10 + minor


def arch(device: torch.device) -> int:
    """Compute capability as an int (80, 90, 100): of the recorded target, of the device, or 80 for a CPU."""
    if _recorded_arch is not None:
        return _recorded_arch
    return _device_arch(device.index) if device.type == "cuda" else 80


def multiprocessors(device: torch.device) -> int:
    """Number of streaming multiprocessors of the recorded target or of the device.

    It is 0 for a CPU, because no grid is too small for the interpreter: launchers then split no work.
    """
    if _recorded_arch is not None:
        return {80: 108, 89: 128, 90: 132, 100: 148, 120: 170}.get(_recorded_arch, 64)
    return _device_multiprocessors(device.index) if device.type == "cuda" else 0


@functools.cache
def _device_multiprocessors(index: int | None) -> int:
    return torch.cuda.get_device_properties(index or 0).multi_processor_count


def checks_values(device: torch.device) -> bool:
    """True if ops check the values of indices and lengths on this device.

    On the CPU they always do, except while recording, because meta tensors have no values. On a GPU they do only with
    MVLM_KERNELS_DEBUG=1, because reading values waits for the device.
    """
    if device.type == "cpu":
        return _recorder is None
    return os.environ.get("MVLM_KERNELS_DEBUG", "0") not in ("", "0")


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
    """Run a Triton kernel: ``kernel[grid](*args, **meta)``.

    Every launcher calls this function, so that the ahead-of-time compiler and the byte counter see exactly the
    arguments that a GPU would get.
    """
    if _options_in_force:  # spares the call, which every launch would pay for
        meta = overridden(kernel.__name__, meta)
    if _recorder is not None:
        _recorder(kernel, grid, args, meta)
    elif 0 not in grid:
        # Triton launches on the current device, even if the arguments are on another one.
        device = _device_of(args)
        if device.type != "cuda":
            kernel[grid](*args, **meta)
        elif device.index == torch.cuda.current_device():
            launch_cache.launch(kernel, grid, args, meta, device.index)
        else:
            with torch.cuda.device(device):
                launch_cache.launch(kernel, grid, args, meta, device.index)


def _device_of(args: tuple[Any, ...]) -> torch.device:
    """Device of the first tensor. An argument may be a tuple that begins with a tensor: its pointer and strides."""
    for x in args:
        x = x[0] if isinstance(x, tuple) else x
        if isinstance(x, torch.Tensor):
            return x.device
    raise AssertionError("a launch has a tensor among its arguments")


@contextmanager
def recording(recorder: Callable[..., None], target_arch: int, autocast: torch.dtype | None = None) -> Iterator[None]:
    """Record launches instead of running them.

    Inside the block :func:`launch` calls ``recorder(kernel, grid, args, meta)``. Tiles are chosen for ``target_arch``
    (80, 90 or 100), and ops called on meta tensors take their launchers. ``autocast``: the dtype that
    :func:`autocast_dtype` gives for meta tensors; torch casts nothing there.
    """
    global _recorder, _recorded_arch, _recorded_autocast
    before = _recorder, _recorded_arch, _recorded_autocast
    _recorder, _recorded_arch, _recorded_autocast = recorder, target_arch, autocast
    try:
        yield
    finally:
        _recorder, _recorded_arch, _recorded_autocast = before


def records() -> bool:
    """True inside :func:`recording`."""
    return _recorder is not None


@contextmanager
def override_launch(kernel: str, **options: Any) -> Iterator[None]:
    """Launch one kernel with other options inside the block: constexprs, num_warps, num_stages, maxnreg.

    For measurements alone: tiles are chosen by shape and never by timing, and a sweep looks for better rules.
    kernel is the name under which the launcher chooses its options; for most kernels that of the Triton function.
    Results may be wrong if an option does not fit the kernel. A launcher whose grid follows from an option has to ask
    :func:`overridden` for it before it computes the grid.
    """
    before = _options_in_force.get(kernel)
    _options_in_force[kernel] = options
    try:
        yield
    finally:
        _options_in_force.pop(kernel) if before is None else _options_in_force.update({kernel: before})


def overridden(kernel: str, options: dict[str, Any]) -> dict[str, Any]:
    """The options, with those of :func:`override_launch` in force. Returns the same dict if there are none."""
    found = _options_in_force.get(kernel)
    return {**options, **found} if found else options


def ceil_div(a: int, b: int) -> int:
    """a / b rounded up, for grids. Avoids the host cost of ``triton.cdiv``, which unwraps its arguments."""
    return -(-a // b)


def power_of_two(n: int) -> int:
    """Smallest power of two >= n, for n >= 1. Avoids the host cost of ``triton.next_power_of_2``."""
    return 1 << (n - 1).bit_length()
