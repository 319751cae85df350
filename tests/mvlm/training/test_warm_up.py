"""Kernels compiled before the first step: the command that a run starts, what it shows, and what it covers."""

import logging
import sys
from dataclasses import replace

import pytest
import torch

from mvlm.distributed.world import World
from mvlm.training import warm_up
from mvlm.training.warm_up import compile_kernels
from support.models import ALONE, pretrain_config


@pytest.fixture
def program(tmp_path, monkeypatch):
    """Takes the place of Python: writes down its arguments, and ends with the exit code in the file `code`."""
    path = tmp_path / "program"
    path.write_text(
        f'#!/bin/sh\necho "$@" > {tmp_path}/words\necho 1 of 2 kernels\necho 2 of 2 kernels\necho the last line\n'
        f"exit $(cat {tmp_path}/code)\n"
    )
    path.chmod(0o755)
    (tmp_path / "code").write_text("0")
    monkeypatch.setattr(sys, "executable", str(path))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    return tmp_path


def test_a_run_on_a_gpu_compiles_first_and_goes_on_if_that_fails(program, capsys, caplog):
    cuda = World(rank=0, size=1, local_rank=0, device=torch.device("cuda", 0))
    config = pretrain_config(program, program / "run", batch_size=24, precision="bf16")
    compile_kernels(config, cuda)
    words = (program / "words").read_text().split()
    assert words[:4] == ["-m", "mvlm.costs.step_kernels", "--config", str(program / "run" / "config.json")]
    assert words[words.index("--pairs") + 1] == "24"
    assert words[words.index("--arch") + 1] == "sm_90"
    assert "2/2" in capsys.readouterr().out
    (program / "code").write_text("1")
    with caplog.at_level(logging.WARNING):
        compile_kernels(config, cuda)
    assert "the last line" in caplog.text


@pytest.mark.parametrize("changes", [{}, {"plan": "plain"}, {"precision": "fp32"}])
def test_without_kernels_nothing_is_compiled(program, changes):
    config = pretrain_config(program, program / "run", **changes)
    compile_kernels(config, ALONE if not changes else replace(ALONE, device=torch.device("cuda", 0)))
    assert not (program / "words").exists()


def test_doctor_says_how_it_ended(program):
    found: list[tuple[int, int]] = []
    ended = warm_up.compile_in_processes(["--preset", "tiny"], ALONE.device, lambda *done: found.append(done))
    assert (ended, found) == ((True, "the last line"), [(1, 2), (2, 2)])
