"""Metrics of training steps: kept on the device, sent to the host once per row of the log, and logged.

The decision which updates are made stays on the device too, so that no step waits for it; the host counts them later.

In a row, `skipped` counts undecodable images and `bad_steps` counts skipped updates, both since the start of the run.
"""

import math
import os
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mvlm.config.groups import RunConfig
from mvlm.config.pretrain import PretrainConfig
from mvlm.costs.mfu import ModelFlopsUtilization
from mvlm.distributed.collectives import HostNumbers
from mvlm.distributed.world import World
from mvlm.errors import NonFiniteLossError
from mvlm.objectives.pretraining import OBJECTIVES
from mvlm.progress import TrainingProgress
from mvlm.training.optimizer import learning_rate_factor
from mvlm.training.rank_figures import RankFigures


class MetricsBuffer:
    """Scalars of the steps since the last row of metrics.

    They stay on the device until they are read in one transfer.
    """

    def __init__(self) -> None:
        self._names: list[str] = []
        self._ranks = 0
        self._rows: list[Tensor] = []
        self._sent: HostNumbers | None = None
        self.steps: list[int] = []
        self.samples: list[list[int]] = []
        """For each step, the ids of the samples in this rank's batch."""
        self.tokens = 0
        """Number of tokens of the captions in this rank's batches."""
        self.waited = 0.0
        """Seconds that this rank waited for data in these steps."""

    def add(
        self,
        step: int,
        samples: list[int],
        tokens: int,
        values: dict[str, Tensor],
        waited: float,
        ranks: Tensor | None = None,
    ) -> None:
        """Add one step.

        Args:
            samples: ids of the samples in this rank's batch.
            tokens: number of their captions' tokens.
            values: scalars on the device, of the same names for all steps of a row.
            waited: seconds that this rank waited for data.
            ranks: F figures of each of W ranks, float (W, F) on the device.
        """
        self._names = list(values)
        row = torch.stack([value.detach().float() for value in values.values()])
        if ranks is not None:
            self._ranks, row = len(ranks), torch.cat([row, ranks.flatten()])
        self._rows.append(row)
        self._sent = None
        self.steps.append(step)
        self.samples.append(samples)
        self.tokens += tokens
        self.waited += waited

    def send(self) -> None:
        """Start the transfer to the host. It is queued after the device's current work."""
        self._sent = HostNumbers(torch.stack(self._rows))  # (steps, names and figures of ranks)

    def read(self) -> list[dict[str, float]]:
        """Return the scalars of each step. Waits for the device if the transfer has not finished."""
        return [dict(zip(self._names, row[: len(self._names)], strict=True)) for row in self._numbers()]

    def read_ranks(self) -> list[list[list[float]]]:
        """Return the figures of each rank at each step; empty in a world of one. Waits like `read`."""
        if not self._ranks:
            return []
        found = torch.tensor(self._numbers())[:, len(self._names) :]  # (steps, W F)
        return found.unflatten(1, (self._ranks, -1)).tolist()

    def _numbers(self) -> list[list[float]]:
        if not self._rows:
            return []
        if self._sent is None:
            self.send()
        assert self._sent is not None
        return self._sent.read()


def finite_update(loss: Tensor, gradient_norm: Tensor) -> Tensor:
    """Judge an update from scalars on the device: bool (), True = both are finite. No sync."""
    return torch.isfinite(loss) & torch.isfinite(gradient_norm)


