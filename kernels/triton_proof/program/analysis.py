"""Facts about a kernel that make it faster to execute."""

from triton_proof.program.steps import SPACES
from triton_proof.ptx.syntax import TYPE_BITS, Function, Instruction, Mem, Not, Operand, Pair, Reg, Vec

# Instructions that move no data and order nothing that the emulator follows.
NO_EFFECT = ("fence", "membar", "griddepcontrol", "nanosleep", "prefetch", "prefetchu", "discard", "setmaxnreg",
             "applypriority")  # fmt: skip
_WITHOUT_RESULT = ("st", "bra", "ret", "exit", "trap", "bar", "barrier", "red", "stmatrix", "cp", *NO_EFFECT)

_STEPS, _FLOATS = ("add", "fma", "max", "min", "mul"), ("f16", "f16x2", "bf16", "bf16x2", "f32", "f64")
"""Instructions that are a step of a reduction, and their types."""


def registers_of(op: Operand) -> list[Reg]:
    """Every register that an operand names."""
    match op:
        case Reg():
            return [op]
        case Vec(items):
            return [r for x in items for r in registers_of(x)]
        case Mem(base, _):
            return registers_of(base)
        case Pair(first, second):
            return registers_of(first) + registers_of(second)
        case Not(of):
            return registers_of(of)
    return []


def destinations(ins: Instruction) -> list[Reg]:
    """Registers that an instruction writes."""
    without = ins.name in _WITHOUT_RESULT or (ins.name == "wgmma" and "mma_async" not in ins.parts)
    return [] if without or not ins.operands else registers_of(ins.operands[0])


def block_local_registers(function: Function) -> set[int]:
    """Registers that live inside one block and are written there, unguarded, before they are read.

    Threads that do not execute the block never see them, so a write needs no mask.
    """
    homes: dict[int, set[int]] = {}
    masked: set[int] = set()
    for block in function.blocks:
        written: set[int] = set()
        for ins in block.instructions:
            results = [r.index for r in destinations(ins)]
            sources = ins.operands[1:] if results else ins.operands
            reads = [r.index for op in sources for r in registers_of(op)]
            reads += results if ins.name == "wgmma" else []  # which adds to its destination
            reads += [] if ins.predicate is None else [ins.predicate.index]
            masked |= {r for r in reads if r not in written}
            if ins.predicate is not None:
                masked |= {r for r in results if r not in written}
            for r in (*reads, *results):
                homes.setdefault(r, set()).add(block.index)
            written.update(results)
    return {r for r, where in homes.items() if len(where) == 1} - masked


def accumulators(function: Function) -> set[int]:
    """Registers that asynchronous products write."""
    products = (x for block in function.blocks for x in block.instructions if x.name == "wgmma")
    return {r.index for ins in products for r in destinations(ins)}


def stores_of_reductions(function: Function) -> set[int]:
    """`id()` of each store instruction that stores a sum, or another reduction of floats, over the lanes of a warp.

    All lanes should have the same value, and do but for the order in which each took the operands.
    """
    instructions = [ins for block in function.blocks for ins in block.instructions]
    exchanged = {r.index for ins in instructions if ins.opcode.startswith("shfl.sync.bfly") for r in destinations(ins)}
    reduced: set[int] = set()
    for ins in instructions:
        read = {r.index for op in ins.operands[1:] for r in registers_of(op)}
        step = ins.name in _STEPS and type_of(ins) in _FLOATS and read & exchanged
        if step or (ins.name in ("mov", "cvt") and read & reduced):
            reduced |= {r.index for r in destinations(ins)}
    stores = [ins for ins in instructions if ins.name == "st"]
    return {id(ins) for ins in stores if {r.index for r in registers_of(ins.operands[1])} & reduced}


def shared_granule(function: Function) -> int:
    """Bytes of the narrowest access to shared memory, at most 4."""
    least = 4
    for ins in (ins for block in function.blocks for ins in block.instructions):
        if ins.name in ("ld", "st", "atom", "red") and any(p.startswith("shared") for p in ins.parts):
            least = min(least, max(1, TYPE_BITS[type_of(ins)] // 8))
    return least


def type_of(ins: Instruction) -> str:
    """The last type in an instruction's name."""
    return [p for p in ins.parts if p in TYPE_BITS][-1]


def space_of(ins: Instruction) -> str:
    """Memory space of a load or store; "generic" where the name has none."""
    return next((s for p in ins.parts[1:] for s in SPACES if p == s or p.startswith(f"{s}::")), "generic")
