"""Triton driver that runs on the CPU what Triton compiled for an NVIDIA GPU.

:func:`install` makes it Triton's active driver. From then on ``kernel[grid](...)`` on CPU tensors compiles for the
chosen architecture and emulates the PTX. ptxas is not run.
"""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

from triton_proof.allocations import watched
from triton_proof.arguments import flat_arguments, parameter_memory
from triton_proof.coverage import whole_numbers
from triton_proof.machine.layout import PATTERN
from triton_proof.machine.machine import Machine
from triton_proof.program.program import Program
from triton_proof.ptx.syntax import UnsupportedPTX
from triton_proof.report import EmulationError, Launch

ARCHS = {"sm_80": 80, "sm_90": 90}
# Shared memory that a block may take: CUDA C++ programming guide, technical specifications per compute capability.
_SHARED_LIMIT = {80: 166_912, 90: 232_448}
_MULTIPROCESSORS = {80: 108, 90: 132}
# Triton 3.6 puts no proxy fence between cp.async and wgmma, in no kernel. Triton 3.9 does.
FENCES_COPIES = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9)


@dataclass
class Settings:
    """Settings of all launches of the process.

    checks, counting, lockstep: see :class:`~triton_proof.machine.machine.Machine`. on_fault: "raise" EmulationError
    after a launch that had faults, or "collect" them in the launch. launches: finished launches, if ``keep``. edit: a
    function of compiled text that changes it before it is run. ignored: kinds of findings that are left out.
    unwritten: (address, bytes) of memory that holds the pattern of bytes that nobody wrote.
    """

    checks: bool = True
    counting: bool = True
    lockstep: int = 4096
    on_fault: str = "raise"
    keep: bool = False
    launches: list[Launch] = field(default_factory=list)
    edit: Callable[[str], str] | None = None
    ignored: frozenset[str] = frozenset() if FENCES_COPIES else frozenset({"copy-proxy"})
    unwritten: set[tuple[int, int]] = field(default_factory=set)


settings = Settings()