class SkippedUpdates:
    """Counts, on the host, the updates that were skipped because they were not finite, once their metrics have arrived.

    Args:
        limit: number of updates in a row that may be skipped.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._counted = 0
        self.total = 0
        self.in_a_row = 0

    def count(self, metrics: MetricsBuffer) -> tuple[int, dict[str, float], list[int]] | None:
        """Count the skipped updates among the steps in `metrics` that are new.

        Returns step, metrics and sample ids of the first one by which more than `limit` in a row were skipped, or None.
        """
        for step, row, samples in zip(metrics.steps, metrics.read(), metrics.samples, strict=True):
            if step <= self._counted:
                continue
            self._counted = step
            self.total += not row["good"]
            self.in_a_row = 0 if row["good"] else self.in_a_row + 1
            if self.in_a_row > self._limit:
                return step, row, samples
        return None

    @staticmethod
    def reason(row: dict[str, float]) -> str:
        """Reason for a skipped update: the metrics that are not finite."""
        names = [name for name in row if name == "grad_norm" or not name.startswith(("grad_norm", "good", "total"))]
        # The total is named if it alone is not finite: a part that is not finite makes it so.
        not_finite = [f"{name} is {row[name]}" for name in names if not math.isfinite(row[name])]
        if not not_finite and not math.isfinite(row["total"]):
            return f"the loss is {row['total']}"
        return ", ".join(not_finite) or "the gradient of another rank is not finite"

    def error(
        self, step: int, row: dict[str, float], keys: list[str], checkpoint: Path | None, first: Path | None
    ) -> NonFiniteLossError:
        """Error of a run in which too many updates in a row were skipped.

        Args:
            step, row: of the first one beyond the limit, from `count`.
            keys: of its samples on all ranks.
            checkpoint: the newest one, if there is one.
            first: folder of the run's first step that was not finite, if there is one.
        """
        named = "" if first is None else f"`mvlm replay {first}` names the op of the first such step. "
        more = f" and {len(keys) - 8} more" if len(keys) > 8 else ""
        return NonFiniteLossError(
            f"step {step}: {self.reason(row)}; the update was not made ({self.in_a_row} in a row, "
            f"max_bad_steps is {self._limit}). Its samples: {', '.join(keys[:8])}{more}. "
            f"Last good checkpoint: {checkpoint or 'none'}; no checkpoint holds such an update. "
            f"{named}A new run can go on from it with a lower learning rate or --precision fp32: name it by "
            f"--initial-model, in fine-tuning by --checkpoint, and another folder by --out"
        )

    def state(self) -> dict[str, int]:
        """State for a checkpoint, as plain JSON."""
        return {"counted": self._counted, "total": self.total, "in_a_row": self.in_a_row}

    def load(self, state: dict[str, int]) -> None:
        """Continue from the state of a checkpoint."""
        self._counted, self.total, self.in_a_row = state["counted"], state["total"], state["in_a_row"]


def gradient_norms(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    """L2 norms of the gradients before clipping: of all together, and of each direct child or parameter of the model.

    Scalars on the device, without a sync; 0 for a part without gradients. The total is the norm of the norms of all
    tensors, as in torch's `clip_grad_norm_`.
    """
    # Parts without gradients are listed too, because the steps of a row must have the same names.
    parts: dict[str, list[Tensor]] = {name.split(".")[0]: [] for name, _ in model.named_parameters()}
    gradients = [(name, p.grad) for name, p in model.named_parameters() if p.grad is not None]
    norms = torch._foreach_norm([gradient for _, gradient in gradients])  # pyright: ignore[reportPrivateImportUsage]
    for (name, _), norm in zip(gradients, norms, strict=True):
        parts[name.split(".")[0]].append(norm)
    nothing = torch.zeros((), device=norms[0].device)
    return _total_norm(norms), {name: _total_norm(part) if part else nothing for name, part in parts.items()}


def _total_norm(norms: Sequence[Tensor]) -> Tensor:
    return full_tensor(torch.linalg.vector_norm(torch.stack(list(norms))))


def full_tensor(x: Tensor) -> Tensor:
    """Gather a tensor that is sharded over ranks; return any other tensor unchanged."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def memory_mb(device: torch.device) -> float:
    """Memory in MB: peak of tensors on a GPU, or resident memory of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


class MetricsLogger:
    """Makes a row of metrics from the steps since the last row, and logs it.

    `end_row` starts the transfer of a row's numbers to the host. `write_row`, called while the next step runs, then
    needs no wait. A row is therefore written one step late, and the device always has work queued, even with
    `--log-every 1`.

    Args:
        check: function that counts the skipped updates among the steps and returns the run's total; it raises to end
            the run.
        log: function that takes each row, in which None stands for a number that is not finite; None on ranks that log
            nothing.
        seconds: seconds that the run had trained before.
    """

    def __init__(
        self,
        config: RunConfig,
        world: World,
        check: Callable[[MetricsBuffer], int],
        log: Callable[[dict[str, Any]], object] | None,
        seconds: float = 0.0,
    ) -> None:
        self._config, self._world, self._check, self._log = config, world, check, log
        self._mfu = ModelFlopsUtilization(config, world)
        self._staged = isinstance(config, PretrainConfig) and bool(config.stages)
        hosts = world.gather_objects(socket.gethostname())
        self._ranks = RankFigures(hosts) if world.first and world.size > 1 else None
        self._pending: tuple[dict[str, Any], MetricsBuffer, dict[str, float]] | None = None
        self._row_started = time.perf_counter()
        self._clock_zero = self._row_started - seconds

    def end_row(self, buffer: MetricsBuffer, undecodable_images: int, figures: dict[str, float]) -> None:
        """End a row with the steps of `buffer`. `figures` of an evaluation, if any, become fields of the row."""
        buffer.send()
        if buffer.steps[-1] == self._config.max_steps:
            buffer.read()  # waits for the device: the last row has the time of the whole run
        now = time.perf_counter()
        seconds, steps = now - self._row_started, len(buffer.steps)
        config, factor = self._config, learning_rate_factor(buffer.steps[-1] - 1, self._config)
        rate = steps * config.batch_size / seconds
        tokens = buffer.tokens * self._world.size / (steps * config.batch_size)
        mfu = self._mfu.of_rate(rate, tokens, buffer.steps)
        # The first count of FLOPs takes seconds, which are no training: the clock is stopped meanwhile.
        self._row_started = time.perf_counter()
        elapsed, self._clock_zero = now - self._clock_zero, self._clock_zero + self._row_started - now
        peaks = {"lr": config.lr_cross, "lr_encoder": config.lr_encoder}
        own = {"lr_image": config.lr_image, "lr_text": config.lr_text}
        peaks |= {name: peak for name, peak in own.items() if peak is not None}
        if isinstance(config, PretrainConfig):
            peaks["lr_pixels"] = config.lr_pixels
            peaks |= {"lr_muon": config.lr_muon} if config.optimizer == "muon" else {}
        host = {
            **{name: peak * factor for name, peak in peaks.items()},
            "pairs_per_s": rate,
            "data_wait_s": buffer.waited / steps,
            "seconds": elapsed,
            "memory_mb": memory_mb(self._world.device),
            **({} if mfu is None else {"mfu": mfu}),
            "skipped": undecodable_images,
            **({"image_size": config.model_at(buffer.steps[-1] - 1).image_size} if self._staged else {}),
        }
        self._pending = (host, buffer, figures)

    def write_row(self, progress: TrainingProgress) -> None:
        """Write the row that was ended last, unless it has been written. Raises what `check` raises."""
        if self._pending is None:
            return
        (host, buffer, figures), self._pending = self._pending, None
        skipped_updates = self._check(buffer)
        values, found = (
            {n: x if math.isfinite(x) else None for n, x in y.items()} for y in (buffer.read()[-1], figures)
        )
        step = buffer.steps[-1]
        row = {"step": step, "pairs_seen": step * self._config.batch_size, "loss": values.pop("total")}
        del values["good"]
        step_s = self._config.batch_size / host["pairs_per_s"]
        of_ranks = {} if self._ranks is None else self._ranks.fields(buffer.read_ranks(), step_s)
        row |= {**values, **host, **of_ranks, "bad_steps": skipped_updates, **found}
        if self._log is not None:
            self._log(row)
        progress.show(row, [objective.name for objective in OBJECTIVES])
