"""The form of a scalar instruction: its type, its modifiers, and readers of its operands."""

from typing import Any

import numpy as np

from triton_proof.ptx.syntax import TYPE_BITS, Instruction, UnsupportedPTX
from triton_proof.scalar.formats import flush
from triton_proof.scalar.operands import Getter, Reader

ORDERED = {"eq", "ne", "lt", "le", "gt", "ge", "lo", "ls", "hi", "hs"}
UNORDERED = {"equ", "neu", "ltu", "leu", "gtu", "geu"}

_FLOAT = {"rn", "ftz", "sat"}
_ORDER = {"NaN", "ftz"}
_FLUSH = {"ftz"}
_APPROXIMATE = {"approx", "rn", "ftz"}
# Parts of an instruction's name beside types. Any other is not understood, and the instruction is refused.
_MODIFIERS = {
    **dict.fromkeys(("add", "sub"), _FLOAT),
    "mul": _FLOAT | {"lo", "hi", "wide"},
    "fma": _FLOAT,
    "mad": _FLOAT | {"lo", "hi", "wide"},
    "div": _FLOAT | {"full", "approx"},
    **dict.fromkeys(("min", "max"), _ORDER),
    **dict.fromkeys(("neg", "abs"), _FLUSH),
    "shf": {"l", "r", "wrap", "clamp"},
    "setp": {"and", "or", "xor", "ftz", "num", "nan"} | ORDERED | UNORDERED,
    "testp": {"finite", "infinite", "notanumber", "number"},
    **dict.fromkeys(("ex2", "lg2", "rcp", "rsqrt", "sqrt", "sin", "cos", "tanh"), _APPROXIMATE),
}


class Form:
    """Parsed form of a scalar instruction. Raises UnsupportedPTX for a modifier that is not understood."""

    def __init__(self, ins: Instruction, get: Reader) -> None:
        self.ins, self.get, self.ops = ins, get, ins.operands
        self.name, self.parts = ins.name, ins.parts
        kinds = [p for p in ins.parts[1:] if p in TYPE_BITS]
        if not kinds:
            raise UnsupportedPTX(ins.opcode)
        self.kind = kinds[-1]
        self.ftz, self.sat = "ftz" in ins.parts, "sat" in ins.parts
        unknown = {p for p in ins.parts[1:] if p not in TYPE_BITS} - _MODIFIERS.get(self.name, set())
        if unknown or (self.sat and self.kind != "f32"):
            raise UnsupportedPTX(f"{ins.opcode}: {', '.join(sorted(unknown)) or 'saturation'}")

    @property
    def floating(self) -> bool:
        return self.kind in ("f32", "f64")

    @property
    def halves(self) -> bool:
        """True for types of 16-bit floats, alone or in pairs."""
        return self.kind in ("f16", "bf16", "f16x2", "bf16x2")

    def read(self, count: int, kind: str | None = None) -> list[Getter]:
        """Readers of the first ``count`` operands after the destination, as ``kind`` or as the instruction's type."""
        return [self.get(op, kind or self.kind) for op in self.ops[1 : count + 1]]

    def read_flushed(self, count: int) -> list[Getter]:
        """Readers that turn subnormal numbers into zero where the instruction says ``.ftz``."""
        readers = self.read(count)
        return [_flushed(r) for r in readers] if self.ftz and self.kind == "f32" else readers

    def finish(self, value: Getter) -> Getter:
        """The result with subnormals flushed and saturated to 0..1 where the instruction says so."""
        if self.ftz and self.kind == "f32":
            value = _flushed(value)
        if not self.sat:
            return value

        def saturated(m: Any) -> np.ndarray:
            return np.clip(np.nan_to_num(value(m), nan=0.0, posinf=1.0, neginf=0.0), 0, 1)

        return saturated


def _flushed(value: Getter) -> Getter:
    return lambda m: flush(value(m))
