"""Cost of a compiled kernel, by NVIDIA's assembler, which comes with Triton."""

import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import triton


class Cost(NamedTuple):
    """Registers of a thread, and bytes that it spills to memory (stores and loads in the code)."""

    registers: int
    spilled: int


def assemble(text: str, arch: str) -> Cost:
    """Assemble PTX for ``arch`` ("sm_80" or "sm_90"). Raises RuntimeError with ptxas's words if it refuses."""
    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    tool = folder / ("ptxas-blackwell" if arch != "sm_80" and (folder / "ptxas-blackwell").exists() else "ptxas")
    with tempfile.TemporaryDirectory() as temporary:
        source = Path(temporary) / "kernel.ptx"
        source.write_text(text)
        target = f"--gpu-name={arch}{'a' if arch == 'sm_90' else ''}"
        command = [str(tool), "-v", "-lineinfo", target, str(source), "-o", f"{temporary}/kernel.cubin"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"ptxas refuses the kernel: {done.stderr.strip()[:500]}")
    registers = re.search(r"Used (\d+) registers", done.stderr)
    spilled = sum(int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", done.stderr))
    return Cost(int(registers[1]) if registers else 0, spilled)
