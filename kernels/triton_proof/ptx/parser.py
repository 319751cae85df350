"""From PTX text to basic blocks of parsed instructions.

Only text as a compiler writes it is understood. A statement ends with ``;``. Braces around statements are scopes, and
braces inside a statement are vector operands. Debug sections after a function are skipped.
"""

import re

from triton_proof.ptx.declarations import literal, location, parameters, split, threads_of, variable
from triton_proof.ptx.syntax import (
    TYPE_BITS,
    Block,
    Function,
    Instruction,
    Mem,
    Module,
    Not,
    Operand,
    Pair,
    Place,
    Reg,
    Sym,
    UnsupportedPTX,
    Variable,
    Vec,
)

_LABEL = re.compile(r"^([$%A-Za-z_][\w$.]*)\s*:")


def parse(text: str) -> Module:
    """Parse a PTX module. Raises UnsupportedPTX for text that is not understood."""
    plain = re.sub(r"/\*.*?\*/", " ", text, flags=re.DOTALL)
    lines = [line.split("//", 1)[0].rstrip() for line in plain.splitlines()]
    files = {int(m[1]): m[2] for m in re.finditer(r'\.file\s+(\d+)\s+"([^"]*)"', text)}
    module, i = Module({}, [], files), 0
    while i < len(lines):
        line = lines[i].strip()
        if re.match(r"(\.visible\s+|\.weak\s+)*\.(entry|func)\b|\.extern\s+\.func", line):
            i = _function(lines, i, module)
        elif line.startswith(".section"):
            i = _end_of_section(lines, i)
        elif re.match(r"(\.(visible|extern|weak|common)\s+)*\.(shared|global|const)\b", line):
            while ";" not in line and i + 1 < len(lines):
                i += 1
                line += " " + lines[i].strip()
            module.variables.append(variable(line.split(";", 1)[0]))
            i += 1
        else:
            i += 1
    return module


def _end_of_section(lines: list[str], i: int) -> int:
    depth, started = 0, False
    while i < len(lines) and not (started and depth <= 0):
        depth += lines[i].count("{") - lines[i].count("}")
        started = started or "{" in lines[i]
        i += 1
    return i


def _function(lines: list[str], i: int, module: Module) -> int:
    """Parse the function that begins at line i into ``module``, and return the line after it."""
    header = ""
    while "{" not in lines[i]:
        header += " " + lines[i].strip()
        if ";" in lines[i]:  # a declaration without a body
            return i + 1
        i += 1
    header += " " + lines[i].split("{", 1)[0]
    name = re.search(r"\.(?:entry|func)\s+(?:\([^)]*\)\s*)?([\w$.]+)", header)
    if name is None:
        raise UnsupportedPTX(f"function {header!r}")
    body, depth, rest = [], 1, lines[i].split("{", 1)[1]
    while True:
        depth += rest.count("{") - rest.count("}")
        if depth <= 0:
            body.append(rest.rsplit("}", 1)[0])
            break
        body.append(rest)
        i += 1
        if i == len(lines):
            raise UnsupportedPTX(f"function {name[1]} has no end")
        rest = lines[i]
    reader = _BodyReader(module.files)
    reader.read(body)
    blocks, labels = reader.basic_blocks()
    module.functions[name[1]] = Function(
        name[1], parameters(header), reader.registers, reader.variables, blocks, labels, threads_of(header)
    )
    return i + 1