@contextmanager
def changed(**values: Any) -> Iterator[None]:
    """Change attributes of :data:`settings` inside the block."""
    before = {name: getattr(settings, name) for name in values}
    try:
        for name, value in values.items():
            setattr(settings, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(settings, name, value)


@contextmanager
def recorded(**values: Any) -> Iterator[list[Launch]]:
    """Record launches inside the block, in the list that is yielded; keywords as in :func:`changed`."""
    with changed(launches=[], keep=True, **values):
        yield settings.launches


def uninitialised(x: Tensor) -> Tensor:
    """Fill x's storage with the pattern of bytes that nobody wrote. Loads of it by a kernel are then findings."""
    storage = x.untyped_storage()
    if storage.nbytes():
        torch.empty(0, dtype=torch.uint8).set_(storage).fill_(PATTERN)  # pyright: ignore[reportArgumentType]
        settings.unwritten.add((storage.data_ptr(), storage.nbytes()))
    return x


@contextmanager
def watched_allocations(of: str = "") -> Iterator[None]:
    """Mark what host code allocates inside the block as never written.

    A kernel's load of it before a store is a finding, and :func:`unwritten` counts what nobody stored to. of: the
    package whose allocations are meant; without it all but those of torch, Triton and NumPy.
    """
    try:
        with watched(uninitialised, of):
            yield
    finally:
        settings.unwritten.clear()


def unwritten(x: Tensor) -> int:
    """Number of elements of x that still hold the pattern of memory that nobody wrote."""
    if not x.numel():
        return 0
    raw = x.detach().contiguous().flatten().view(torch.uint8).view(x.numel(), x.element_size())
    return int((raw == PATTERN).all(1).sum())


def launch(program: Program, arch: int, warps: int, shared: int, grid: tuple[int, int, int], arguments: Any) -> Launch:
    """Run a compiled kernel on a grid. ``arguments``: (type, name, value) of each parameter.

    Raises EmulationError if the launch had faults and settings.on_fault is "raise".
    """
    machine = Machine(
        program, f"sm_{arch}", warps, shared, settings.checks, settings.counting, settings.lockstep
    )  # fmt: skip
    if program.function.max_threads not in (1, machine.threads):
        raise UnsupportedPTX(f"{program.function.max_threads} threads beside {warps} warps")
    done = machine.run(grid, parameter_memory(program, arguments, machine, settings.unwritten))
    done.findings = [x for x in done.findings if x.kind not in settings.ignored]
    if settings.keep:
        settings.launches.append(done)
    if done.findings and settings.on_fault == "raise":
        raise EmulationError(done.findings)
    return done


class _Launcher:
    """Function that Triton calls for each launch, with all arguments of the kernel."""

    def __init__(self, source: Any, metadata: Any) -> None:
        if getattr(metadata, "tensordesc_meta", None):
            raise UnsupportedPTX("tensor descriptors (TMA) as kernel arguments")
        self.metadata, self.source = metadata, source

    def __call__(
        self, grid_x: int, grid_y: int, grid_z: int, stream: int, program: Program, kernel_metadata: Any,
        launch_metadata: Any, enter_hook: Any, exit_hook: Any, *args: Any,
    ) -> None:  # fmt: skip
        m, grid = self.metadata, (grid_x, grid_y, grid_z)
        if getattr(m, "num_ctas", 1) != 1:
            raise UnsupportedPTX("clusters")
        if not (0 < grid_x < 2**31 and 0 < grid_y < 2**16 and 0 < grid_z < 2**16):
            raise ValueError(f"no GPU launches a grid of {grid_x} x {grid_y} x {grid_z}")
        if enter_hook is not None:
            enter_hook(launch_metadata)
        arguments = flat_arguments(self.source.signature, args)
        scratch = [s * grid_x * grid_y * grid_z for s in (m.global_scratch_size, m.profile_scratch_size)]
        # Memory of the launch itself; torch aligns it by 64 bytes.
        arguments += [("*u32", "scratch", torch.empty(s // 4 + 32, dtype=torch.int32) if s else None) for s in scratch]
        done = launch(program, m.target.arch, m.num_warps, m.shared, grid, arguments)
        done.numbers = whole_numbers(self.source, args)
        if exit_hook is not None:
            exit_hook(launch_metadata)


class EmulatorDriver(DriverBase):
    """Driver whose device number is the architecture, because Triton keeps compiled kernels by device."""

    launcher_cls = _Launcher

    def __init__(self, arch: int) -> None:
        self.arch = arch
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: _properties(arch), load_binary=_load, unload_module=lambda module: None
        )

    @classmethod
    def is_active(cls) -> bool:
        return True

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_capability(self, device: int = 0) -> tuple[int, int]:
        return divmod(self.arch, 10)

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_benchmarker(self) -> Any:
        raise NotImplementedError("an emulator times nothing: choose a configuration, or use the pytest plugin")


def _properties(arch: int) -> dict[str, int]:
    return {
        "max_shared_mem": _SHARED_LIMIT[arch], "multiprocessor_count": _MULTIPROCESSORS[arch], "warpSize": 32,
        "max_num_regs": 65536, "mem_bus_width": 5120, "mem_clock_rate": 1, "sm_clock_rate": 1,
    }  # fmt: skip


def _load(name: str, binary: bytes, shared: int, device: int) -> tuple[Program, Program, int, int, int]:
    """Make a kernel's PTX executable. Returns (module, function, registers, spills, most threads), as Triton wants.

    The executable kernel stands for module and function; registers and spills are 0.
    """
    text = binary.decode()
    program = Program(text if settings.edit is None else settings.edit(text), name)
    return program, program, 0, 0, 1024


def _hand_on_ptx(
    backend: Any = None, stages: Any = None, options: Any = None, language: Any = None, capability: Any = None
) -> tuple[str, str] | None:
    """Let the last stage of Triton's compiler return PTX, where it would return machine code.

    Without arguments Triton asks for a key of its cache.
    """
    if stages is None:
        key = "emulator of PTX"
        return key, hashlib.sha256(key.encode()).hexdigest()
    stages["cubin"] = lambda source, metadata: source.encode()
    return None


def install(arch: str) -> None:
    """Make Triton compile for ``arch`` ("sm_80" or "sm_90") and emulate.

    Raises ValueError for another architecture, and RuntimeError in a process that interprets kernels.
    """
    if arch not in ARCHS:
        raise ValueError(f"arch must be one of {', '.join(ARCHS)}, got {arch!r}")
    if knobs.runtime.interpret:
        raise RuntimeError("kernels of this process are interpreted; start it with TRITON_INTERPRET=0")
    triton.runtime.driver.set_active(EmulatorDriver(ARCHS[arch]))
    knobs.runtime.add_stages_inspection_hook = cast(Any, _hand_on_ptx)  # Triton declares no result
