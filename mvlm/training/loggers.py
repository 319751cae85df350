"""Sinks for metrics and images: metrics.jsonl, TensorBoard, Weights & Biases, trackio."""

import logging
import re
import secrets
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from mvlm.config.groups import RunConfig
from mvlm.errors import ConfigError
from mvlm.runs.folder import MetricsFile, RunFolder
from mvlm.untrusted import run_errors
from mvlm_dataloading.files import make_folder, replaced, write_file
from mvlm_dataloading.untrusted import read_regular
from mvlm_dataloading.urls import shown

log = logging.getLogger(__name__)

COUNTERS = ("step", "pairs_seen")


class LogSinks:
    """Writes metrics and images of a run to metrics.jsonl, TensorBoard and, if asked for, W&B and trackio. Rank 0 only.

    If one of these cannot be written, for example on a full disk, the run continues with one warning, and the next row
    is tried again. TensorBoard is not tried again: the thread of its writer ends at the first failure.

    Args:
        config: of the run, for which `start_services` has been called.
        step: the step that the run continues from. Rows of later steps, from an earlier attempt, are dropped.
    """

    def __init__(self, config: RunConfig, step: int) -> None:
        self._services: dict[str, Any] = {name: import_module(name) for name in config.log_to}
        folder = RunFolder(config.out)
        self._out, self._artefacts = folder.path, config.artefacts
        self._strips = folder.strips
        self._metrics = MetricsFile(folder.metrics, step)
        with run_errors():  # of a folder that came from others
            board = make_folder(folder.tensorboard, within=folder.path)
        self._board: SummaryWriter | None = SummaryWriter(str(board), purge_step=step + 1)
        self._failing: set[str] = set()
        self.seconds = self._metrics.seconds
        """Seconds of training that metrics.jsonl has from earlier processes of this run."""

    def log(self, row: dict[str, Any]) -> None:
        """Write one row of metrics. None stands for a missing number."""
        step = row["step"]
        numbers = {name: value for name, value in row.items() if name not in COUNTERS and value is not None}
        self._try("metrics.jsonl", lambda: self._metrics.write(row))
        self._try_board(lambda board: [board.add_scalar(name, value, step) for name, value in numbers.items()])
        for name, service in self._services.items():
            self._try(name, lambda service=service: service.log(numbers, step=step), Exception)

    def log_image(self, image: np.ndarray, step: int) -> None:
        """Write a reconstruction strip, uint8 (H, W, 3), to strips/step_XXXXXXXX.png and TensorBoard."""

        def save() -> None:
            self._strips.mkdir(exist_ok=True)
            with replaced(self._strips / f"step_{step:08d}.png", within=self._strips.parent) as aside:
                Image.fromarray(image).save(aside, "PNG")

        self._try("strips", save)
        self._try_board(lambda board: board.add_image("reconstruction", image, step, dataformats="HWC"))

    def log_checkpoint(self, checkpoint: Path, alias: str) -> None:
        """Upload a finished checkpoint to W&B, if the run has --artefacts. May be called on any thread.

        alias: "best" or "last". The checkpoint may be removed afterwards: W&B has its own copy until it is uploaded.
        """
        if self._artefacts:
            arguments = (f"{self._out.name}-checkpoint", "model", checkpoint, alias, checkpoint.name)
            self._try("an artefact of wandb", lambda: _log_artefact(*arguments), Exception)

    def __enter__(self) -> "LogSinks":
        return self

    def __exit__(self, *_: object) -> None:
        self._try("metrics.jsonl", self._metrics.close)
        self._try_board(lambda board: board.close())
        for name, service in self._services.items():
            self._try(name, service.finish, Exception)

    def _try(self, name: str, work: Callable[[], object], errors: type[Exception] = OSError) -> bool:
        """Do `work` and return True. On one of `errors` return False, with a warning for the first failure in a row."""
        # W&B and trackio raise errors of many kinds without a common base class: for them `errors` is Exception.
        try:
            work()
        except errors as error:
            if name not in self._failing:
                log.warning("could not write %s: %s; training continues", name, error)
            self._failing.add(name)
            return False
        self._failing.discard(name)
        return True

    def _try_board(self, work: Callable[[SummaryWriter], object]) -> None:
        board = self._board
        if board is not None and not self._try("TensorBoard's files", lambda: work(board)):
            self._board = None


def check_services(config: RunConfig) -> None:
    """Raise ConfigError if W&B or trackio is wanted but not installed."""
    for name in config.log_to:
        if find_spec(name) is None:
            raise ConfigError(f"log_to: wanted the package {name}, which is not installed; pip install {name}")


def start_services(config: RunConfig) -> None:
    """Start a run of W&B and of trackio, where they are wanted, or go on with it. ConfigError if that fails.

    Both have the same calls. A resumed run goes on in the service's run that it began. W&B then takes no row twice.
    """
    resumes = RunFolder(config.out).config.is_file()
    started: list[Any] = []
    for name in config.log_to:
        extra: dict[str, Any] = {"resume": "allow" if resumes else "never"}  # by the name, which a new run may share
        try:
            if name == "wandb":
                extra = _in_wandb(config.out)
            service = import_module(name)
            service.init(project="mvlm", name=config.out.name, config=config.to_dict(), **extra)
            started.append(service)
        except Exception as error:
            for service in started:
                with suppress(Exception):  # the first error is the one to tell
                    service.finish()
            raise ConfigError(f"--log-to {name}: could not start a run: {error!r}; leave it out") from error


def upload_report(out: Path, page: Path) -> None:
    """Upload the page of `mvlm report` to the W&B run of a run folder. ConfigError if that fails."""
    try:
        service = import_module("wandb")
        service.init(project="mvlm", name=out.name, **_in_wandb(out))
        _log_artefact(f"{out.name}-report", "report", page)
        service.finish()
    except Exception as error:  # its errors have no common base class
        raise ConfigError(
            f"--upload: wanted to upload {page} to W&B, could not: {shown(repr(error))}; check the package and `wandb "
            f"login`, or leave it out"
        ) from None


def _log_artefact(name: str, kind: str, path: Path, *aliases: str) -> None:
    """Upload a file or folder to the W&B run that has been started, under a name and aliases."""
    service = import_module("wandb")
    artefact = service.Artifact(re.sub(r"[^\w.-]", "_", name), type=kind)
    (artefact.add_dir if path.is_dir() else artefact.add_file)(str(path))
    service.log_artifact(artefact, aliases=[*aliases, "latest"])


def _in_wandb(out: Path) -> dict[str, Any]:
    """Arguments of W&B's `init` that start or continue the W&B run that belongs to a run folder."""
    return {"dir": str(out), "id": _wandb_id(out), "resume": "allow"}


def _wandb_id(out: Path) -> str:
    """Id at W&B of the run in a run folder. It is kept in a file of the folder, which is made if there is none."""
    file = out / "wandb" / "mvlm-run-id"
    if not file.is_file():
        make_folder(file.parent, within=out)
        write_file(file, secrets.token_hex(8), within=out)
    return read_regular(file, "settings", within=out).decode()
