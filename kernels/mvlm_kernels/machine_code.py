"""Compilation of one kernel for a GPU that is not here, and the costs that its machine code states."""

import functools
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

ARCHS = {"sm_80": 80, "sm_90": 90, "sm_100": 100}
"""NVIDIA targets, and their compute capability as an int."""


def capability_of(arch: str) -> int:
    """Compute capability of an NVIDIA GPU as an int, such as 89 of "sm_89"."""
    return ARCHS.get(arch) or int(arch.removeprefix("sm_"))


@functools.cache
def _binder(kernel: Any, arch: str) -> tuple[Any, ...]:
    """(target, backend, function of arguments that specialises them as a launch on that GPU would)."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    target = GPUTarget("cuda", capability_of(arch), 32)
    backend = make_backend(target)
    return target, backend, create_function_from_signature(kernel.signature, kernel.params, backend)


def signature(kernel: Any, args: tuple, meta: dict[str, Any], arch: str) -> str:
    """Key of a launch in Triton's cache of compiled kernels: two launches compile once if theirs are equal."""
    _, specialization, options = _binder(kernel, arch)[2](*args, debug=False, **meta)
    return f"{kernel.__name__} {specialization} {sorted(options.items())}"


def compile_launch(kernel: Any, args: tuple, meta: dict[str, Any], arch: str) -> Any:
    """Compile a kernel for these arguments, specialised as a launch on that GPU would specialise them.

    Raises AssertionError for a kernel that reads a global which is unequal to itself.
    """
    import triton
    from triton.compiler import ASTSource

    target, backend, bind = _binder(kernel, arch)
    bound, specialization, options = bind(*args, debug=False, **meta)
    options, signature, constexprs, attrs = kernel._pack_args(
        backend, {"debug": False, **meta}, bound, specialization, options
    )
    source = ASTSource(kernel, signature, constexprs, attrs)
    compiled = triton.compile(source, target=target, options=options.__dict__)
    # Triton refuses a second launch if a global of the kernel has changed, and NaN never equals itself.
    for (name, _), (value, _) in kernel.used_global_vals.items():
        if bool(value != value):
            raise AssertionError(f"{kernel.__name__} reads the global {name}, which is unequal to itself")
    return compiled


def _tool(name: str) -> str:
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def usage(cubin: bytes) -> dict[str, int]:
    """Registers (REG) and bytes of stack (STACK) per thread, as the machine code states them."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        text = subprocess.run(
            [_tool("cuobjdump"), "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", text)}


def blocks(registers: int, warps: int, shared: int, arch: str) -> int:
    """Blocks that one multiprocessor holds at once, at most.

    By 65,536 registers, given out to warps in units of 256; by warps and blocks; and by shared memory, of which the
    system keeps 1 KiB a block: CUDA C++ programming guide, technical specifications per compute capability.
    """
    most_warps, most_blocks, kilobytes = _OF_A_MULTIPROCESSOR.get(arch, _OF_A_MULTIPROCESSOR["sm_86"])
    of_a_warp = -(-registers * 32 // 256) * 256
    return min(65536 // (of_a_warp * warps), most_warps // warps, most_blocks, kilobytes * 1024 // (shared + 1024))


_OF_A_MULTIPROCESSOR = {
    "sm_80": (64, 32, 164),
    "sm_86": (48, 16, 100),
    "sm_89": (48, 24, 100),
    "sm_90": (64, 32, 228),
    "sm_100": (64, 32, 228),
    "sm_120": (48, 24, 100),
}
"""Most warps and blocks, and KiB of shared memory, of a multiprocessor. Others get the smallest."""


def spill_bytes(ptx: str, arch: str) -> int:
    """Bytes of spill stores and loads. ptxas has to compile again to print them: call it only if there is a stack."""
    hopper = int(arch.removeprefix("sm_")) >= 90  # or later
    suffix = "a" if hopper else ""
    ptxas = _tool("ptxas-blackwell") if hopper and Path(_tool("ptxas-blackwell")).exists() else _tool("ptxas")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        # Triton's own flags: other flags give other schedules, which spill other registers.
        flags = ["-lineinfo", "--regAllocOptLevel=2"] if "blackwell" in ptxas else ["-lineinfo"]
        log = subprocess.run(
            [ptxas, "-v", *flags, f"--gpu-name={arch}{suffix}", str(source), "-o", f"{folder}/kernel.cubin"],
            capture_output=True,
            text=True,
            check=True,
        ).stderr
    return sum(int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", log))
