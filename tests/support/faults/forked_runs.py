"""Pretraining runs in forked processes: torch and DALI are imported once, in the parent.

The parent must not start threads before it forks.
"""

import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # torch imports it with the first optimizer: here once, in place of every fork

from mvlm import cli
from mvlm.config.pretrain import PretrainConfig
from mvlm.training.run import pretrain
from support.models import micro_config, pretrain_config

STEPS = 12
MODEL = micro_config(
    image_layers=1,
    text_layers=1,
    cross_layers=1,
    decoder_layers=1,
    image_mean=(0.5, 0.5, 0.5),
    image_std=(0.5, 0.5, 0.5),
)


def run_config(data: Path, out: Path, **changes: Any) -> PretrainConfig:
    """A run of 12 steps with a checkpoint every third step. It takes one or two seconds."""
    settings: dict[str, Any] = {
        "max_steps": STEPS,
        "batch_size": 4,
        "precision": "fp32",
        "checkpoint_every_steps": 3,
        "keep_checkpoints": 2,
        "ema_decay": 0.9,
        "resume": True,
        "model": MODEL,
    }
    return pretrain_config(data, out, **(settings | changes))


@dataclass
class ForkedRun:
    """One process of a run."""

    config: PretrainConfig
    log: Path
    """File that stdout and stderr are appended to."""
    environment: dict[str, str] = field(default_factory=dict)
    before: Callable[[], object] | None = None
    """Called in the process before the run, to arrange a fault."""


def start(run: ForkedRun) -> int:
    """Fork a process that does the run. Returns its id."""
    process = os.fork()
    if process:
        return process
    code = 70
    try:
        os.setpgid(0, 0)
        handle = os.open(run.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        os.environ.update(run.environment)
        torch.set_num_threads(1)
        code = _run_as_command(run)
    finally:
        os._exit(code)


def _run_as_command(run: ForkedRun) -> int:
    """Do the run with the messages of `mvlm pretrain`. Returns that command's exit code."""

    def work(_: Any) -> None:
        if run.before is not None:
            run.before()
        pretrain(run.config)

    cli.run_command = work
    sys.stderr = os.fdopen(2, "w", buffering=1)
    logging.basicConfig(stream=sys.stderr, force=True)
    try:
        cli.main()
    except SystemExit as end:
        return int(end.code or 0)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


def wait(process: int, seconds: float = 60.0) -> int:
    """Exit code of a process, or minus the signal that ended it.

    After `seconds` the process is killed and TimeoutError is raised.
    """
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    raise TimeoutError(f"process {process} did not end within {seconds} s")
