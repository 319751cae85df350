"""Kernels written as PTX: faults that no compiler makes, single instructions, and text that is not understood."""

import struct

import numpy as np
import pytest
import torch

from triton_proof.machine.machine import Machine
from triton_proof.program.program import Program
from triton_proof.ptx.parser import parse
from triton_proof.ptx.syntax import Imm, Reg, UnsupportedPTX
from triton_proof.report import Launch
from triton_proof.scalar import arithmetic

HEAD = ".version 8.0\n.target sm_80\n.address_size 64\n"


def run(body: str, threads: int = 32, memory: np.ndarray | None = None) -> Launch:
    """Launch one block of a kernel that gets the address of ``memory`` in %rd1."""
    text = f"""{HEAD}.visible .entry kernel(.param .u64 p) .reqntid {threads}
{{
.reg .pred %p<4>;
.reg .b32 %r<9>;
.reg .b64 %rd<4>;
ld.param.u64 %rd1, [p];
{body}
}}
"""
    machine, address = Machine(Program(text, "kernel"), "sm_80", threads // 32, 0), 0
    if memory is not None:
        address = memory.ctypes.data
        machine.memory.add(address, address + memory.nbytes, "memory", memory.itemsize)
    return machine.run((1, 1, 1), struct.pack("<Q", address))


def kinds(launch: Launch) -> set[str]:
    return {f.kind for f in launch.findings}


def test_threads_that_never_come_to_a_barrier() -> None:
    skip = "mov.u32 %r1, %tid.x;\nsetp.lt.u32 %p1, %r1, 32;\n@%p1 bra $L;\nbar.sync 0, 64;\n$L:\nret;"
    assert kinds(run(skip, threads=64)) == {"barrier"}
    assert not kinds(run(skip.replace("@%p1 bra $L;\n", ""), threads=64))


def test_shuffle_by_a_part_of_a_warp() -> None:
    part = (
        "mov.u32 %r1, %tid.x;\nsetp.lt.u32 %p1, %r1, 16;\n@%p1 bra $L;\n"
        "shfl.sync.bfly.b32 %r2, %r1, 1, 31, -1;\n$L:\nret;"
    )
    assert kinds(run(part)) == {"warp"}
    assert not kinds(run(part.replace("@%p1 bra $L;\n", "")))


@pytest.mark.parametrize("offset, wanted", [(0, set()), (4, {"misaligned"}), (64, {"out-of-bounds"})])
def test_vector_load_of_misaligned_and_foreign_addresses(offset: int, wanted: set[str]) -> None:
    whole = np.zeros(64, np.int32)
    memory = whole[-whole.ctypes.data % 64 // 4 :][:16]
    assert kinds(run(f"ld.global.v4.u32 {{%r1, %r2, %r3, %r4}}, [%rd1 + {offset}];\nret;", memory=memory)) == wanted


def test_trap_is_reported() -> None:
    assert kinds(run("trap;\nret;")) == {"trap"}


def test_names_of_scopes_hide_those_outside() -> None:
    memory = np.zeros(32, np.int32)
    body = """mov.u32 %r1, 7;
{
.reg .b32 %r<2>;
mov.u32 %r1, 8;
}
mov.u32 %r2, %tid.x;
mul.wide.u32 %rd2, %r2, 4;
add.s64 %rd3, %rd1, %rd2;
st.global.u32 [%rd3], %r1;
ret;"""
    assert not kinds(run(body, memory=memory))
    assert (memory == 7).all()


@pytest.mark.parametrize(
    "text",
    ["mov.b32 %r1, {", "tensor.load [%rd1, {%r1, %r2}];", "frobnicate.u32 %r1, %r2;", "cvt.rp.f32.f64 %r1, %rd1;"],
)
def test_text_that_is_not_understood_is_refused(text: str) -> None:
    with pytest.raises(UnsupportedPTX):
        run(text)


INTEGERS = [0, 1, 5, 31, 32, 0x7FFFFFFF, 0x80000000, 0x80000001, 0xDEADBEEF, 0xFFFFFFFF]


def scalar(name: str, *operands: list[int], bits: int = 32) -> list[int]:
    """Results of one instruction on lists of register patterns; a list of one is a literal."""
    read = {f"%r{i}": np.array([x], f"uint{bits}") for i, x in enumerate(operands, 1) if len(x) > 1}
    names = [f"%r{i}" if len(x) > 1 else str(x[0]) for i, x in enumerate(operands, 1)]
    text = f"{HEAD}.entry f(.param .u32 a)\n{{\n.reg .b{bits} %r<9>;\n{name} %r8, {', '.join(names)};\nret;\n}}\n"
    ins, _ = parse(text).functions["f"].blocks[0].instructions

    def get(op, kind):
        if isinstance(op, Imm):
            value = np.array([[op.value & 0xFFFFFFFF]], np.uint32)
            return lambda m: value
        assert isinstance(op, Reg)
        dtype = {"s": f"int{bits}", "u": f"uint{bits}", "b": f"uint{bits}"}[kind[0]]
        return lambda m: read[op.name].view(dtype)

    return [int(x) & (2**bits - 1) for x in arithmetic.build(ins, get)(None).reshape(-1)]


def signed(x: int) -> int:
    return x - 2**32 if x >= 2**31 else x


def test_bit_instructions_equal_python_integers() -> None:
    xs, mask = INTEGERS, 0xFFFFFFFF
    for n in (0, 1, 31, 32, 40):
        assert scalar("shl.b32", xs, [n]) == [x << n & mask for x in xs]
        assert scalar("shr.u32", xs, [n]) == [x >> n for x in xs]
        assert scalar("shr.s32", xs, [n]) == [signed(x) >> n & mask for x in xs]
    assert scalar("popc.b32", xs) == [x.bit_count() for x in xs]
    assert scalar("clz.b32", xs) == [32 - x.bit_length() for x in xs]
    assert scalar("brev.b32", xs) == [int(f"{x:032b}"[::-1], 2) for x in xs]
    assert scalar("bfe.u32", xs, [4], [8]) == [x >> 4 & 0xFF for x in xs]
    assert scalar("mul.hi.u32", xs, xs[::-1]) == [x * y >> 32 for x, y in zip(xs, xs[::-1], strict=True)]
    wanted = [signed(x) * signed(y) >> 32 & mask for x, y in zip(xs, xs[::-1], strict=True)]
    assert scalar("mul.hi.s32", xs, xs[::-1]) == wanted
    majority = [x & y | x & z | y & z for x, y, z in zip(xs, xs[3:] + xs[:3], xs[5:] + xs[:5], strict=True)]
    assert scalar("lop3.b32", xs, xs[3:] + xs[:3], xs[5:] + xs[:5], [0xE8]) == majority
    assert scalar("prmt.b32", xs, xs[::-1], [0x0123]) == [int.from_bytes(x.to_bytes(4, "little")) for x in xs]


def test_division_truncates() -> None:
    xs, ys = INTEGERS[1:], [7, -7 & 0xFFFFFFFF, 3, 1, 2, 5, 9, 10, 11]
    quotients = [int(abs(signed(x)) // abs(signed(y))) for x, y in zip(xs, ys, strict=True)]
    quotients = [-q if (signed(x) < 0) != (signed(y) < 0) else q for q, x, y in zip(quotients, xs, ys, strict=True)]
    assert scalar("div.s32", xs, ys) == [q & 0xFFFFFFFF for q in quotients]
    assert scalar("div.u32", xs, ys) == [x // y for x, y in zip(xs, ys, strict=True)]
    assert scalar("rem.u32", xs, ys) == [x % y for x, y in zip(xs, ys, strict=True)]


def test_multiply_add_rounds_once() -> None:
    """a * b + c lies next to a tie of float32, where rounding the float64 sum again would go to the wrong side."""
    cases = [(1.0 + 2**-12, 1.0 + 2**-12, 2**-24 + 2**-60), (1.0 + 2**-23, 1.0, 2**-24), (3.0, 1 / 3, -1.0)]
    a, b, c = (np.array([x], np.float32) for x in zip(*cases, strict=True))
    text = f"{HEAD}.entry f(.param .u32 a)\n{{\n.reg .b32 %r<5>;\nfma.rn.f32 %r4, %r1, %r2, %r3;\nret;\n}}\n"
    ins, _ = parse(text).functions["f"].blocks[0].instructions
    values = dict(zip(("%r1", "%r2", "%r3"), (a, b, c), strict=True))
    got = arithmetic.build(ins, lambda op, kind: lambda m: values[op.name])(None)  # pyright: ignore
    from fractions import Fraction

    for x, y, z, out in zip(a[0], b[0], c[0], got[0], strict=True):
        exact = Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))
        near = [np.nextafter(out, np.float32(d)) for d in (-np.inf, np.inf)]
        assert all(abs(Fraction(float(out)) - exact) <= abs(Fraction(float(n)) - exact) for n in near)


@pytest.mark.parametrize("kind", ["s16x2", "u16x2"])
@pytest.mark.parametrize("name", ["add", "min", "max"])
def test_pairs_of_16_bit_integers_wrap_around_each_for_itself(name: str, kind: str) -> None:
    draw = torch.Generator().manual_seed(1)
    pairs = [torch.randint(0, 2**32, (64,), generator=draw).tolist() for _ in range(2)]
    sign = (lambda h: h - 2**16 if h >= 2**15 else h) if kind[0] == "s" else (lambda h: h)
    function = {"add": lambda p, q: p + q, "min": min, "max": max}[name]
    wanted = [
        sum((function(sign(x >> n & 0xFFFF), sign(y >> n & 0xFFFF)) & 0xFFFF) << n for n in (0, 16))
        for x, y in zip(*pairs, strict=True)
    ]
    assert scalar(f"{name}.{kind}", *pairs) == wanted
