"""Basic blocks of executable steps."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from triton_proof.ptx.syntax import TYPE_BITS, Instruction
from triton_proof.scalar.operands import Getter

Step = Callable[[Any, Any], None]  # of the machine and the mask of active threads
SPACES = ("global", "shared", "local", "param", "const")
_BY_NAME = ("ldmatrix", "stmatrix", "mma", "shfl", "bar", "bra", "wgmma", "cvt", "selp", "setp", "ret", "mov")
_SPECIAL = ("ex2", "lg2", "rcp", "rsqrt", "sqrt", "sin", "cos", "tanh", "div")


@dataclass
class End:
    """The way out of a basic block. predicate: for which threads. target: block of a jump.

    barrier, threads: number of a barrier, and how many threads it waits for (None: all that still run).
    """

    kind: Literal["next", "jump", "return", "trap", "barrier"] = "next"
    instruction: Instruction | None = None
    predicate: Getter | None = None
    target: int = 0
    barrier: int = 0
    threads: int | None = None


@dataclass
class Code:
    """One basic block. classes: number of its instructions by class."""

    steps: list[Step] = field(default_factory=list)
    end: End = field(default_factory=End)
    classes: Counter[str] = field(default_factory=Counter)


def class_of(ins: Instruction) -> str:
    """Class of an instruction, for the counters."""
    if ins.name in ("ld", "st", "atom", "red"):
        space = next((s for s in SPACES if any(p.startswith(s) for p in ins.parts)), "generic")
        return f"{ins.name}.{space}"
    if ins.name in _BY_NAME:
        return ins.name
    if ins.name == "cp":
        return "cp.async"
    kind = next((p for p in reversed(ins.parts) if p in TYPE_BITS), "")
    if ins.name in _SPECIAL and kind.startswith("f"):
        return "special"
    return "float" if kind.startswith(("f", "bf")) else "integer"
