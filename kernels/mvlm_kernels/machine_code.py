"""Machine code of a compiled kernel, read by NVIDIA's tools that come with Triton: registers, spills, instructions."""

import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

# An instruction of a listing by cuobjdump, its address in front.
_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", re.MULTILINE)
_BRANCH = re.compile(r"\bBRA\b.*\b0x([0-9a-f]+)$")


def _tool(name: str) -> str:
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def _dump(cubin: bytes, option: str) -> str:
    """Text that cuobjdump prints of a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        return subprocess.run(
            [_tool("cuobjdump"), option, file.name], capture_output=True, text=True, check=True
        ).stdout


def usage(cubin: bytes) -> dict[str, int]:
    """Registers (REG) and bytes of stack (STACK) per thread, as the machine code states them."""
    return {
        name: int(value)
        for name, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", _dump(cubin, "--dump-resource-usage"))
    }


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


class Instructions(NamedTuple):
    """Numbers of a kernel's machine instructions: outside its loops, and in each loop but not in a loop within it.

    A loop stands before those that start later, so before those within it.
    """

    outside: int
    loops: tuple[int, ...] = ()

    def executed(self, *trips: float) -> float:
        """Instructions that a warp issues if it runs through the loops so many times, in all.

        Raises ValueError for another number of trips than of loops.
        """
        return self.outside + sum(trip * body for trip, body in zip(trips, self.loops, strict=True))


def instructions(cubin: bytes) -> Instructions:
    """Instructions of a compiled kernel; see :func:`counted`."""
    return counted(_dump(cubin, "-sass"))


def counted(listing: str) -> Instructions:
    """Instructions of a kernel and of its loops, each of which a branch to an earlier address ends.

    A branch forward counts as not taken, and waits count as if they were over at once: a loop that sleeps is none, and
    code behind the last exit, to which sm_100 goes for another look at a product or with an error, is left out. Raises
    ValueError for subroutines: how often they run is not in the code. listing: of cuobjdump.
    """
    code = [(int(number, 16), text) for number, text in _INSTRUCTION.findall(listing)]
    exits = [number for number, (_, text) in enumerate(code) if text == "EXIT"]
    loops = {}
    for number, (address, text) in enumerate(code):
        target = int(found[1], 16) if (found := _BRANCH.search(text)) else None
        if target == address or (exits and number > exits[-1]):  # the end is a branch to itself
            code = code[:number]
            break
        if re.search(r"\bRET\b", text):
            raise ValueError("the kernel has a subroutine")
        if target is not None and target < address:
            body = [text for at, text in code if target <= at <= address]
            if not any("NANOSLEEP" in text for text in body):
                loops[target] = address  # the last branch to a loop's head ends it
    numbers = dict.fromkeys([None, *sorted(loops)], 0)
    for address, _ in code:
        numbers[max((first for first, last in loops.items() if first <= address <= last), default=None)] += 1
    return Instructions(numbers.pop(None), tuple(numbers.values()))
