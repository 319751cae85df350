"""`verify_run`: all checks of a finished run. Its files are compared, segments made again, and its evaluation too.

A replayed segment begins at one of the run's checkpoints, and is compared with its rows and weights bit for bit.
"""

import contextlib
import json
import logging
import random
from collections.abc import Iterator
from contextlib import closing, nullcontext
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mvlm.device import choose_device, deterministic_kernels
from mvlm.distributed.world import World
from mvlm.errors import NonFiniteLossError, RunError
from mvlm.machine import describe_machine, package_versions
from mvlm.model.shapes import check_sizes
from mvlm.progress import TrainingProgress
from mvlm.runs.checkpoint import (
    EMA,
    MODEL,
    OPTIMIZER,
    checkpoint_name,
    optimizer_tensors,
    read_folder_shapes,
    read_state,
    read_tensors,
    step_of,
)
from mvlm.runs.load import load_model
from mvlm.training.metrics import MetricsBuffer, MetricsLogger
from mvlm.training.run import build_trainer, open_inputs
from mvlm.training.trainer import Trainer
from mvlm.verify.claims import Claims, read_claims, wrong_checkpoints, wrong_data, wrong_rows
from mvlm_dataloading import DataError, open_dataset
from mvlm_dataloading.files import finite

log = logging.getLogger(__name__)
ALIKE = ("device", "processor", "instructions", "ranks")
"""Fields in which two machines have to be equal to give the same bits. Threads are set as the run had them."""
MEASURED = {"pairs_per_s", "data_wait_s", "seconds", "memory_mb", "mfu"}
"""Fields of a row of metrics that no two runs share."""


class Segment(NamedTuple):
    """Steps `start` + 1 to `stop`, from one checkpoint, or from the initial weights, to the next."""

    start: int
    stop: int

    def __str__(self) -> str:
        return f"steps {self.start + 1} to {self.stop}"


def choose_segments(kept: list[int], steps: int) -> list[Segment]:
    """The last segment, and those of so many random steps. `kept` are the steps of the checkpoints, ascending."""
    segments = [Segment(*pair) for pair in pairwise([0, *kept])]
    drawn = random.SystemRandom().sample(range(1, kept[-1] + 1), min(steps, kept[-1]))
    return [s for s in segments if s.stop == kept[-1] or any(s.start < step <= s.stop for step in drawn)]


def check_machine(what: str, device: torch.device, machine: dict[str, Any], versions: dict[str, str]) -> None:
    """RunError unless this machine has to give the bits of another: its kind and its packages."""
    here = {name: describe_machine(device)[name] for name in ALIKE} | package_versions()
    there = {name: machine.get(name) for name in ALIKE} | versions
    if other := [name for name in sorted({*here, *there}) if here.get(name) != there.get(name)]:
        raise RunError(
            f"{what}: wanted the {other[0]} {there.get(other[0])}, found {here.get(other[0])}, which may give other "
            f"bits; verify on a machine and with packages like the run's"
        )


class Replay:
    """Makes segments of a run again, through the functions that train and resume. It writes nothing.

    Args:
        device: auto, cpu or cuda. auto: a GPU if the run had one and there is one.
    """

    def __init__(self, claims: Claims, device: str = "auto") -> None:
        self.claims = claims
        # A run of others must not ask for a network that its weights do not have.
        last = claims.kept[-1] / MODEL
        check_sizes(claims.config.model, read_folder_shapes(last), claims.run.config, last)
        had_gpu = claims.parts[-1]["machine"]["device"] != "cpu"
        chosen = choose_device("cpu" if device == "auto" and not had_gpu else device)
        self.world = World(rank=0, size=1, local_rank=0, device=chosen)
        if chosen.type != "cpu" and not claims.config.deterministic:
            raise RunError(f"{claims.run.path}: wanted a run with --deterministic, without which no GPU repeats bits")
        evaluated = any("tr_r1" in row for row in claims.rows.values())
        config = replace(
            claims.config,
            device=chosen.type,
            preemption_file=None,
            log_to=(),
            keep_images_mb=0,  # a few batches do not pay for decoding the whole split
            eval_every_steps=int(evaluated),  # opens the validation split
        )
        self.inputs = open_inputs(config)

    def differences(self, segment: Segment) -> Iterator[str]:
        """Make the steps of a segment again. Yields rows, tensors and counts that are not those of the run.

        RunError if this machine may give other bits.
        """
        claims, last = self.claims, self.claims.run.checkpoints / checkpoint_name(segment.stop)
        for part in {id(p): p for p in map(claims.part_of, range(segment.start + 1, segment.stop + 1))}.values():
            check_machine(str(segment), self.world.device, part["machine"], part["versions"])
        try:
            trainer, rows = self._make(segment)
            parts = {MODEL: trainer.model.state_dict(), OPTIMIZER: optimizer_tensors(trainer.model, trainer.optimizer)}
            if trainer.average is not None:
                parts[EMA] = trainer.average.tensors
            claimed = {part: {n: torch.empty_like(t) for n, t in tensors.items()} for part, tensors in parts.items()}
            for part, tensors in claimed.items():
                read_tensors(last / part, tensors)
        except (RunError, DataError, NonFiniteLossError) as error:
            yield f"cannot be made again: {error}"
            return
        for row in rows:
            theirs = claims.rows[row["step"]]
            for name in sorted({*theirs, *row} - MEASURED):
                if theirs.get(name) != row.get(name):
                    yield f"step {row['step']}: {name} is {theirs.get(name)}, replayed {row.get(name)}"
        for part, tensors in claimed.items():
            for name, tensor in tensors.items():
                if not torch.equal(tensor, parts[part][name]):
                    yield f"{last.name}: {part}/{name} is not the replayed one"
        state, loader = read_state(last), trainer.loader.state_dict()
        counts = {name: (state["loader"][name], loader[name]) for name in ("epoch", "position", "skipped")}
        counts["skipped updates"] = state["bad"]["total"], trainer.skipped.state()["total"]
        for name, (theirs, ours) in counts.items():
            if theirs != ours:
                yield f"{last.name}: {name} {theirs}, replayed {ours}"

    def _make(self, segment: Segment) -> tuple[Trainer, list[dict[str, Any]]]:
        """The trainer after the segment's steps, and a row, with an evaluation, wherever the run has one."""
        claims, rows = self.claims, _Rows()
        first = claims.part_of(segment.start + 1)
        config = replace(self.inputs.config, precision=first["precision"])
        checkpoint = claims.run.checkpoints / checkpoint_name(segment.start) if segment.start else ""
        with deterministic_kernels(self.world.device) if config.deterministic else nullcontext():
            with threads(first["machine"]["threads"]):
                trainer = build_trainer(self.inputs._replace(config=config), self.world, str(checkpoint))
            logger = MetricsLogger(config, self.world, rows, trainer.check_skipped_updates)
            batches = iter(trainer.loader)
            with closing(trainer.loader), TrainingProgress(trainer.step, segment.stop, shown=False) as progress:
                while trainer.step < segment.stop:
                    with threads(claims.part_of(trainer.step + 1)["machine"]["threads"]):
                        trainer.one_step(batches)
                        row, figures = claims.rows.get(trainer.step), {}
                        if row is not None and "tr_r1" in row and trainer.validation is not None:
                            figures = trainer.evaluate(trainer.validation, None)
                    if row is not None:
                        closed, trainer.metrics = trainer.metrics, MetricsBuffer()
                        logger.end_row(closed, trainer.loader.skipped, figures)
                        logger.write_row(progress)
        return trainer, rows.made


