"""Runs of a micro model in processes that are forked, so that importing torch and DALI is paid for once.

`spawn(trial)` forks a process that has everything imported and no thread but its own, and does what the trial says.
"""

import errno
import json
import logging
import math
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from mvlm import cli
from mvlm.config.model import MaskVLMConfig
from mvlm.config.pretrain import PretrainConfig
from mvlm.model import fast
from mvlm.runs import checkpoint_writer as saver
from mvlm.training.metrics import MetricsBuffer
from mvlm.training.run import pretrain
from mvlm.training.trainer import Trainer
from mvlm_dataloading.loader.loader import Loader

MICRO = MaskVLMConfig(
    image_size=32,
    patch_size=8,
    mask_block=16,
    width=16,
    heads=2,
    image_layers=1,
    text_layers=1,
    cross_layers=1,
    decoder_layers=1,
    vocab_size=300,
    mask_token_id=4,
    text_length=12,
    itc_width=8,
)


def configuration(data: Path, out: Path, **changes: Any) -> PretrainConfig:
    """A run of 12 steps with a checkpoint every third: a second or two."""
    settings: dict[str, Any] = {
        "data": data,
        "out": out,
        "max_steps": 12,
        "batch_size": 4,
        "lr_encoder": 1e-3,
        "lr_cross": 2e-3,
        "lr_pixels": 3e-3,
        "warmup_steps": 2,
        "crop_scale": (0.5, 1.0),
        "device": "cpu",
        "precision": "fp32",
        "checkpoint_every_steps": 3,
        "keep_checkpoints": 2,
        "ema_decay": 0.9,
        "resume": True,
        "model": MICRO,
    }
    return PretrainConfig(**(settings | changes))


@dataclass
class Trial:
    """One process of a run, and what befalls it."""

    config: PretrainConfig
    log: Path
    """Where its stderr goes."""
    environment: dict[str, str] = field(default_factory=dict)
    before: Callable[[], object] | None = None
    """Done in the process before the run, to arrange the fault."""


def spawn(trial: Trial) -> int:
    """Fork a process for the trial; returns its id."""
    process = os.fork()
    if process:
        return process
    code = 70
    try:
        os.setpgid(0, 0)
        handle = os.open(trial.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        os.environ.update(trial.environment)
        torch.set_num_threads(1)
        code = _as_the_command_line_does(trial)
    finally:
        os._exit(code)


def _as_the_command_line_does(trial: Trial) -> int:
    """Run, with the exit codes and messages of `mvlm pretrain`."""

    def work(_: Any) -> None:
        if trial.before is not None:
            trial.before()
        pretrain(trial.config)

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
    """The exit code of a process, minus its signal where one ended it. TimeoutError, and its end, after `seconds`."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    raise TimeoutError(f"process {process} did not end within {seconds} s")


# What befalls a process. Each is called in it, before the run.


def at_step(step: int, action: Callable[[], None]) -> None:
    """Do `action` in the middle of the step with this number: after the gradients, before the update."""
    forward_backward = Trainer.forward_backward

    def acting(run: Trainer, *arguments: Any) -> Any:
        losses = forward_backward(run, *arguments)
        if run.step + 1 == step:
            action()
        return losses

    patch.object(Trainer, "forward_backward", acting).start()


def in_data(step: int, action: Callable[[], None]) -> None:
    """Do `action` where the loader is asked for the batch of the step with this number."""
    iterate = Loader.__iter__

    def acting(loader: Loader) -> Any:
        for batch in iterate(loader):
            if loader.step == step:
                action()
            yield batch

    patch.object(Loader, "__iter__", acting).start()


def in_save(operation: int, action: Callable[[], None]) -> None:
    """Do `action` before the operation with this number, from 0, of all that checkpoints are written with."""
    left = [operation]

    def acting(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **settings: Any) -> Any:
            left[0] -= 1
            if left[0] == -1:
                action()
            return function(*arguments, **settings)

        return call

    for name in ("write_tensors", "save_file", "write_json", "sync", "sha256"):
        setattr(saver, name, acting(getattr(saver, name)))
    Path.rename = acting(Path.rename)


def in_save_of(step: int, operation: int, action: Callable[[], None]) -> None:
    """The same of the checkpoint of this step alone: those before it are finished."""
    save = saver.CheckpointWriter.save

    def acting(its: saver.CheckpointWriter, number: int, *arguments: Any) -> None:
        if number == step:
            its.wait()
            in_save(operation, action)
        save(its, number, *arguments)

    patch.object(saver.CheckpointWriter, "save", acting).start()


def note_samples(file: Path) -> None:
    """Add a line of JSON to `file` for every step: its number and the ids of this rank's samples, in order."""
    add = MetricsBuffer.add

    def noting(numbers: MetricsBuffer, step: int, samples: list[int], *rest: Any) -> None:
        with file.open("a") as lines:
            lines.write(json.dumps([step, samples]) + "\n")
        add(numbers, step, samples, *rest)

    patch.object(MetricsBuffer, "add", noting).start()


def kill(number: int = signal.SIGKILL) -> Callable[[], None]:
    """The process gets this signal."""
    return lambda: os.kill(os.getpid(), number)


def disk_full() -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def no_room() -> None:
    """From now on the process writes no file of more than 16 kB: EFBIG from the system, wherever it is met."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 14, 1 << 14))


def stall() -> None:
    time.sleep(600)


def poison(step: int, steps: int) -> None:
    """The masked-image loss is NaN at this step and the following ones, `steps` in all."""
    loss, calls = fast.linear_pixel_loss, [0]

    def broken(*inputs: Any, **settings: Any) -> Any:
        calls[0] += 1
        return loss(*inputs, **settings) * (math.nan if step <= calls[0] < step + steps else 1.0)

    fast.linear_pixel_loss = broken
