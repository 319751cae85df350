"""Calls for Nsight Compute and compute-sanitizer: the cases that they make."""

import subprocess
import sys

import pytest
import torch

from mvlm_benchmarks.gpu.profile import KERNELS
from mvlm_benchmarks.gpu.small_calls import chosen_cases


@pytest.mark.parametrize("paper", [False, True])
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_profile_of_a_kernel_runs_one_case_that_launches_it(kernel: str, paper: bool) -> None:
    (case,) = chosen_cases(KERNELS[kernel], kernel, paper, torch.bfloat16)
    assert case.op == KERNELS[kernel]
    assert case.core == paper


def test_the_kernels_of_one_op_are_launched_by_different_cases() -> None:
    shapes = {chosen_cases("cross_attention", kernel, True, torch.bfloat16)[0].shape
              for kernel, op in KERNELS.items() if op == "cross_attention"}  # fmt: skip
    assert len(shapes) == 3


def test_without_a_kernel_all_cases_are_run() -> None:
    every = chosen_cases("", "", False, torch.float32)
    assert len(every) == 12
    assert [case for case in every if case.op == "place_tokens"] == [every[9]]


@pytest.mark.slow
def test_a_line_is_printed_for_the_case() -> None:
    command = [sys.executable, "-m", "mvlm_benchmarks.gpu.small_calls", "--rehearse", "--op", "cross_attention"]
    done = subprocess.run([*command, "--kernel", "short_q_backward"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "cross_attention, B2 H1 D64 19x165: ok\n")