class _Rows:
    """Sink of a logger that keeps the rows in a list."""

    seconds = 0.0

    def __init__(self) -> None:
        self.made: list[dict[str, Any]] = []

    def log(self, row: dict[str, Any]) -> None:
        self.made.append(row)


@contextlib.contextmanager
def threads(number: int) -> Iterator[None]:
    """Context in which torch computes with so many threads: sums over other numbers of threads round otherwise."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Check(NamedTuple):
    """One thing that was looked at."""

    what: str
    problems: list[str]
    """What is not as claimed. Empty: all is."""


def verify_run(path: Path, data: Path | None = None, *, steps: int = 0, device: str = "auto") -> Iterator[Check]:
    """Verify a finished pretraining run, check by check. Nothing in its folder is changed.

    Its files are compared with the history and the data. Where data and checkpoints are sound, the steps from the last
    checkpoint but one to the end are made again, and the final weights are evaluated.

    Args:
        path: folder of the run.
        data: folder of its data. Default: that of its config.json.
        steps: random steps to replay too, each with all steps from the checkpoint before it to the one after it.
        device: device of the replay and the evaluation: auto, cpu or cuda.

    Raises:
        RunError: there is no such run, it is not finished, or this machine may give other bits than the run's.
        DataError: the data are missing.
    """
    claims = read_claims(path, data)
    yield (same := Check("data: hashes and fingerprints are those of the run", list(wrong_data(claims))))
    yield Check("rows of metrics: hashes are those of the history", list(wrong_rows(claims)))
    yield (sound := Check("checkpoints: hashes are those of the history", list(wrong_checkpoints(claims))))
    if sound.problems or same.problems:  # a replay would only say the same
        return
    replay = Replay(claims, device)
    for segment in choose_segments([step_of(path) for path in claims.kept], steps):
        log.info("replaying %s", segment)
        problems = [f"{segment}: {problem}" for problem in replay.differences(segment)]
        yield Check(f"{segment}: replayed, rows and weights are equal bit for bit", problems)
    yield Check("eval/test.json: evaluated again, figures are equal", list(wrong_figures(claims, replay)))


def wrong_figures(claims: Claims, replay: Replay) -> Iterator[str]:
    """Evaluate the final weights on the test split, as `mvlm eval retrieval` does, and compare with eval/test.json.

    RunError if it was evaluated on a machine that may give other bits.
    """
    file, claimed = claims.run.evaluation, claims.figures
    if claimed is None:
        yield f"no {file}: run `mvlm eval retrieval --checkpoint RUN --data DATA --out` it"
        return
    check_machine(str(file), replay.world.device, claimed["machine"], claimed["versions"])
    with threads(claimed["machine"]["threads"]):
        model = load_model(claims.kept[-1], replay.world.device, claimed["precision"])
        if claimed.get("split") != "test":
            yield f"{file} is of the split {claimed.get('split')} and not of test; evaluate the run again"
        elif claimed.get("model") != model.sha256:
            other = "of other weights than the last checkpoint's, or at another image size or text length"
            yield f"{file} is {other}; evaluate the run again"
        else:
            test, train = (open_dataset(claims.config.data, name) for name in ("test", "train"))
            found = model.evaluate(test, train, claimed["rerank"]).figures
            found.pop("seconds")
            yield from _differences(claimed, json.loads(json.dumps(finite(found))))


def _differences(claimed: Any, found: Any, name: str = "") -> Iterator[str]:
    """Figures, however deep, that are not those of `found`, by dotted name."""
    if isinstance(claimed, dict) and isinstance(found, dict):
        for key, value in found.items():
            yield from _differences(claimed.get(key), value, f"{name}.{key}")
    elif claimed != found:
        yield f"{name[1:]} is {claimed}, found {found}"
