"""Lines of metrics, and where they go."""

import logging
import math
import time
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from mvlm.config.pretrain import PretrainConfig
from mvlm.errors import ConfigError
from mvlm.progress import Progress
from mvlm.runs.folder import MetricsFile
from mvlm.training.build import learning_rate_factor
from mvlm.training.metrics import Numbers, memory_mb

if TYPE_CHECKING:
    from mvlm.training.trainer import Run

log = logging.getLogger(__name__)

COUNTERS = ("step", "pairs_seen")
SERVICES = ("wandb", "trackio")


class Lines:
    """Makes a line of the numbers since the last one.

    `close` ends a line and sends its numbers on their way; `write`, called while the next step is under way, has them
    without waiting. So a line is written one step late, and with `--log-every 1` too the device never runs dry.
    """

    def __init__(self, run: "Run", outputs: "Outputs | None") -> None:
        self._run, self._outputs = run, outputs
        self._pending: tuple[dict[str, Any], Numbers, dict[str, float]] | None = None
        self._began = time.perf_counter()

    def close(self, figures: dict[str, float]) -> None:
        """End the line after the run's current step; `figures` of an evaluation are part of it."""
        run, numbers = self._run, self._run.numbers
        numbers.send()
        run.numbers = Numbers()
        now = time.perf_counter()
        seconds, steps = now - self._began, len(numbers.steps)
        self._began = now
        config, factor = run.config, learning_rate_factor(run.step - 1, run.config)
        rate = steps * config.batch_size / seconds
        mfu = run.utilisation.mfu(rate, numbers.tokens * run.world.size / (steps * config.batch_size))
        host = {
            "lr": config.lr_cross * factor,
            "lr_encoder": config.lr_encoder * factor,
            "lr_pixels": config.lr_pixels * factor,
            "pairs_per_s": rate,
            "data_wait_s": numbers.waited / steps,
            "memory_mb": memory_mb(run.device),
            **({} if mfu is None else {"mfu": mfu}),
            "skipped": run.loader.skipped,
        }
        self._pending = (host, numbers, figures)

    def write(self, progress: Progress) -> None:
        """Write the line that was closed last, if it has not been. NonFiniteLossError as `Run.check` says."""
        if self._pending is None:
            return
        (host, numbers, figures), self._pending = self._pending, None
        run = self._run
        run.check(numbers)
        values: dict[str, Any] = {
            name: value if math.isfinite(value) else None for name, value in numbers.read()[-1].items()
        }
        step = numbers.steps[-1]
        if step <= run.config.reconstruction_first:  # zeros that mean nothing
            values |= dict.fromkeys((name for name in values if name.startswith(("itc", "itm"))), None)
        row = {"step": step, "pairs_seen": step * run.config.batch_size, "loss": values.pop("total")}
        del values["good"]
        row |= {**values, **host, "bad_steps": run.bad.total, **figures}
        if self._outputs is not None:
            self._outputs.write(row)
        progress.show(row)


class Outputs:
    """Where lines and pictures go: metrics.jsonl, TensorBoard and, when asked for, W&B and trackio. Rank 0 alone.

    What cannot be written, for want of room say, is warned about, and is tried again with the next line. TensorBoard is
    not: its writer's thread ends at the first failure.

    Args:
        step: the step that the run goes on from; later lines of an earlier attempt are dropped.
    """

    def __init__(self, config: PretrainConfig, step: int) -> None:
        self._services = {n: _start_service(n, config) for n in SERVICES if getattr(config, n)}
        self._strips = config.out / "strips"
        self._metrics = MetricsFile(config.out / "metrics.jsonl", step)
        self._board: SummaryWriter | None = SummaryWriter(str(config.out / "tensorboard"), purge_step=step + 1)
        self._failing: set[str] = set()

    def write(self, row: dict[str, Any]) -> None:
        """One line of metrics; None stands for a number that there is not."""
        step = row["step"]
        numbers = {name: value for name, value in row.items() if name not in COUNTERS and value is not None}
        self._try("metrics.jsonl", lambda: self._metrics.write(row))
        self._try_board(lambda board: [board.add_scalar(name, value, step) for name, value in numbers.items()])
        for name, service in self._services.items():
            self._try(name, lambda service=service: service.log(numbers, step=step), Exception)

    def picture(self, picture: np.ndarray, step: int) -> None:
        """A reconstruction strip, uint8 (H, W, 3): strips/step_XXXXXXXX.png, and TensorBoard."""

        def save() -> None:
            self._strips.mkdir(exist_ok=True)
            Image.fromarray(picture).save(self._strips / f"step_{step:08d}.png")

        self._try("strips", save)
        self._try_board(lambda board: board.add_image("reconstruction", picture, step, dataformats="HWC"))

    def __enter__(self) -> "Outputs":
        return self

    def __exit__(self, *_: object) -> None:
        self._try("metrics.jsonl", self._metrics.close)
        self._try_board(lambda board: board.close())
        for name, service in self._services.items():
            self._try(name, service.finish, Exception)

    def _try(self, name: str, work: Callable[[], object], errors: type[Exception] = OSError) -> bool:
        """Do `work`. Returns whether it could be done; a warning says why not, once until it can again.

        `errors` are those that do not end the run. A service has its own kinds, which do not share a base class.
        """
        try:
            work()
        except errors as error:
            if name not in self._failing:
                log.warning("could not write %s: %s; training goes on", name, error)
            self._failing.add(name)
            return False
        self._failing.discard(name)
        return True

    def _try_board(self, work: Callable[[SummaryWriter], object]) -> None:
        board = self._board
        if board is not None and not self._try("TensorBoard's files", lambda: work(board)):
            self._board = None


def check_services(config: PretrainConfig) -> None:
    """ConfigError where W&B or trackio is wanted and not installed."""
    for name in SERVICES:
        if getattr(config, name) and find_spec(name) is None:
            raise ConfigError(f"--{name}: wanted the package {name}, which is not installed; pip install {name}")


def _start_service(name: str, config: PretrainConfig) -> Any:
    """W&B or trackio, which have the same calls, with a run begun. ConfigError where that cannot be."""
    extra: dict[str, Any] = {"dir": str(config.out)} if name == "wandb" else {}
    try:
        service = import_module(name)
        service.init(project="mvlm", name=config.out.name, config=config.to_dict(), **extra)
    except Exception as error:
        raise ConfigError(f"--{name}: could not begin a run: {error!r}; leave --{name} out") from error
    return service
