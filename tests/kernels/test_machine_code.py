"""Instructions of a kernel, counted in its machine code: beside a listing counted by hand, and beside what was written.

Kernels are compiled in a process that does not interpret.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mvlm_kernels.machine_code import Instructions, counted

LOOP = """
        Function : looped
	.headerflags	@"EF_CUDA_TEXMODE_UNIFIED EF_CUDA_64BIT_ADDRESS EF_CUDA_SM90 EF_CUDA_VIRTUAL_SM(EF_CUDA_SM90)"
        /*0000*/                   LDC R1, c[0x0][0x28] ;                /* 0x00000a00ff017b82 */
                                                                         /* 0x000fe20000000800 */
        /*0010*/                   ISETP.GE.AND P0, PT, RZ, UR4, PT ;    /* 0x00000004ff007c0c */
        /*0020*/               @P0 BRA 0x70 ;                            /* 0x0000001800340947 */
        /*0030*/                   FFMA R0, R0, R0, 1 ;                  /* 0x3f80000000007423 */
        /*0040*/                   UIADD3 UR4, UR4, -0x1, URZ ;          /* 0xffffffff04047890 */
        /*0050*/                   BRA.U UP0, 0x30 ;                     /* 0xfffffffd00f48547 */
        /*0060*/                   STG.E desc[UR6][R2.64], R0 ;          /* 0x0000000002007986 */
        /*0070*/                   EXIT ;                                /* 0x000000000000794d */
        /*0080*/              @!P1 BRA 0x30 ;                            /* 0xfffffffc00fc7947 */
        /*0090*/                   RET.REL.NODEC R2 0x0 ;                /* 0x0000000002007950 */
        /*00a0*/                   BRA 0xa0;                             /* 0xfffffffc00fc7947 */
        /*00b0*/                   NOP;                                  /* 0x0000000000007918 */
"""

KERNELS = """
import json, sys
import torch, triton, triton.language as tl
from mvlm_kernels import aot
from mvlm_kernels.machine_code import instructions

@triton.jit
def product(x):
    return tl.inline_asm_elementwise("fma.rn.f32 $0, $1, $1, 0f3F800000;", "=r,r", [x], tl.float32, False, 1)

@triton.jit
def kernel(x_ptr, n, m, OUTSIDE: tl.constexpr, INSIDE: tl.constexpr, LOOPS: tl.constexpr):
    at = tl.arange(0, 32)
    x = tl.load(x_ptr + at)
    for _ in tl.static_range(OUTSIDE):
        x = product(x)
    for _ in tl.static_range(LOOPS):
        for _ in range(n):
            for _ in tl.static_range(INSIDE):
                x = product(x)
    tl.store(x_ptr + at, x)

def count(arch, outside, inside, loops):
    args = torch.empty(32, device="meta"), 7, 8
    meta = {"OUTSIDE": outside, "INSIDE": inside, "LOOPS": loops, "num_warps": 1}
    return instructions(aot.compile_launch(kernel, args, meta, arch).asm["cubin"])

print(json.dumps([count(*case) for case in json.loads(sys.argv[1])]))
"""


def test_a_listing_is_counted_as_by_hand() -> None:
    """Three instructions in front of the loop and two behind it; three in its body. Those behind the exit are none."""
    found = counted(LOOP)
    assert found == Instructions(outside=5, loops=(3,))
    assert found.executed(2.5) == 12.5
    with pytest.raises(ValueError, match="zip"):
        found.executed()
    assert counted(LOOP.replace("BRA.U UP0, 0x30", "NOP")) == Instructions(8)
    assert counted(LOOP.replace("FFMA R0, R0, R0, 1", "NANOSLEEP 0x64")) == Instructions(8)
    with pytest.raises(ValueError, match="subroutine"):
        counted(LOOP.replace("STG.E desc[UR6][R2.64], R0", "RET.REL.NODEC R2 0x0"))
    assert counted(LOOP.replace("@P0 BRA 0x70", "@P0 BRA 0x10")) == Instructions(3, (2, 3))
    within = counted(LOOP.replace("STG.E desc[UR6][R2.64], R0", "@P0 BRA 0x10"))
    assert within == Instructions(2, (3, 3))
    assert within.executed(2, 10) == 38


@pytest.mark.extended
@pytest.mark.slow
def test_instructions_that_are_added_to_a_kernel_are_counted(tmp_path: Path) -> None:
    """Forty more products outside the loop, or inside, of a kernel with none, one and two loops.

    A loop of few instructions would be unrolled.
    """
    (tmp_path / "kernels.py").write_text(KERNELS)
    numbers = [(4, 0, 0), (4, 200, 1), (44, 200, 1), (4, 240, 1), (4, 200, 2)]
    cases = [(arch, *number) for arch in ("sm_80", "sm_120") for number in numbers]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(tmp_path / "kernels.py"), json.dumps(cases)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    counts = json.loads(done.stdout)
    for none, one, outside, inside, two in (counts[:5], counts[5:]):
        assert none[1] == []
        assert 200 < one[1][0] < 210
        assert (outside[0] - one[0], outside[1]) == (40, one[1])
        assert (inside[0] - one[0], inside[1][0] - one[1][0]) == (0, 40)
        assert len(two[1]) == 2
        assert all(200 < body < 210 for body in two[1])
