"""Parts of a PTX program: operands, instructions, variables, blocks and functions."""

from dataclasses import dataclass, field

# Width in bits of every type that the emulator knows; a predicate has 1.
TYPE_BITS = {
    "pred": 1, "b8": 8, "u8": 8, "s8": 8, "b16": 16, "u16": 16, "s16": 16, "f16": 16, "bf16": 16,
    "b32": 32, "u32": 32, "s32": 32, "f32": 32, "tf32": 32, "f16x2": 32, "bf16x2": 32, "u16x2": 32, "s16x2": 32,
    "b64": 64, "u64": 64, "s64": 64, "f64": 64,
}  # fmt: skip


class UnsupportedPTX(NotImplementedError):
    """Text that the emulator does not execute. The message names the instruction or the statement."""


@dataclass(frozen=True)
class Reg:
    """Register: its place in the register file, and its width in bits."""

    index: int
    bits: int
    name: str


@dataclass(frozen=True)
class Imm:
    """Literal. For ``0f`` and ``0d`` literals ``value`` is the bit pattern and ``float_bits`` its width, else 0."""

    value: int
    float_bits: int = 0


@dataclass(frozen=True)
class Sym:
    """Name: a label, a special register such as ``%tid.x``, a parameter, or a variable in memory."""

    name: str


@dataclass(frozen=True)
class Vec:
    """Vector operand ``{a, b}``."""

    items: tuple["Operand", ...]


@dataclass(frozen=True)
class Mem:
    """Address ``[base + offset]``."""

    base: "Operand"
    offset: int


@dataclass(frozen=True)
class Pair:
    """Two results ``a|b``."""

    first: "Operand"
    second: "Operand"


@dataclass(frozen=True)
class Not:
    """Negated predicate ``!p``."""

    of: "Operand"


Operand = Reg | Imm | Sym | Vec | Mem | Pair | Not
Place = tuple[tuple[str, int], ...]  # (file, line) of the source, innermost first


@dataclass
class Instruction:
    """One instruction. ``predicate`` guards it, negated if ``negated``."""

    opcode: str
    operands: list[Operand]
    predicate: Reg | None
    negated: bool
    text: str
    where: Place

    def __post_init__(self) -> None:
        self.parts = self.opcode.split(".")
        self.name = self.parts[0]

    @property
    def waits_for_block(self) -> bool:
        """True if threads may have to wait here for others of their block."""
        return self.opcode.startswith(("bar.sync", "barrier.sync", "barrier.cta.sync", "bar.red", "barrier.cta.red"))


@dataclass
class Variable:
    """Memory declared in the text: ``.shared``, ``.local``, ``.global`` or ``.const``. Size 0 means ``extern []``."""

    name: str
    space: str
    align: int
    size: int
    data: bytes | None = None


@dataclass
class Param:
    """Parameter of a kernel, ``offset`` bytes into the parameter memory."""

    name: str
    type: str
    size: int
    align: int
    offset: int = 0


@dataclass
class Block:
    """Basic block: instructions that run one after the other."""

    index: int
    label: str
    instructions: list[Instruction] = field(default_factory=list)


@dataclass
class Function:
    """Kernel. ``labels`` gives the block of a label; ``max_threads`` is ``.reqntid``, or 1 where it is not given."""

    name: str
    params: list[Param]
    registers: list[Reg]
    variables: list[Variable]
    blocks: list[Block]
    labels: dict[str, int]
    max_threads: int


@dataclass
class Module:
    """All functions and variables of a text. ``files`` names the source files by their numbers."""

    functions: dict[str, Function]
    variables: list[Variable]
    files: dict[int, str]
