"""Variants of launches: which are tried, and what they cost as machine code."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mvlm_benchmarks.gpu.small_cases import small_cases
from mvlm_benchmarks.gpu.variants import TILES, Options, launches_of, targets_of, variants
from mvlm_benchmarks.kernels.cases import cases

ROOT = Path(__file__).parents[3]


def test_targets_are_the_kernels_that_the_case_launches() -> None:
    found = {}
    for case in small_cases(torch.float32):
        for target in targets_of(case, case.make("cpu"), 90):
            found.setdefault(target.kernel, target)
    assert {"short_kv_forward", "short_kv_backward", "short_q_forward", "gather_kernel", "place_kernel"} <= set(found)
    assert not any(name.startswith("sum_") for name in found)
    assert found["short_kv_forward"].pass_name == "forward"
    assert found["short_kv_backward"].pass_name == "backward"
    assert found["short_kv_forward"].options.keys() >= {"BLOCK_M", "num_warps"}


def test_every_op_with_kernels_has_a_small_case_that_launches_them() -> None:
    """The sanitizers and the first checks on a GPU see no other cases."""
    wanted = {case.op for case in cases(2, torch.bfloat16) if case.has_kernels}
    launched = {c.op for c in small_cases(torch.bfloat16) if launches_of(c, c.make("meta"), 90)}
    assert launched == wanted


@pytest.mark.parametrize("few", [False, True])
@pytest.mark.parametrize("more", [{}, {"num_stages": 2, "maxnreg": 128}])
def test_first_variant_is_the_default_and_no_two_are_equal(few: bool, more: dict[str, int]) -> None:
    options: Options = {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 4, "num_stages": 1, **more}
    found = variants("short_kv_backward", options, few)
    assert found[0] == {}
    texts = [json.dumps(options | change, sort_keys=True) for change in found]
    assert len(set(texts)) == len(texts) == (3 if few else len(texts))
    tiles = {change["BLOCK_M"] for change in found if "BLOCK_M" in change}
    assert tiles <= {16, 64}
    assert few or tiles == {16, 64}
    assert not any("BLOCK_N" in change for change in found)


def test_every_tile_that_varies_exists() -> None:
    """Kernels with a tile in the table have it among their options, in the cases that launch them."""
    for case in small_cases(torch.float32):
        for target in targets_of(case, case.make("cpu"), 90):
            if target.kernel in TILES:
                assert TILES[target.kernel] in target.options


@pytest.mark.slow
def test_variants_are_compiled_without_a_gpu() -> None:
    """The first rows: defaults spill nothing. The process is ended as soon as they are there."""
    folders = [ROOT / name for name in (".", "kernels", "dataloading", "benchmarks")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, folders)), "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", "mvlm_benchmarks.gpu.variants", "--small", "--arch", "sm_90"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        rows = [json.loads(process.stdout.readline()) for _ in range(3)]
        process.kill()
    assert rows[0]["target"] == "cross_attention, B2 H1 D64 37x19, forward: short_kv_forward"
    assert rows[0]["change"] == {}
    assert (rows[0]["spill_bytes"], rows[0]["registers"] > 16) == (0, True)
    assert all("registers" in row or "error" in row for row in rows)
