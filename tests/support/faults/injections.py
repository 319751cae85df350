"""Faults of a run. Each function is called in the run's process, before the run, and patches that process for good.

`at_step`, `at_batch` and `at_save` say when something happens. `kill`, `stall`, `disk_full` and `limit_file_size` are
what may happen then.
"""

import errno
import hashlib
import json
import math
import os
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from mvlm.model import fast
from mvlm.runs import checkpoint_writer
from mvlm.runs.checkpoint_writer import CheckpointWriter
from mvlm.training.trainer import Trainer
from mvlm_dataloading import Batch, Masks
from mvlm_dataloading.loader.loader import Loader


def at_step(step: int, action: Callable[[], None]) -> None:
    """Call `action` in the middle of this step: after the gradients, before the update."""
    forward_backward = Trainer.forward_backward

    def acting(trainer: Trainer, *arguments: Any) -> Any:
        losses = forward_backward(trainer, *arguments)
        if trainer.step + 1 == step:
            action()
        return losses

    patch.object(Trainer, "forward_backward", acting).start()


def at_evaluation(parts: int, action: Callable[[], None]) -> None:
    """Call `action` after so many parts of the run's evaluations. Each part then takes a second more."""
    ask, left = Trainer.may_go_on, [parts]

    def acting(trainer: Trainer) -> bool:
        left[0] -= 1
        if left[0] == -1:
            action()
        time.sleep(1)
        return ask(trainer)

    patch.object(Trainer, "may_go_on", acting).start()


def at_batch(step: int, action: Callable[[], None]) -> None:
    """Call `action` in the loader when it is asked for the batch of this step."""
    iterate = Loader.__iter__

    def acting(loader: Loader) -> Any:
        for batch in iterate(loader):
            if loader.step == step:
                action()
            yield batch

    patch.object(Loader, "__iter__", acting).start()


def at_save(operation: int, action: Callable[[], None]) -> None:
    """Call `action` before one operation, counted from 0 over all checkpoints: a write, a sync, a hash or a rename."""
    left = [operation]

    def acting(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **settings: Any) -> Any:
            left[0] -= 1
            if left[0] == -1:
                action()
            return function(*arguments, **settings)

        return call

    for name in ("write_tensors", "write_safetensors", "write_json", "sync", "sha256"):
        patch.object(checkpoint_writer, name, acting(getattr(checkpoint_writer, name))).start()
    patch.object(Path, "rename", acting(Path.rename)).start()


def at_save_of_step(step: int, operation: int, action: Callable[[], None]) -> None:
    """Like `at_save`, counted from 0 over the checkpoint of this step alone. Earlier checkpoints finish first."""
    save = CheckpointWriter.save

    def acting(writer: CheckpointWriter, number: int, *arguments: Any) -> None:
        if number == step:
            writer.wait()
            at_save(operation, action)
        save(writer, number, *arguments)

    patch.object(CheckpointWriter, "save", acting).start()


def log_batches(file: Path) -> None:
    """Append a line of JSON to `file` at every step: the step, and each row of this rank's batch.

    A row is the sample's id and a hash of its pixels, tokens and masks.
    """
    forward_backward = Trainer.forward_backward

    def logging(trainer: Trainer, microbatches: list[tuple[Batch, Masks]], *rest: Any) -> Any:
        rows = []
        for batch, masks in microbatches:
            ends, masked = batch.cu_seqlens.tolist(), torch.zeros_like(batch.tokens)
            masked[masks.token_ids] = 1
            for row, i in enumerate(batch.sample_id.tolist()):
                caption = slice(ends[row], ends[row + 1])
                parts = batch.images[row], batch.tokens[caption], masked[caption], masks.patch_ids[row]
                content = b"".join(part.contiguous().numpy().tobytes() for part in parts)
                rows.append([i, hashlib.sha256(content).hexdigest()])
        with file.open("a") as lines:
            lines.write(json.dumps([trainer.step + 1, rows]) + "\n")
        return forward_backward(trainer, microbatches, *rest)

    patch.object(Trainer, "forward_backward", logging).start()


def nan_loss(step: int, steps: int) -> None:
    """Make the masked-image loss NaN at `steps` steps from `step` on."""
    loss, calls = fast.masked_pixel_loss, [0]

    def broken(*inputs: Any, **settings: Any) -> Any:
        calls[0] += 1
        return loss(*inputs, **settings) * (math.nan if step <= calls[0] < step + steps else 1.0)

    patch.object(fast, "masked_pixel_loss", broken).start()


def kill(number: int = signal.SIGKILL) -> Callable[[], None]:
    """An action that sends this signal to the process."""
    return lambda: os.kill(os.getpid(), number)


def slow_end(seconds: float) -> None:
    """Let the loader take so many seconds to close."""
    close = Loader.close

    def slow(loader: Loader) -> None:
        time.sleep(seconds)
        close(loader)

    patch.object(Loader, "close", slow).start()


def fail() -> None:
    raise ValueError("a broken\nthing")


def stall() -> None:
    time.sleep(600)


def disk_full() -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def limit_file_size() -> None:
    """Let the system refuse files of more than 16 kB from now on, with EFBIG."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 14, 1 << 14))
