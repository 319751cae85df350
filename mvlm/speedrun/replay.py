"""Replay: steps of a run made again from its checkpoints, and compared with its rows and weights."""

import contextlib
import time
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from contextlib import closing, nullcontext
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor

from mvlm.config.pretrain import PretrainConfig
from mvlm.device import choose_device, deterministic_kernels
from mvlm.distributed.world import World
from mvlm.errors import NonFiniteLossError, RunError
from mvlm.machine import describe_machine, package_versions
from mvlm.progress import TrainingProgress
from mvlm.runs.checkpoint import (
    EMA,
    MODEL,
    OPTIMIZER,
    checkpoint_name,
    optimizer_tensors,
    read_state,
    read_tensors,
)
from mvlm.speedrun.bounds import BOUNDS, compare_rows, compare_weights, largest_difference, way_off
from mvlm.speedrun.claims import Check, Claims, verdict
from mvlm.training.metrics import MetricsBuffer, MetricsLogger
from mvlm.training.run import build_trainer, open_inputs
from mvlm.training.trainer import Trainer
from mvlm_dataloading import DataError

ALIKE = ("device", "processor", "instructions", "ranks")
"""Fields of two machines of the same kind. Threads are set as the run had them."""


@dataclass(frozen=True, slots=True)
class Segment:
    """Steps `start` + 1 to `stop`, replayed from the state after `start`."""

    start: int
    stop: int


@dataclass
class Replayed:
    """State and rows after a replayed segment."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    """Time of the steps."""
    before: dict[str, Tensor] = field(default_factory=dict)
    """Weights at the start."""
    parts: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    """Tensors of a checkpoint at the end: model, optimizer and, if the run keeps it, the average."""
    state: dict[str, Any] = field(default_factory=dict)
    """Position in the data and skipped updates, as a checkpoint's state.json has them."""
    way_off: float | None = None
    """Difference of the weights from the run's, as a fraction of their way since the start."""


def plan_segments(kept: Iterable[int], rows: Iterable[int], steps: int, reach: int, rng: Random) -> list[Segment]:
    """Choose what to replay: `steps` random steps, the last segment, and the first row after every checkpoint.

    A step is replayed from the nearest checkpoint before it, or from the initial weights, and on to the next
    checkpoint, so that its weights are compared too. If that is more than `reach` steps away, the replay ends at the
    first row from the step on; steps without such a row within reach are left out (`not_begun`, `not_replayed`).

    Args:
        kept: steps of the checkpoints, ascending; the last is the end of the run.
        rows: steps with a row of metrics, ascending.
    """
    points = [0, *kept]
    following, seen = dict(pairwise(points)), sorted({*rows, *kept})

    def segment(step: int) -> Segment:
        start = points[bisect_left(points, step) - 1]
        wanted = following[start] if following[start] - start <= reach else step
        return Segment(start, seen[bisect_left(seen, wanted)])

    def within(one: Segment) -> bool:
        return one.stop - one.start <= reach

    possible = [step for step in range(1, points[-1] + 1) if within(segment(step))]
    drawn = rng.sample(possible, min(steps, len(possible)))
    beginnings = [Segment(start, seen[bisect_right(seen, start)]) for start in points[:-1]]
    stops: dict[int, int] = {}
    for one in filter(within, [*beginnings, *map(segment, [*drawn, points[-1]])]):
        stops[one.start] = max(one.stop, stops.get(one.start, 0))
    return [Segment(start, stop) for start, stop in sorted(stops.items())]


