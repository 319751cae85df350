"""Pretraining runs in forked processes."""

import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mvlm import cli
from mvlm.config.pretrain import PretrainConfig
from mvlm.training.run import pretrain
from support.faults.forks import in_child
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


def start(
    config: PretrainConfig,
    log: Path,
    environment: dict[str, str] | None = None,
    before: Callable[[], object] | None = None,
) -> int:
    """Fork a process that does the run, with the messages and the exit code of `mvlm pretrain`. Returns its id.

    Args:
        log: file that its output is appended to.
        environment: variables of the process.
        before: called in the process before the run, to arrange a fault.
    """

    def work(_: Any) -> None:
        if before is not None:
            before()
        pretrain(config)

    def as_command() -> int:
        os.environ.update(environment or {})
        cli.run_command = work
        logging.basicConfig(stream=sys.stderr, force=True)
        try:
            cli.main()
        except SystemExit as end:
            return int(end.code or 0)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            return 1
        return 0

    return in_child(as_command, log)
