"""The command line: finding commands, errors as lines and exit codes, help, and one run through all commands."""

import mmap
import os
import subprocess
import sys

import pytest
import torch

from mvlm import cli
from mvlm.errors import ConfigError, LostRankError, NonFiniteLossError, RunError
from mvlm_dataloading import DataError
from support.commands import assert_refused


def raising(error: BaseException):
    def fail(_):
        raise error

    return fail


MEMORY = "wanted memory, found too little"


@pytest.mark.parametrize(
    ("work", "code", "line"),
    [
        (lambda _: torch.empty(2**50), 2, MEMORY),  # the CPU's allocator
        (lambda _: bytearray(2**60), 2, MEMORY),
        (lambda _: mmap.mmap(-1, 2**60, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), 2, MEMORY),
        (raising(torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 9 GiB")), 2, MEMORY),
        (raising(RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be late")), 2, MEMORY),
        (raising(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED in `cublasCreate`")), 2, MEMORY),
        (raising(OSError(28, "No space left on device")), 2, "wanted room to write"),
        (raising(FileNotFoundError(2, "No such file", "a.txt")), 2, "a.txt: could not be read or written"),
        *((raising(kind("a file:\n  line 3")), 2, "a file: line 3") for kind in (ConfigError, RunError, DataError)),
        *((raising(kind("it ended")), 1, "it ended") for kind in (LostRankError, NonFiniteLossError)),
        (raising(KeyboardInterrupt()), 130, "interrupted"),
    ],
)
def test_an_error_that_is_no_bug_is_one_line(run_mvlm, monkeypatch, work, code, line):
    monkeypatch.setattr(cli, "find_command", work)
    outcome = run_mvlm("pretrain")
    assert (outcome.code, len(outcome.err)) == (code, 1)
    assert outcome.err[0].startswith(f"mvlm: {line}")


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), ValueError("a bug"), ImportError("no", name="x")])
def test_another_error_keeps_its_traceback(run_mvlm, monkeypatch, error):
    monkeypatch.setattr(cli, "find_command", raising(error))
    with pytest.raises(type(error)):
        run_mvlm("pretrain")


@pytest.mark.parametrize("given", [{}, {"PYTORCH_ALLOC_CONF": "backend:native"}, {"PYTORCH_CUDA_ALLOC_CONF": "a:1"}])
def test_torchs_allocator_grows_in_place_unless_the_user_configures_it(run_mvlm, monkeypatch, given):
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    run_mvlm("--version")
    found = {name: value for name, value in os.environ.items() if name.endswith("ALLOC_CONF")}
    assert found == (given or {"PYTORCH_ALLOC_CONF": "expandable_segments:True"})


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_usage_fits_a_screen_and_leads_to_every_command(run_mvlm, words):
    outcome = run_mvlm(*words)
    assert outcome.code == 0
    assert len(outcome.out) <= 45
    assert max(map(len, outcome.out)) <= 100
    for command in cli.COMMANDS:
        first, _, second = command.partition(" ")
        listed = run_mvlm(first, "--help").out if second else outcome.out
        assert any(line.startswith(f"  mvlm {command} ") for line in listed)
        assert (second or first) in " ".join(outcome.out).replace(",", "").split()


@pytest.mark.slow
@pytest.mark.parametrize("command", list(cli.COMMANDS))
def test_help_of_every_command(run_mvlm, command):
    outcome = run_mvlm(*command.split(), "--help")
    assert outcome.code == 0
    assert len(outcome.out) >= 2


def test_a_path_at_home_is_not_a_folder_named_tilde(run_mvlm, tmp_path, monkeypatch):
    """A shell leaves the ~ of `--out=~/run`."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    outcome = run_mvlm("eval", "retrieval", "--checkpoint=~/run", "--data", "~/data")
    assert_refused(outcome, str(tmp_path / "home"))
    assert "~" not in outcome.err[0]


def test_a_reader_that_ends_early_is_no_error():
    """The reader may end first, as in `mvlm --help | head -1`."""
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "wb") as pipe:
        done = subprocess.run(
            [sys.executable, "-m", "mvlm", "--help"], stdout=pipe, stderr=subprocess.PIPE, check=False
        )
    assert (done.returncode, done.stderr) == (141, b"")