class Replay:
    """Replays segments of a run on this machine, through the functions that train and resume. It writes nothing.

    Args:
        device: auto, cpu or cuda. auto: a GPU if the run had one and there is one.
    """

    def __init__(self, claims: Claims, device: str = "auto") -> None:
        self.claims = claims
        had_gpu = claims.parts[-1]["machine"]["device"] != "cpu"
        chosen = choose_device("cpu" if device == "auto" and not had_gpu else device)
        self.world = World(rank=0, size=1, local_rank=0, device=chosen)
        evaluated = any("tr_r1" in row for row in claims.rows)
        # What only the run's kind of device has. Bits are then not compared.
        other: dict[str, Any] = {"cuda_graphs": False, "self_attention": "auto", "cross_attention": "auto"}
        config = replace(
            claims.config,
            **({} if (chosen.type != "cpu") == had_gpu else other),
            device=chosen.type,
            preemption_file=None,
            wandb=False,
            trackio=False,
            keep_images_mb=0,  # a few batches do not pay for decoding the whole split
            eval_every_steps=int(evaluated),  # opens the validation split
            eval_every_minutes=0.0,
        )
        self.inputs = open_inputs(config)

    def exact(self, part: dict[str, Any]) -> bool:
        """True if this machine has to give the bits of a part: the same kind, versions, and kernels that repeat."""
        here = describe_machine(self.world.device)
        alike = all(here[name] == part["machine"].get(name) for name in ALIKE)
        repeats = self.world.device.type == "cpu" or self.claims.config.deterministic
        return alike and repeats and package_versions() == part["versions"]

    def run(self, segment: Segment) -> Replayed:
        """Make the steps of a segment again."""
        part = self.claims.part_of(segment.start + 1)
        config = replace(self.inputs.config, precision=part["precision"])
        kernels = deterministic_kernels(self.world.device) if config.deterministic else nullcontext()
        checkpoint = self.claims.run.checkpoints / checkpoint_name(segment.start) if segment.start else ""
        with kernels, threads(part["machine"]["threads"]):
            trainer = build_trainer(self.inputs._replace(config=config), self.world, str(checkpoint))
            found = Replayed(before={name: t.clone() for name, t in trainer.model.state_dict().items()})
            self._train(trainer, segment.stop, config, found)
        found.parts = {
            MODEL: trainer.model.state_dict(),
            OPTIMIZER: optimizer_tensors(trainer.model, trainer.optimizer),
            **({} if trainer.average is None else {EMA: trainer.average.tensors}),
        }
        found.state = {"loader": trainer.loader.state_dict(), "bad": trainer.skipped.state()}
        return found

    def _train(self, trainer: Trainer, stop: int, config: PretrainConfig, found: Replayed) -> None:
        """Make steps up to `stop`, with a row, and an evaluation, wherever the run has one."""
        claimed = {row["step"]: row for row in self.claims.rows}
        logger = MetricsLogger(config, self.world, _Rows(found.rows), trainer.check_skipped_updates)
        batches = iter(trainer.loader)
        with closing(trainer.loader), TrainingProgress(trainer.step, stop, shown=False) as progress:
            while trainer.step < stop:
                started = time.perf_counter()
                with threads(self.claims.part_of(trainer.step + 1)["machine"]["threads"]):
                    trainer.one_step(batches)
                found.seconds += time.perf_counter() - started
                if trainer.step not in claimed:
                    continue
                figures = {}
                if "tr_r1" in claimed[trainer.step] and trainer.validation is not None:
                    with threads(self.claims.part_of(trainer.step)["machine"]["threads"]):
                        figures = trainer.evaluate(trainer.validation, None)
                closed, trainer.metrics = trainer.metrics, MetricsBuffer()
                logger.end_row(closed, trainer.loader.skipped, figures)
                logger.write_row(progress)

    def compare(self, segment: Segment, found: Replayed) -> tuple[list[str], str]:
        """Differences between a replayed segment and the run that are not allowed, and how they compare, in words."""
        made_by = [self.claims.part_of(step) for step in range(segment.start + 1, segment.stop + 1)]
        exact = all(self.exact(part) for part in made_by)
        precision = None if exact else made_by[0]["precision"]
        claimed = {row["step"]: row for row in self.claims.rows}
        pairs = [(claimed[row["step"]], row) for row in found.rows]
        # Rows of several ranks count the undecodable images of rank 0, checkpoints those of all.
        pairs = [
            (a | {"skipped": b["skipped"]} if self.claims.part_of(b["step"])["machine"]["ranks"] > 1 else a, b)
            for a, b in pairs
        ]
        problems = [problem for a, b in pairs for problem in compare_rows(a, b, precision)]
        path, what = self.claims.run.checkpoints / checkpoint_name(segment.stop), "rows"
        if path in self.claims.kept:
            problems += self._compare_checkpoint(path, found, precision)
            last = segment.stop == self.claims.config.max_steps
            what = "rows and the final weights" if last else "rows and weights"
        if precision is None:
            return problems, f"{what} are equal bit for bit"
        bounds, largest, weights = BOUNDS[precision], largest_difference(pairs), ""
        if found.way_off is not None:
            weights = f", weights by {found.way_off:.1e} of their way since the checkpoint (bound {bounds.weights:g})"
        return problems, (
            f"{what} agree as on another kind of machine, in {precision}: losses differ by at most {largest:.1e} "
            f"(bound {bounds.losses:g}){weights}"
        )

    def _compare_checkpoint(self, path: Path, found: Replayed, precision: str | None) -> Iterator[str]:
        """Tensors and state of a checkpoint that the replay has arrived at."""
        try:
            tensors = {part: {n: torch.empty_like(t) for n, t in own.items()} for part, own in found.parts.items()}
            for part, wanted in tensors.items():
                read_tensors(path / part, wanted)
        except RunError as error:
            yield str(error)
            return
        state = read_state(path)
        for name in ("epoch", "position", "skipped"):
            if state["loader"][name] != found.state["loader"][name]:
                yield f"{path.name}: {name} {state['loader'][name]}, replayed {found.state['loader'][name]}"
        if state["bad"]["total"] != found.state["bad"]["total"]:
            yield f"{path.name}: {state['bad']['total']} skipped updates, replayed {found.state['bad']['total']}"
        found.way_off = way_off(tensors[MODEL], found.parts[MODEL], found.before, found.parts[MODEL])
        yield from (f"{path.name}: {text}" for text in compare_weights(tensors, found.parts, found.before, precision))


