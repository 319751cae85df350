"""Ahead-of-time compilation without a GPU: a slice of the cases, and the problems that the command names.

Compiling needs a process that does not interpret, so these tests run the command that users run.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow
TABLE = Path(__file__).parents[2] / "benchmarks" / "results" / "aot.json"
# One case of each kernel family at the most common shape, and the widest tiles, which would spill first.
SLICE = r"cross_attention/(bfloat16/64/32/(lengths|splits)|float16/128/128/lengths)$|gather_patches|place_tokens.*bf16"


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    file = tmp_path_factory.mktemp("aot") / "rows.json"
    command = [sys.executable, "-m", "mvlm_kernels.aot", "--select", SLICE, "--json", str(file)]
    if TABLE.exists():
        command += ["--against", str(TABLE)]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"TRITON_INTERPRET": "1"}, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return json.loads(file.read_text())["rows"]


def test_every_attention_kernel_compiles_for_every_target(rows: list[dict[str, Any]]):
    attention = {(r["kernel"], r["arch"]) for r in rows if r["op"] == "cross_attention"}
    kernels = ("short_kv_forward", "short_kv_backward", "short_q_forward", "short_q_backward", "short_q_combine")
    assert attention == {(k, a) for k in (*kernels, "sum_splits") for a in ("sm_80", "sm_90", "sm_100")}


def test_kernels_spill_nothing_and_use_tensor_cores(rows: list[dict[str, Any]]):
    assert all(r["spill_bytes"] == 0 for r in rows)
    for r in rows:
        if r["kernel"].startswith("short_") and r["kernel"] != "short_q_combine":
            assert "MMA" in r["matrix_instruction"], r
        assert 0 < r["registers"] <= 255, r


def problems_of(rows: list[dict[str, Any]], table: list[dict[str, Any]] | None = None) -> list[str]:
    # The module removes TRITON_INTERPRET from its process's environment, so it is imported in another process.
    code = "import json, sys, mvlm_kernels.aot as aot; print(json.dumps(aot.find_problems(*json.load(sys.stdin))))"
    done = subprocess.run(
        [sys.executable, "-c", code], input=json.dumps([rows, table]), capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


def test_aot_rows_name_the_pass_that_launches_the_kernel(rows: list[dict[str, Any]]):
    passes = {(r["op"], r["kernel"]): r["pass"] for r in rows}
    assert passes["cross_attention", "short_q_combine"] == "forward"
    assert passes["cross_attention", "sum_splits"] == "backward"
    assert passes["gather_patches", "reader_lists_kernel"] == "backward"
    assert passes["place_tokens", "reader_lists_kernel"] == "forward"
    assert passes["place_tokens", "column_sum_kernel"] == "backward"


def test_problems_of_compiled_kernels_are_named():
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


def test_rows_of_one_identity_are_compared_with_the_most_registers_of_the_table():
    """One case may launch a kernel several times with other sizes, as sums of partial gradients are."""
    row = {
        "op": "linear_pixel_loss", "kernel": "sum_partials_kernel", "case": "c", "dtype": "float32", "config": "",
        "arch": "sm_90", "registers": 32, "spill_bytes": 0, "stack": 0, "shared": 0, "matrix_instruction": "",
    }  # fmt: skip
    table = [row, row | {"registers": 28}]
    assert problems_of(table, table) == []
    assert len(problems_of([row | {"registers": 33}], table)) == 1


def test_update_of_the_aot_table_replaces_whole_cases():
    def rows(*cases: tuple[str, str, int]) -> list[dict[str, Any]]:
        return [{"op": "o", "case": case, "arch": arch, "registers": n} for case, arch, n in cases]

    before = rows(("a", "sm_80", 1), ("a", "sm_80", 2), ("b", "sm_80", 3), ("b", "sm_90", 4))
    compiled = rows(("b", "sm_80", 5), ("c", "sm_80", 6), ("a", "sm_80", 7))
    code = "import json, sys, mvlm_kernels.aot as aot; print(json.dumps(aot.updated(*json.load(sys.stdin))))"
    done = subprocess.run(
        [sys.executable, "-c", code], input=json.dumps([before, compiled]), capture_output=True, text=True, check=True
    )
    wanted = rows(("a", "sm_80", 7), ("b", "sm_80", 5), ("b", "sm_90", 4), ("c", "sm_80", 6))
    assert json.loads(done.stdout) == wanted