class _BodyReader:
    """Reader of a function's body. Registers live in scopes; the innermost declaration of a name counts."""

    def __init__(self, files: dict[int, str]) -> None:
        self.files = files
        self.registers: list[Reg] = []
        self.variables: list[Variable] = []
        self._scopes: list[dict[str, Reg]] = [{}]
        self._items: list[str | Instruction] = []  # labels and instructions, in order
        self._where: Place = ()

    def read(self, lines: list[str]) -> None:
        pending = ""
        for line in lines:
            text = line.strip()
            where = location(text, self.files)
            if where is not None:
                self._where = where or self._where
            elif text:
                pending = self._statements(f"{pending} {text}")
        if pending.strip():
            raise UnsupportedPTX(f"unfinished statement {pending!r}")

    def _statements(self, text: str) -> str:
        """Read the statements of ``text`` and return the unfinished rest."""
        while True:
            text = text.lstrip()
            label = _LABEL.match(text)
            if not text:
                return ""
            if label and not text.startswith("::", label.end() - 1):
                self._items.append(label[1])
                text = text[label.end() :]
            elif text[0] == "{":
                self._scopes.append({})
                text = text[1:]
            elif text[0] == "}":
                self._scopes.pop()
                text = text[1:]
            elif ";" in text:
                statement, text = text.split(";", 1)
                self._statement(statement.strip())
            else:
                return text

    def _statement(self, text: str) -> None:
        if not text or text.startswith((".pragma", ".callprototype")):
            return
        if text.startswith(".reg"):
            self._declare_registers(text)
        elif text.startswith((".local", ".shared")):
            self.variables.append(variable(text))
        elif text.startswith("."):
            raise UnsupportedPTX(f"statement {text!r}")
        else:
            self._instruction(text)

    def _declare_registers(self, text: str) -> None:
        found = re.match(r"\.reg\s+\.(\w+)\s+(.*)", text, re.DOTALL)
        if found is None or found[1] not in TYPE_BITS:
            raise UnsupportedPTX(f"statement {text!r}")
        for name in (x.strip() for x in found[2].split(",")):
            many = re.match(r"(.*)<(\d+)>$", name)
            for one in [f"{many[1]}{n}" for n in range(int(many[2]))] if many else [name]:
                self._scopes[-1][one] = Reg(len(self.registers), TYPE_BITS[found[1]], one)
                self.registers.append(self._scopes[-1][one])

    def _instruction(self, text: str) -> None:
        predicate, negated, rest = None, False, text
        guard = re.match(r"@(!?)\s*([%$\w.]+)\s+(.*)", text, re.DOTALL)
        if guard:
            negated, predicate, rest = bool(guard[1]), self._register(guard[2]), guard[3]
            if predicate is None:
                raise UnsupportedPTX(f"predicate of {text!r}")
        opcode, *operands = rest.split(maxsplit=1)
        parsed = [self._operand(x) for x in split(operands[0] if operands else "")]
        self._items.append(Instruction(opcode, parsed, predicate, negated, " ".join(text.split()), self._where))

    def _register(self, name: str) -> Reg | None:
        return next((scope[name] for scope in reversed(self._scopes) if name in scope), None)

    def _operand(self, text: str) -> Operand:
        text = text.strip()
        if text.startswith("{"):
            return Vec(tuple(self._operand(x) for x in split(text[1:-1])))
        if text.startswith("["):
            return self._address(text[1:-1].strip())
        if "|" in text:
            first, second = text.split("|")
            return Pair(self._operand(first), self._operand(second))
        if text.startswith("!"):
            return Not(self._operand(text[1:]))
        return self._register(text) or literal(text) or Sym(text)

    def _address(self, text: str) -> Mem:
        if "," in text:
            raise UnsupportedPTX(f"address [{text}]")
        found = re.match(r"^(.*?)\s*\+\s*(-?\w+)$", text)
        offset = literal(found[2]) if found else None
        if found and offset is not None:
            return Mem(self._operand(found[1]), offset.value)
        return Mem(self._operand(text), 0)

    def basic_blocks(self) -> tuple[list[Block], dict[str, int]]:
        """Blocks, and the block of each label that is jumped to."""
        jumps = [x for x in self._items if isinstance(x, Instruction) and x.name in ("bra", "brx")]
        targets = {o.name for x in jumps for o in x.operands if isinstance(o, Sym)}
        blocks, labels, ended = [Block(0, "entry")], {}, False
        for item in self._items:
            if isinstance(item, str):
                if item in targets:
                    if blocks[-1].instructions or ended:
                        blocks.append(Block(len(blocks), item))
                    labels[item], ended = len(blocks) - 1, False
                continue
            if ended:
                blocks.append(Block(len(blocks), ""))
            blocks[-1].instructions.append(item)
            ended = item.name in ("bra", "ret", "exit", "trap") or item.waits_for_block
        if ended:
            blocks.append(Block(len(blocks), "end"))
        return blocks, labels
