"""Bounds of the kernels' times by instructions and by bytes: their arithmetic by hand, and no more instructions."""

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mvlm_benchmarks.kernels import bounds
from mvlm_kernels.machine_code import Instructions

ROOT = Path(__file__).parents[3]
TABLE = ROOT / "benchmarks" / "results" / "bounds.json"


def launch(name: str, grid: tuple[int, ...], numbers: dict[str, Any], **meta: int) -> tuple[Any, ...]:
    return SimpleNamespace(__name__=name, arg_names=list(numbers)), grid, tuple(numbers.values()), meta


@pytest.mark.parametrize(
    "launched, wanted",
    [
        (launch("gelu_kernel", (5, 12), {"h_ptr": None, "R": 100}, BLOCK_R=8), (13 / 5,)),  # 13 tiles of 5 programs
        (launch("place_kernel", (197, 6), {"B": 256}, BLOCK_B=8), (32,)),  # all of every program
        (launch("short_kv_forward", (3072, 2), {"q_rows": 197}, BLOCK_M=64), (2,)),  # 4 tiles of 2 splits
        (launch("gather_kernel", (12544,), {"rows": 50176}, BLOCK_R=4), ()),
        # Samples of 197 rows: 50 tiles of 5 programs, not of the 256 along the samples.
        (launch("add_norm_kernel", (256, 5), {"R": 197}, BLOCK_R=4, GROUPED=True), (10,)),
        # Six groups of heads, three of q and three of k: all in one program, or two in each of three, of which the
        # second has the last of q and the first of k.
        (launch("norm_rope_kernel", (9, 1), {"each": 6}, H=12, BLOCK_H=4), (2, 6)),
        (launch("norm_rope_kernel", (9, 3), {"each": 2}, H=12, BLOCK_H=4), (4 / 3, 2)),
        # 25 tiles of 5 programs, of three groups of heads each.
        (launch("norm_rope_backward_kernel", (5, 6), {"R": 100, "each": 3}, BLOCK_R=4), (5, 15)),
        (launch("combine_kernel", (32,), {"T": 100}, BLOCK_T=64), (2,)),
    ],
    ids=lambda x: x[0].__name__ if x and isinstance(x[0], SimpleNamespace) else "",
)
def test_trips_of_loops_by_hand(launched: Any, wanted: tuple[float, ...]) -> None:
    assert bounds.trips(*launched) == pytest.approx(wanted)


def test_instructions_of_a_pass_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """10 programs of 4 warps: 7 + 3 x 11 instructions each; then 2 of 1 warp, which have no loop: 7."""
    code = {"place_kernel": Instructions(7, (11,)), "gather_kernel": Instructions(7)}
    compiled = lambda kernel, *_: SimpleNamespace(asm={"cubin": kernel.__name__, "ptx": ""})  # noqa: E731
    monkeypatch.setattr(bounds, "instructions", code.get)
    monkeypatch.setattr(bounds, "usage", lambda cubin: {"REG": len(cubin), "STACK": 0})
    images, out = torch.empty(99, dtype=torch.uint8, device="meta"), torch.empty(5, 4, device="meta")
    launched = [
        launch("place_kernel", (5, 2), {"out": (out, 4, 1), "B": 24}, BLOCK_B=8, num_warps=4),
        launch("gather_kernel", (2,), {"images": (images, 1)}, num_warps=1),
    ]
    case = next(case for case in bounds.every_case(256) if case.op == "place_tokens")
    assert bounds.values_of(case, launched) == 20
    found = bounds.machine(launched, "sm_90", compiled)
    assert found == {"instructions": 40 * 40 + 2 * 7, "registers": len("gather_kernel"), "spilled": 0}


def test_spills_and_more_instructions_are_problems() -> None:
    def row(count: float, spilled: int = 0) -> dict[str, Any]:
        machine = {"sm_90": {"of_a_value": count, "spilled": spilled}}
        return {"op": "gelu_linear", "pass": "forward", "shape": "", "machine": machine}

    assert not list(bounds.problems([row(10.2)], [row(10)]))
    assert not list(bounds.problems([row(10.2)], []))
    assert len(list(bounds.problems([row(10.4)], [row(10)]))) == 1
    assert len(list(bounds.problems([row(10, spilled=8)], [row(10)]))) == 1


def test_bounds_of_the_committed_table_follow_from_its_counts() -> None:
    """An H100 issues 132 x 4 instructions of a warp in a cycle at 1.83 GHz, and moves 3.35 TB/s."""
    rows = json.loads(TABLE.read_text())["rows"]
    traffic = json.loads((TABLE.parent / "traffic.json").read_text())["rows"]
    moved = {(row["op"], row["pass"], row["shape"]): row["bytes_moved"] for row in traffic}
    assert len(rows) == 34
    for row in rows:
        bound, code = row["bounds"]["H100"], row["machine"]["sm_90"]
        assert bound["issue_us"] == pytest.approx(code["instructions"] / (132 * 4 * 1830), abs=0.06)
        size = moved[row["op"], row["pass"], row["shape"]]
        assert bound["memory_us"] == pytest.approx(size / 3.35e6, abs=0.06)
        assert code["of_a_value"] == pytest.approx(32 * code["instructions"] / row["values"], abs=0.006)
        assert row["bytes_of_a_value"] == pytest.approx(size / row["values"], abs=0.006)


@pytest.mark.extended
@pytest.mark.slow
def test_kernels_issue_no_more_instructions_than_in_the_table() -> None:
    if json.loads(TABLE.read_text())["versions"]["triton"] != version("triton"):
        pytest.skip("the table was made with another Triton")
    command = [sys.executable, "-m", "mvlm_benchmarks.kernels.bounds", "--arch", "sm_90", "--against", str(TABLE)]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert done.stdout.count("sm_90") == 34
