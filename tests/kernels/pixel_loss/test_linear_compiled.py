"""linear_pixel_loss as compiled for GPUs: buffers of the pipelined tiles on Hopper, and cases without bias or patches.

Triton compiles only in a process that does not interpret, so compilers run in other processes.
"""

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import version
from math import ceil
from pathlib import Path
from typing import Any

import pytest
import torch

from mvlm_kernels import linear_pixel_loss, use_backend

TRITON = ".".join(version("triton").split(".")[:2])
TABLE = Path(__file__).parents[3] / "benchmarks" / "results" / f"aot-{TRITON}.json"
# The backward of smooth_l1 with a mean is that of mse: both save slopes in hidden's type.
CASES = r"linear_pixel_loss/(bf16/(l1|mse|mse/no-bias|smooth_l1/rows/normalized)|(fp16|fp32)/mse)$"
COMPILE = """
import json, sys
from mvlm_kernels import aot
found = [
    (f"{kernel.__name__} {case}", meta["num_stages"], aot.compile_launch(kernel, args, meta, "sm_90").asm["ttgir"])
    for case, kernel, args, meta, _ in aot.recorded("linear_pixel_loss", "sm_90", sys.argv[1])
    if kernel.__name__ not in aot.WITHOUT_PRODUCTS
]
print(json.dumps(found))
"""
COSTS = """
import json, sys
import triton
from mvlm_kernels import aot
table = json.load(open(sys.argv[2]))
rows = [
    aot.row("linear_pixel_loss", launch, arch)
    for arch in aot.ARCHS
    for launch in aot.recorded("linear_pixel_loss", arch, sys.argv[1])
    if launch.kernel.__name__ == "weight_gradient_kernel"
]
known = table["rows"] if table["versions"]["triton"] == triton.__version__ else None
print(json.dumps({"rows": rows, "problems": aot.find_problems(rows, known)}))
"""


def run_compiling(code: str, *arguments: str) -> Any:
    """The JSON that code prints in a process that compiles kernels."""
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"TRITON_INTERPRET": "0"})
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


@dataclass(frozen=True)
class Loop:
    """One loop over asynchronous tensor-core products."""

    buffers: dict[str, int]  # of each pipelined tile in shared memory that a product reads
    products: int  # in one iteration
    pending: int  # products that may still run when the copies of later tiles begin

    def needed(self, num_stages: int) -> int:
        """Fewest buffers with which no copy overwrites what a product may still read.

        The copy for iteration i + num_stages - 1 begins in iteration i. Until then the tiles of iterations i + 1 and
        later must stay, and so must those of the iterations whose products are pending, of which i is the latest.
        """
        return num_stages - 1 + ceil(self.pending / self.products)


def product_loops(ttgir: str) -> list[Loop]:
    """Loops with asynchronous products in Triton's GPU IR, after its pipeliner has run."""
    buffers = {
        name: int(count)
        for name, count in re.findall(r"(%\w+) = ttg\.local_alloc\b.*memdesc<(\d+)x\d+x\d+x[a-z]", ttgir)
    }
    views = dict(re.findall(r"(%\w+) = ttg\.memdesc_\w+ (%\w+)", ttgir))

    def allocation(name: str) -> str:
        while name in views:
            name = views[name]
        return name

    loops = []
    for body in re.findall(r"= scf\.for .*?scf\.yield", ttgir, re.DOTALL):
        products = re.findall(r"ttng\.warp_group_dot (%\w+), (%\w+),.*isAsync = true", body)
        operands = {allocation(name) for pair in products for name in pair}
        waits = re.findall(r"ttng\.warp_group_dot_wait .*pendings = (\d+)", body)
        if products:
            read = {name: buffers[name] for name in operands if name in buffers}
            loops.append(Loop(read, len(products), int(waits[-1])))
    return loops


@pytest.fixture(scope="module")
def hopper() -> dict[str, tuple[int, str]]:
    """Pipeline stages and GPU IR of each product kernel for sm_90, by "kernel case"."""
    return {name: (stages, ttgir) for name, stages, ttgir in run_compiling(COMPILE, CASES)}


@pytest.mark.slow
def test_copies_on_hopper_never_overwrite_tiles_of_pending_products(hopper):
    """Triton's pipeliner reserves one buffer too few for a tile that both a product and registers read.

    The weight gradient of mse and smooth_l1 with a bias had such a tile: two buffers, where the pending product needs
    three. Values stay right until a GPU's copy is faster than its product, so the test reads the compiled code.
    """
    for name, (stages, ttgir) in hopper.items():
        loops = product_loops(ttgir)
        assert len(loops) == 1, name
        assert loops[0].buffers, name
        for tile, count in loops[0].buffers.items():
            assert count >= loops[0].needed(stages), f"{name}: {tile} has {count} buffers, {loops[0]}"


@pytest.mark.slow
def test_a_missing_buffer_on_hopper_is_noticed(hopper):
    """The check above must fail on the fault that it looks for."""
    stages, ttgir = hopper["weight_gradient_kernel bf16/mse"]
    assert "memdesc<3x64x128xbf16" in ttgir
    (loop,) = product_loops(ttgir.replace("memdesc<3x64x128xbf16", "memdesc<2x64x128xbf16"))
    assert len(loop.buffers) == 2
    assert loop.pending == 1
    assert max(loop.buffers.values()) < loop.needed(stages)


@pytest.mark.slow
def test_weight_gradient_compiles_without_bias_and_without_patches():
    """A GPU compiles a loop that never runs, and the interpreter does not look at it.

    Without patches and with reduction="none" the loop over rows read the largest gradient, of which there is none.
    """
    found = run_compiling(COSTS, "linear_pixel_loss/bf16/mse/(no-bias|rows/no-patches)$", str(TABLE))
    cases = "bf16/mse/no-bias", "bf16/mse/rows/no-patches"
    wanted = {(case, arch) for case in cases for arch in ("sm_80", "sm_90", "sm_100")}
    assert {(row["case"], row["arch"]) for row in found["rows"]} == wanted
    assert found["problems"] == []


@pytest.mark.parametrize("shape", [(2, 0), (0, 3)], ids=["no patches", "no images"])
@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_linear_loss_of_no_rows_has_zero_gradients(shape, backend, reduction):
    images = torch.zeros(shape[0], 3, 4, 4, dtype=torch.uint8)
    ids = torch.zeros(shape, dtype=torch.int64)
    hidden = torch.zeros(*shape, 5, requires_grad=True)
    weight, bias = torch.ones(12, 5, requires_grad=True), torch.ones(12, requires_grad=True)
    with use_backend(backend):
        loss = linear_pixel_loss(hidden, weight, bias, images, ids, 2, kind="mse", reduction=reduction)
        loss.sum().backward()
    assert loss.shape == (() if reduction == "mean" else shape)
    for parameter in (hidden, weight, bias):
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, torch.zeros_like(parameter))
