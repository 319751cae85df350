"""Declarations of PTX: variables, parameters, literals, and the places of the source."""

import re

from triton_proof.ptx.syntax import TYPE_BITS, Imm, Param, Place, UnsupportedPTX, Variable

_LOCATION = re.compile(r"\.loc\s+(\d+)\s+(\d+)\s+\d+(.*)")
_INLINED = re.compile(r"inlined_at\s+(\d+)\s+(\d+)\s+\d+")
_LITERALS = (  # pattern, number of leading characters to leave out, base, float_bits
    (re.compile(r"-?\d+U?"), 0, 10, 0),
    (re.compile(r"-?0[xX][0-9a-fA-F]+U?"), 0, 16, 0),
    (re.compile(r"-?0[bB][01]+"), 0, 2, 0),
    (re.compile(r"0[fF][0-9a-fA-F]{8}"), 2, 16, 32),
    (re.compile(r"0[dD][0-9a-fA-F]{16}"), 2, 16, 64),
)


def size_of(kind: str) -> int:
    """Bytes of a PTX type in memory."""
    return max(1, TYPE_BITS[kind] // 8)


def variable(statement: str) -> Variable:
    """A variable, from ``.global .align 1 .b8 name[11] = {..}`` or ``.extern .shared .align 16 .b8 name[]``."""
    head, _, init = statement.partition("=")
    space = re.search(r"\.(shared|local|global|const)\b", head)
    align = re.search(r"\.align\s+(\d+)", head)
    kind = re.search(r"\.([bsuf]\d+)\s+(?:\.ptr\s+)?([\w$]+)\s*((?:\[\s*\d*\s*\])*)", head)
    if not (space and kind):
        raise UnsupportedPTX(f"declaration {statement!r}")
    size, count = size_of(kind[1]), 1
    for n in re.findall(r"\[\s*(\d*)\s*\]", kind[3]):
        count *= int(n) if n else 0
    data = None
    if init:
        values = [v.strip() for v in init.strip().strip("{}").split(",") if v.strip()]
        try:
            data = b"".join(int(v, 0).to_bytes(size, "little", signed=int(v, 0) < 0) for v in values)
        except ValueError as error:
            raise UnsupportedPTX(f"initialiser {statement!r}") from error
        data = data.ljust(size * count, b"\0")
    return Variable(kind[2], space[1], int(align[1]) if align else size, size * count, data)


def parameters(header: str) -> list[Param]:
    """Parameters in the header of a function, with their offsets in the parameter memory."""
    params, offset = [], 0
    for m in re.finditer(r"\.param\s+((?:\.\w+\s+(?:\d+\s+)?)*)([\w$.]+)(\s*\[\s*(\d+)\s*\])?", header):
        kind = re.search(r"\.([bsuf]\d+)", m[1])
        if kind is None:
            raise UnsupportedPTX(f"parameter {m[0]!r}")
        align = re.match(r"\s*\.align\s+(\d+)", m[1])
        size = size_of(kind[1]) * (int(m[4]) if m[4] else 1)
        natural = int(align[1]) if align and m[4] else size_of(kind[1])
        offset = -(-offset // natural) * natural
        params.append(Param(m[2], kind[1], size, natural, offset))
        offset += size
    return params


def threads_of(header: str) -> int:
    """Number of threads of a block by ``.reqntid`` or ``.maxntid``; 1 where the header says none."""
    threads = 1
    bound = re.search(r"\.(?:reqntid|maxntid)\s+([\d\s,]+)", header)
    for n in bound[1].split(",") if bound else ():
        threads *= int(n)
    return threads


def literal(text: str) -> Imm | None:
    """The literal that ``text`` spells; None for a name."""
    for pattern, skip, base, float_bits in _LITERALS:
        if pattern.fullmatch(text):
            return Imm(int(text[skip:].rstrip("U"), base), float_bits)
    return None


def location(text: str, files: dict[int, str]) -> Place | None:
    """Places of a ``.loc`` line, innermost first; () for line 0, which means unknown; None for any other line."""
    found = _LOCATION.match(text)
    if not found:
        return None
    if found[2] == "0":
        return ()
    chain = [(found[1], found[2]), *_INLINED.findall(found[3])]
    return tuple((files.get(int(file), "?"), int(line)) for file, line in chain)


def split(text: str) -> list[str]:
    """The parts of a list between commas, but for commas in brackets."""
    out, depth, current = [], 0, ""
    for character in text:
        depth += (character in "{[(") - (character in "}])")
        if character == "," and depth == 0:
            out.append(current.strip())
            current = ""
        else:
            current += character
    return [*out, current.strip()] if current.strip() else out