class _Rows:
    """Sink of a logger that keeps the rows in a list."""

    seconds = 0.0

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self._rows = rows

    def log(self, row: dict[str, Any]) -> None:
        self._rows.append(row)


@contextlib.contextmanager
def threads(number: int) -> Iterator[None]:
    """Context in which torch computes with so many threads: sums over other numbers of threads round otherwise."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def check_replay(replay: Replay, segment: Segment) -> Check:
    """Replay a segment and compare it with the run."""
    steps = f"step {segment.stop}"
    if segment.stop - segment.start > 1:
        steps = f"steps {segment.start + 1} to {segment.stop}"
    try:
        found = replay.run(segment)
    except (RunError, DataError, NonFiniteLossError) as error:
        return Check("replay", False, f"{steps}: cannot be made again: {error}")
    problems, how = replay.compare(segment, found)
    return verdict("replay", [f"{steps}: {p}" for p in problems], f"{steps}: {how} ({found.seconds:.0f} s)")


def not_begun(segments: list[Segment], kept: list[int], reach: int) -> Check | None:
    """A no for checkpoints, and the start, from which no step was replayed; None if there are none.

    Nothing then ties the rows after such a checkpoint to its weights, nor the first rows to random weights.
    """
    begun = {segment.start for segment in segments}
    missing = [str(start) for start in [0, *kept[:-1]] if start not in begun]
    if not missing:
        return None
    steps = f"step{'s' * (len(missing) > 1)} {', '.join(missing[:3])}{' and more' * (len(missing) > 3)}"
    return Check("replay", False, f"no row or checkpoint follows {steps} within {reach} steps; raise --reach")


def not_replayed(segments: list[Segment], last: int) -> Check | None:
    """Note of the steps that were not replayed; None if all were."""
    made = {step for s in segments for step in range(s.start + 1, s.stop + 1)}
    if len(made) == last:
        return None
    return Check("replay", None, f"{last - len(made):,} of {last:,} steps were not replayed")
