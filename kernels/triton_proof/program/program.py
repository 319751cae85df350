"""A kernel made executable: its names, its memory, and its blocks."""

from typing import Any

import numpy as np

from triton_proof.machine.layout import SHARED_BASE
from triton_proof.program.analysis import (
    accumulators,
    block_local_registers,
    registers_of,
    shared_granule,
    stores_of_reductions,
)
from triton_proof.program.instructions import build_step
from triton_proof.program.steps import Code, End, Step, class_of
from triton_proof.ptx.parser import parse
from triton_proof.ptx.syntax import Block, Imm, Instruction, Mem, Operand, Reg, Sym, UnsupportedPTX, Variable
from triton_proof.scalar.formats import pattern
from triton_proof.scalar.operands import Getter, getter

_AXES = {"x": 0, "y": 1, "z": 2}
_ALWAYS_ZERO = ("%clock", "%clock64", "%globaltimer", "%globaltimer_lo", "%smid", "%cluster_ctarank")


class Program:
    """Executable form of one kernel of a PTX text.

    Raises UnsupportedPTX, naming the instruction, where it cannot be executed.
    """

    def __init__(self, text: str, name: str) -> None:
        module = parse(text)
        self.text, self.name, self.function = text, name, module.functions[name]
        self.symbols: dict[str, int] = {}  # address, or offset in the parameter memory
        self.static_shared = self.local_size = 0
        self.globals: list[tuple[str, int, int, np.ndarray]] = []  # name, address, size, the memory
        for variable in [*module.variables, *self.function.variables]:
            self._place(variable)
        # Dynamic shared memory begins behind the static one.
        dynamic = [v.name for v in [*module.variables, *self.function.variables] if v.space == "shared" and not v.size]
        if dynamic:
            self.static_shared = -(-self.static_shared // 16) * 16
            self.symbols[dynamic[-1]] = SHARED_BASE + self.static_shared
        self.params = {p.name: p for p in self.function.params}
        self.symbols.update({p.name: p.offset for p in self.function.params})
        self.param_bytes = max([p.offset + p.size for p in self.function.params], default=0)
        self.local_registers = block_local_registers(self.function)
        self.accumulators = accumulators(self.function)
        self.of_reductions = stores_of_reductions(self.function)
        self.granule = shared_granule(self.function)
        self.blocks = [self._code(block) for block in self.function.blocks]

    def _place(self, v: Variable) -> None:
        if v.space == "shared" and v.size:
            at = -(-self.static_shared // v.align) * v.align
            self.symbols[v.name], self.static_shared = SHARED_BASE + at, at + v.size
        elif v.space == "local":
            at = -(-self.local_size // v.align) * v.align
            self.symbols[v.name], self.local_size = at, at + v.size
        elif v.space in ("global", "const"):
            memory = np.zeros(v.size + 32, np.uint8)
            skip = -memory.ctypes.data % 16
            memory[skip : skip + len(v.data or b"")] = np.frombuffer(v.data or b"", np.uint8)
            self.symbols[v.name] = memory.ctypes.data + skip
            self.globals.append((v.name, memory.ctypes.data + skip, v.size, memory))

    # -- operands

    def get(self, op: Operand, kind: str) -> Getter:
        """A reader of an operand as PTX type ``kind``."""
        return getter(op, kind, self.named)

    def named(self, name: str) -> Getter:
        """A reader of a special register, or of the address of a symbol."""
        root, _, axis = name.partition(".")
        if root == "%tid":
            return (lambda m: m.tid) if axis == "x" else (lambda m: m.zero)
        if root == "%ntid":
            return (lambda m: m.ntid) if axis == "x" else (lambda m: m.one)
        if root in ("%ctaid", "%nctaid"):
            i = _AXES[axis]
            return (lambda m: m.ctaid[i]) if root == "%ctaid" else (lambda m: m.nctaid[i])
        if name == "%laneid":
            return lambda m: m.tid & np.uint32(31)
        if name == "%warpid":
            return lambda m: m.tid >> np.uint32(5)
        if name in _ALWAYS_ZERO:
            return lambda m: m.zero
        if name in self.symbols:
            value = np.array([[self.symbols[name]]], np.uint64)
            return lambda m: value
        raise UnsupportedPTX(f"name {name!r}")

    def address(self, op: Operand) -> Getter:
        """A reader of an address as uint64."""
        if not isinstance(op, Mem):
            raise UnsupportedPTX(f"address {op!r}")
        if isinstance(op.base, Imm):
            value = np.array([[op.base.value + op.offset]], np.uint64)
            return lambda m: value
        if isinstance(op.base, Sym):
            base, offset = self.named(op.base.name), np.uint64(op.offset % (1 << 64))
            return lambda m: base(m).astype(np.uint64) + offset
        if not isinstance(op.base, Reg):
            raise UnsupportedPTX(f"address {op!r}")
        base = self.get(op.base, f"u{op.base.bits}")
        if op.base.bits == 64:
            offset = np.uint64(op.offset % (1 << 64))
            return (lambda m: base(m) + offset) if op.offset else base
        offset = np.uint32(op.offset % (1 << 32))
        return lambda m: (base(m) + offset).astype(np.uint64)

    def predicate(self, ins: Instruction) -> Getter | None:
        """A reader of an instruction's guard; None for an instruction without one."""
        if ins.predicate is None:
            return None
        i = ins.predicate.index
        return (lambda m: ~m.registers[i]) if ins.negated else (lambda m: m.registers[i])

    # -- results

    def write(self, to: list[Operand], ins: Instruction, values: Any) -> Step:
        """A step that writes what ``values(machine, mask)`` returns into registers ``to``, for the active threads."""
        guard = self.predicate(ins)
        targets: list[tuple[int, int, bool] | None] = []
        for r in to:
            if isinstance(r, Reg):
                targets.append((r.index, r.bits, r.index in self.local_registers and guard is None))
            elif isinstance(r, Sym) and r.name == "_":
                targets.append(None)
            else:
                raise UnsupportedPTX(f"destination {r!r}")

        def step(m: Any, mask: Any) -> None:
            if guard is not None:
                p = guard(m)
                mask = p if mask is None else p & mask
            for target, x in zip(targets, values(m, mask), strict=True):
                if target is not None:
                    i, bits, local = target
                    x = pattern(x, bits)
                    m.registers[i] = x if mask is None or local else np.where(mask, x, m.registers[i])

        return step

    # -- blocks

    def _code(self, block: Block) -> Code:
        code = Code()
        for ins in block.instructions:
            code.classes[class_of(ins)] += 1
            if ins.waits_for_block or ins.name in ("bra", "ret", "exit", "trap"):
                code.end = self._end(ins)
                continue
            try:
                step = build_step(self, ins)
            except UnsupportedPTX as error:
                raise UnsupportedPTX(f"{self.name}: {ins.text} ({error})") from error
            touched = {r.index for op in ins.operands for r in registers_of(op)} & self.accumulators
            if touched and ins.name != "wgmma":
                code.steps.append(_register_check(ins, touched))
            if step is not None:
                code.steps.append(step)
        return code

    def _end(self, ins: Instruction) -> End:
        guard = self.predicate(ins)
        if ins.waits_for_block:
            numbers = [x.value for x in ins.operands if isinstance(x, Imm)]
            if guard is not None or "red" in ins.parts or len(numbers) != len(ins.operands):
                raise UnsupportedPTX(ins.text)
            barrier, threads = [*numbers, None, None][:2]
            return End("barrier", ins, barrier=barrier or 0, threads=threads)
        if ins.name == "bra":
            label = ins.operands[0]
            if not isinstance(label, Sym):
                raise UnsupportedPTX(ins.text)
            return End("jump", ins, guard, target=self.function.labels[label.name])
        return End("trap" if ins.name == "trap" else "return", ins, guard)


def _register_check(ins: Instruction, registers: set[int]) -> Step:
    def check(m: Any, mask: Any) -> None:
        if m.checks:
            m.products.check_registers(ins, registers)

    return check
