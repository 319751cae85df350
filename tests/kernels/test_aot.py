"""Ahead-of-time compilation without a GPU: a slice of the cases, and the problems that the command names.

Compiling needs a process that does not interpret, so these tests run the command that users run.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow
TRITON = ".".join(version("triton").split(".")[:2])
TABLE = Path(__file__).parents[2] / "benchmarks" / "results" / f"aot-{TRITON}.json"
# One case of each kernel family at the most common shape, and the widest tiles, which would spill first.
SLICE = (
    r"cross_attention/(bfloat16/64/32/(index|splits)|float16/128/128/lengths)$|"
    r"gather_patches/(bf16/p16|uint8-bf16/p14)$|place_tokens/bf16/(visible|both/fp32-parameters)$"
)


# Two families of matrix instructions. sm_120 has that of sm_80, its tiles and the least shared memory.
ARCHS = ("sm_90", "sm_120")


SERVER = """
import importlib, json, os, sys
answers = os.fdopen(os.dup(1), "w", buffering=1)
os.dup2(2, 1)
for line in sys.stdin:
    module, name, args = json.loads(line)
    answers.write(json.dumps(getattr(importlib.import_module(module), name)(*args)) + "\\n")
"""


@pytest.fixture(scope="module")
def call() -> Iterator[Callable[..., Any]]:
    """Calls a function of a module in a process that does not interpret kernels, which all tests share."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    with subprocess.Popen(
        [sys.executable, "-c", SERVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
        env=environment,
    ) as process:
        asking, answers = process.stdin, process.stdout
        assert asking is not None
        assert answers is not None

        def do(module: str, name: str, *args: Any) -> Any:
            asking.write(json.dumps([module, name, args]) + "\n")
            return json.loads(answers.readline())

        yield do
        asking.close()


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    file = tmp_path_factory.mktemp("aot") / "rows.json"
    command = [sys.executable, "-m", "mvlm_kernels.aot", "--select", SLICE, "--json", str(file)]
    command += [word for arch in ARCHS for word in ("--arch", arch)]
    if TABLE.exists():
        command += ["--against", str(TABLE)]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"TRITON_INTERPRET": "1"}, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return json.loads(file.read_text())["rows"]


@pytest.mark.extended
def test_every_attention_kernel_compiles_for_every_target(rows: list[dict[str, Any]]):
    attention = {(r["kernel"], r["arch"]) for r in rows if r["op"] == "cross_attention"}
    kernels = (
        "short_kv_forward", "short_kv_backward", "short_q_forward", "short_q_backward", "short_q_combine",
        "short_q_backward_dq", "long_kv_backward",
    )  # fmt: skip
    assert attention == {(k, a) for k in (*kernels, "sum_splits") for a in ARCHS}


@pytest.mark.extended
def test_kernels_spill_nothing_and_use_tensor_cores(rows: list[dict[str, Any]]):
    assert all(r["spill_bytes"] == 0 for r in rows)
    for r in rows:
        if r["kernel"].startswith("short_") and r["kernel"] != "short_q_combine":
            assert "MMA" in r["matrix_instruction"], r
        assert 0 < r["registers"] <= 255, r


def test_float32_operands_are_rounded_to_tf32():
    """A matrix instruction cuts 13 bits off. An instruction in front of it rounds them."""
    code = """
import torch
from mvlm_kernels import aot
from mvlm_kernels.aot import compile_launch
for launch in aot.recorded("cross_attention", "sm_90", "float32/64/32/lengths"):
    ptx = compile_launch(launch.kernel, launch.args, launch.meta, "sm_90").asm["ptx"]
    print(launch.kernel.__name__, ptx.count("cvt.rna.tf32.f32") > 0, "tf32.tf32" in ptx)
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    families = ("short_kv_forward", "short_kv_backward", "short_q_forward", "short_q_backward")
    assert sorted(done.stdout.splitlines()) == sorted(f"{name} True True" for name in families)


def test_problems_of_compiled_kernels_are_named(call):
    problems_of = partial(call, "mvlm_kernels.aot", "find_problems")
    good = {
        "op": "cross_attention", "kernel": "short_kv_forward", "case": "c", "dtype": "bfloat16", "config": "BLOCK_M=32",
        "arch": "sm_80", "registers": 100, "spill_bytes": 0, "stack": 0, "shared": 1000, "matrix_instruction": "HMMA",
    }  # fmt: skip
    bad = [good | {"spill_bytes": 8}, good | {"shared": 170_000}, good | {"matrix_instruction": ""}]
    found = problems_of([good, *bad, good | {"registers": 101}], [good])
    assert [text.split(": ")[1] for text in found] == [
        "spills 8 bytes",
        "170000 bytes of shared memory, limit 166912",
        "no tensor-core instruction",
        "101 registers, 100 in the table",
    ]
    assert problems_of([good], [good]) == []
