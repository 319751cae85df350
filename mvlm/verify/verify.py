"""`verify_run`: all checks of a finished run. Its files are compared, segments made again, and its evaluation too.

`Claims` are what the run's folder says. A replayed segment begins at one of the run's checkpoints, and is compared with
its rows and weights bit for bit.
"""

import contextlib
import json
import logging
import random
from collections.abc import Iterator
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mvlm.config.groups import way_of
from mvlm.config.json_files import read_config, run_config
from mvlm.config.pretrain import PretrainConfig
from mvlm.device import choose_device, deterministic_kernels
from mvlm.distributed.world import World
from mvlm.errors import NonFiniteLossError, RunError
from mvlm.evaluation.evaluate import figures_of
from mvlm.machine import describe_machine, package_versions
from mvlm.model.pretrained import check_sizes
from mvlm.progress import TrainingProgress
from mvlm.runs.checkpoint import (
    MANIFEST,
    MODEL,
    checkpoint_name,
    checkpoints,
    read_folder_shapes,
    read_state,
    read_tensors,
    step_of,
    verify_checkpoint,
)
from mvlm.runs.folder import RunFolder, check_run_folder, read_metrics
from mvlm.runs.history import START, prefix_hash, read_history
from mvlm.runs.load import load_without_head
from mvlm.training.metrics import MetricsBuffer, MetricsLogger
from mvlm.training.own_code import with_named
from mvlm.training.rank_figures import FIELDS
from mvlm.training.run import build_trainer, open_inputs
from mvlm.training.trainer import Trainer
from mvlm_dataloading import DataError, Dataset, open_dataset
from mvlm_dataloading.dataset.description import shard_paths
from mvlm_dataloading.dataset.sample_index import fingerprint_of
from mvlm_dataloading.files import finite, sha256
from mvlm_dataloading.tools.reindex import lists_samples_of

log = logging.getLogger(__name__)
ALIKE = ("device", "processor", "instructions", "ranks")
"""Fields of a machine's description that must be equal for equal bits. Threads are set to the run's number instead."""
MEASURED = {"pairs_per_s", "data_wait_s", "seconds", "memory_mb", "mfu", *FIELDS}
"""Measured fields of a row of metrics, such as times and memory: they differ between runs and are not compared."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Claims:
    """Contents of a finished run's files, parsed and not yet verified."""

    run: RunFolder
    config: PretrainConfig
    """Settings of the run's config.json, with the folder of the data that it is verified on."""
    rows: dict[int, dict[str, Any]]
    """Rows of metrics by step."""
    parts: list[dict[str, Any]]
    """`start` events of the history, in order: one for each process that trained."""
    ways: list[dict[str, Any]]
    """For each process that trained, the settings that decide how its steps are computed, such as `deterministic`."""
    saves: dict[int, dict[str, Any]]
    """`save` events of the history by step, without those of steps that a later process repeated."""
    gaps: list[int]
    """Steps after which a process resumed though no process before it had saved a checkpoint of that step."""
    checkpoints: list[Path]
    """Checkpoints, oldest first. The last is that of the last step."""
    figures: dict[str, Any] | None
    """Content of the run's eval/test.json; None without one."""

    def part_of(self, step: int) -> dict[str, Any]:
        """The `start` event of the process that made a step, from 1."""
        return next(part for part in reversed(self.parts) if part["step"] < step)

    def way_at(self, step: int) -> dict[str, Any]:
        """Settings that decided how a step, counted from 1, was computed, such as `deterministic`."""
        return self.ways[max(number for number, part in enumerate(self.parts) if part["step"] < step)]

    def row_due(self, step: int) -> bool:
        """True if metrics.jsonl must have a row of a step, by the `log_every` of the process that made it.

        Histories of earlier versions do not name it; then the run's setting counts.
        """
        every = self.part_of(step).get("log_every", self.config.log_every)
        return step % every == 0 or step == self.config.max_steps


def read_claims(path: Path, data: Path | None) -> Claims:
    """Read the folder of a finished pretraining run; `data` replaces the folder of its data.

    RunError if the run is missing, not finished, not a pretraining run, or older than the history of runs.
    """
    check_run_folder(path)
    run = RunFolder(path)
    values = read_config(run.config)
    if "task" in values:
        raise RunError(f"{path}: wanted a pretraining run, found one of fine-tuning; only pretraining can be replayed")
    config = run_config(values, str(run.config))
    for file in (run.metrics, run.history):
        if not file.exists():
            raise RunError(
                f"{file}: wanted the {file.stem} of the run, found no such file; restore it, or train again with this "
                f"version of mvlm"
            )
    kept = checkpoints(run.checkpoints)
    reached = step_of(kept[-1]) if kept else 0
    if reached < config.max_steps:
        raise RunError(
            f"{path}: wanted a finished run, a checkpoint of step {config.max_steps}, found step {reached}; "
            f"finish it with --resume"
        )
    parts, saves, gaps = [], {}, []
    for event in read_history(run.history):
        if event["event"] == START:
            parts.append(event)
            gaps += [event["step"]] if event["step"] not in {0, *saves} else []
            saves = {step: save for step, save in saves.items() if step <= event["step"]}
        else:
            saves[event["step"]] = event
    if not parts or parts[0]["step"] != 0:
        raise RunError(f"{run.history}: wanted a history that begins with the start of the run, found none; restore it")
    counts = [count for part in parts for count in (part["machine"]["threads"], part.get("log_every", 1))]
    if not all(map(_is_count, counts)) or not {part["precision"] for part in parts} <= {"fp32", "bf16"}:
        raise RunError(f"{run.history}: wanted the threads and the precision of each part, found others; restore it")
    names = way_of(config).keys()
    ways = [{name: value for name, value in part.get("way", {}).items() if name in names} for part in parts]
    return Claims(
        run=run,
        ways=[way_of(run_config(values | way, str(run.history))) for way in ways],
        config=replace(config, out=path, data=data or config.data),
        rows={row["step"]: row for row in read_metrics(run.metrics)},
        parts=parts,
        saves=saves,
        gaps=gaps,
        checkpoints=kept,
        figures=_read_figures(run.evaluation) if run.evaluation.exists() else None,
    )


def _read_figures(file: Path) -> dict[str, Any]:
    """Read the run's evaluation on the test split, eval/test.json. RunError if its content is none of an evaluation."""
    with figures_of(file) as found:
        good = {
            "rerank": _is_count(found["rerank"], least=0),  # 0: a model without ITM
            "precision": found["precision"] in ("fp32", "bf16"),
            "machine": _is_count(found["machine"]["threads"]),
            "versions": isinstance(found["versions"], dict),
        }
    if wrong := [name for name, fine in good.items() if not fine]:
        raise RunError(f"{file}: wanted the figures of `mvlm eval retrieval`, got another {wrong[0]}; evaluate again")
    return found


def _is_count(value: Any, least: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def wrong_data(claims: Claims) -> Iterator[str]:
    """Hash every shard of the run's splits and of the test split, and yield faults, a sentence each.

    Hashes are compared with dataset.json, the indices and the run's history.
    """
    recorded = {name for part in claims.parts for name in part["data"]}
    available = open_dataset(claims.config.data, "train").splits
    for split in sorted({"train", *recorded, *({"test"} & set(available))}):
        dataset = open_dataset(claims.config.data, split)
        yield from _damaged(dataset)
        if split == "validation" and claims.config.eval_images:
            dataset = dataset.head(claims.config.eval_images)
        for wanted in {part["data"].get(split, dataset.fingerprint) for part in claims.parts} - {dataset.fingerprint}:
            yield f"{split}: the run had the fingerprint {wanted[:12]}, {dataset.folder} {dataset.fingerprint[:12]}"


def _damaged(dataset: Dataset) -> Iterator[str]:
    """Yield faults of a split, a sentence each: an index with the fingerprint of other samples, shards of other bytes.

    Training reads the samples where the index says. So the index of a local split may list samples of its tars alone.
    """
    if dataset.index.fingerprint != fingerprint_of(
        dataset.index, dataset.split, dataset.shards, dataset.description.get("captions")
    ):
        yield f"{dataset.split}.index: its fingerprint is not that of its samples"
    if dataset.links is not None:
        yield from dataset.links.faults().values()
    if dataset.remote is not None:  # the cache compares a shard when it fetches it
        return
    for number, shard in enumerate(dataset.shards):
        tar, index = shard_paths(dataset.folder, shard)
        wanted = ((tar, shard["sha256"]), (index, shard.get("index_sha256")))
        if damaged := [file.name for file, digest in wanted if digest and sha256(file) != digest]:
            yield from (f"{name}: its sha256 is not that of dataset.json" for name in damaged)
        elif not lists_samples_of(tar, dataset.index, number):
            yield f"{dataset.split}.index: its samples are not those of {tar.name}"


def wrong_rows(claims: Claims) -> Iterator[str]:
    """Yield faults of metrics.jsonl, a sentence each: missing rows, and rows of another hash than the history has.

    A fault is also a step after which a process resumed though no process before it had saved that step.
    """
    yield from (f"a part continues after step {step}, which was not saved" for step in claims.gaps)
    due = filter(claims.row_due, range(1, claims.config.max_steps + 1))
    yield from (f"no row of step {step}" for step in due if step not in claims.rows)
    for step, save in sorted(claims.saves.items()):
        if prefix_hash(claims.run.metrics, save["metrics_bytes"]) != save["metrics"]:
            yield f"rows up to step {step} are not those that were saved with its checkpoint"
            return
    final = claims.saves.get(claims.config.max_steps)
    if final is not None and claims.run.metrics.stat().st_size != final["metrics_bytes"]:
        yield "rows were added after the last checkpoint"


def wrong_parts(path: Path, claims: Claims) -> Iterator[str]:
    """Hash the files of a checkpoint, and yield faults, a sentence each: in its manifest, its step or its data."""
    step = step_of(path)
    try:
        verify_checkpoint(path)
        state = read_state(path)
        reached, fingerprint = state["step"], state["loader"]["fingerprint"]
    except (RunError, PermissionError) as error:
        yield str(error)
        return
    except (KeyError, TypeError) as error:
        yield f"wanted the state of a run in state.json, found {error!r}"
        return
    if step not in claims.saves:
        yield "the history has no such save"
    elif sha256(path / MANIFEST) != claims.saves[step]["manifest"]:
        yield "its manifest is not the one that the history has"
    if reached != step:
        yield f"its state is of step {reached}"
    if fingerprint != claims.part_of(step)["data"].get("train"):
        yield f"its data have the fingerprint {fingerprint[:12]}"


class Segment(NamedTuple):
    """Training steps `start` + 1 to `stop` between two neighbouring checkpoints; `start` 0 is the initial weights."""

    start: int
    stop: int

    def __str__(self) -> str:
        return f"steps {self.start + 1} to {self.stop}"


def choose_segments(kept: list[int], steps: int) -> list[Segment]:
    """Choose segments to make again: the last one, and those that contain `steps` randomly drawn steps.

    kept: steps of the checkpoints, ascending.
    """
    segments = [Segment(*pair) for pair in pairwise([0, *kept])]
    drawn = random.SystemRandom().sample(range(1, kept[-1] + 1), min(steps, kept[-1]))
    return [s for s in segments if s.stop == kept[-1] or any(s.start < step <= s.stop for step in drawn)]


def check_machine(what: str, device: torch.device, machine: dict[str, Any], versions: dict[str, str]) -> None:
    """Raise RunError unless this machine must give bitwise the results of another, by its hardware and packages.

    Args:
        what: noun phrase for what was computed there, for the error.
        machine, versions: description of the other machine, and versions of its packages.
    """
    here = {name: describe_machine(device)[name] for name in ALIKE} | package_versions()
    there = {name: machine.get(name) for name in ALIKE} | versions
    if other := [name for name in sorted({*here, *there}) if here.get(name) != there.get(name)]:
        raise RunError(
            f"{what}: wanted the {other[0]} {there.get(other[0])}, found {here.get(other[0])}, which may give other "
            f"bits; verify on a machine and with packages like the run's"
        )


class Replay:
    """Trains segments of a run again, through the functions that train and resume, and writes nothing to the run.

    Args:
        device: auto, cpu or cuda. auto: a GPU if the run had one and there is one.
    """

    def __init__(self, claims: Claims, device: str = "auto") -> None:
        self.claims = claims
        # A run of others must not ask for a network that its weights do not have.
        last = claims.checkpoints[-1] / MODEL
        if not claims.config.adapted:  # else the model that it starts from is asked
            check_sizes(claims.config.model, read_folder_shapes(last), claims.run.config, last)
        had_gpu = claims.parts[-1]["machine"]["device"] != "cpu"
        chosen = choose_device("cpu" if device == "auto" and not had_gpu else device)
        self.world = World(rank=0, size=1, local_rank=0, device=chosen)
        if chosen.type != "cpu" and not all(way["deterministic"] for way in claims.ways):
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
        self.inputs = open_inputs(config, self.world)

    def differences(self, segment: Segment) -> Iterator[str]:
        """Train the steps of a segment again, and yield differences from the run, a sentence each.

        Compared are rows of metrics, the tensors of the checkpoint at its end, and counts such as skipped updates.

        RunError if this machine may give other bits.
        """
        claims, last = self.claims, self.claims.run.checkpoints / checkpoint_name(segment.stop)
        for part in {id(p): p for p in map(claims.part_of, range(segment.start + 1, segment.stop + 1))}.values():
            check_machine(str(segment), self.world.device, part["machine"], part["versions"])
        ways = [claims.way_at(step) for step in range(segment.start + 1, segment.stop + 1)]
        if any(way != ways[0] for way in ways):
            raise RunError(
                f"{segment}: wanted one way of computing, found that a resume changed it between, where no checkpoint "
                f"is left; keep all with --keep-checkpoints 0"
            )
        try:
            trainer, rows = self._make(segment)
            parts = trainer.tensors()
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
        """Train the steps of a segment. Returns the trainer, and a row of metrics wherever the run has one."""
        rows: list[dict[str, Any]] = []
        claims = self.claims
        first = claims.part_of(segment.start + 1)
        config = replace(self.inputs.config, precision=first["precision"], **claims.way_at(segment.start + 1))
        checkpoint = claims.run.checkpoints / checkpoint_name(segment.start) if segment.start else ""
        with deterministic_kernels(self.world.device) if config.deterministic else nullcontext():
            with threads(first["machine"]["threads"]):
                trainer = build_trainer(self.inputs._replace(config=config), self.world, str(checkpoint))
            logger = MetricsLogger(config, self.world, trainer.check_skipped_updates, rows.append)
            batches = iter(trainer.loader)
            with closing(trainer.loader), TrainingProgress(trainer.step, segment.stop, shown=False) as progress:
                while trainer.step < segment.stop:
                    with threads(claims.part_of(trainer.step + 1)["machine"]["threads"]):
                        figures = trainer.also_evaluate()
                        trainer.one_step(batches)
                        row = claims.rows.get(trainer.step)
                        if row is not None and "tr_r1" in row and trainer.validation is not None:
                            figures |= trainer.evaluate(trainer.validation, None)
                        figures |= trainer.also_evaluate()
                    if row is not None:
                        closed, trainer.metrics = trainer.metrics, MetricsBuffer()
                        logger.end_row(closed, trainer.loader.skipped, figures)
                        logger.write_row(progress)
        return trainer, rows


@contextlib.contextmanager
def threads(number: int) -> Iterator[None]:
    """Context in which torch uses `number` threads: sums over another number of threads round otherwise."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Check(NamedTuple):
    """Outcome of one check of a run: its subject, and the deviations that it found."""

    what: str
    problems: list[str]
    """Deviations from the claims, a sentence each. Empty if all is as claimed."""


def verify_run(
    path: Path,
    data: Path | None = None,
    *,
    steps: int = 0,
    device: str = "auto",
    own_loss: str | None = None,
    own_masks: str | None = None,
) -> Iterator[Check]:
    """Verify a finished pretraining run, check by check. Nothing in its folder is changed.

    Its files are compared with the history and the data. Where data and checkpoints are sound, the steps from the last
    checkpoint but one to the end are made again, and the final weights are evaluated.

    Args:
        path: folder of the run.
        data: folder of its data. Default: that of its config.json.
        steps: random steps to replay too, each with all steps from the checkpoint before it to the one after it.
        device: device of the replay and the evaluation: auto, cpu or cuda.
        own_loss, own_masks: the run's own functions, named again: they are run. Their files have the run's hashes.

    Raises:
        ConfigError: a function has another hash than the run's.
        RunError: there is no such run, it is not finished, or this machine may give other bits than the run's.
        DataError: the data are missing.
    """
    claims = read_claims(path, data)
    yield (same := Check("data: hashes and fingerprints are those of the run", list(wrong_data(claims))))
    yield Check("rows of metrics: hashes are those of the history", list(wrong_rows(claims)))
    problems = [f"{path.name}: {problem}" for path in claims.checkpoints for problem in wrong_parts(path, claims)]
    yield (sound := Check("checkpoints: hashes are those of the history", problems))
    if sound.problems or same.problems:  # a replay would only say the same
        return
    config = with_named(claims.config, claims.run.path, {"own_loss": own_loss, "own_masks": own_masks})
    replay = Replay(replace(claims, config=config), device)
    for segment in choose_segments([step_of(path) for path in claims.checkpoints], steps):
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
        yield f"no {file}: run `{claims.run.evaluation_command(claims.config.data)}`"
        return
    check_machine(str(file), replay.world.device, claimed["machine"], claimed["versions"])
    with threads(claimed["machine"]["threads"]):
        model = load_without_head(claims.checkpoints[-1], replay.world.device, claimed["precision"])
        if claimed.get("split") != "test":
            yield f"{file} is of the split {claimed.get('split')} and not of test; evaluate the run again"
        elif claimed.get("model") != model.sha256:
            other = "of other weights than the last checkpoint's, or at another image size or text length"
            yield f"{file} is {other}; evaluate the run again"
        else:
            test, train = (open_dataset(claims.config.data, name) for name in ("test", "train"))
            found = model.evaluate(test, train, claimed["rerank"]).figures
            found.pop("seconds")
            for name in NEW_FIGURES.difference(claimed):
                found.pop(name)
            yield from _differences(claimed, json.loads(json.dumps(finite(found))))


NEW_FIGURES = frozenset(
    ["repeats", "gain_mim_pct", "gain_mim_pct_95", "gain_untrained_pct", "gain_untrained_pct_95", "masked_mim"]
)
"""Figures that files of earlier versions lack."""


def _differences(claimed: Any, found: Any, name: str = "") -> Iterator[str]:
    """Differences between two nested dictionaries of figures, a sentence each, by dotted name."""
    if isinstance(claimed, dict) and isinstance(found, dict):
        for key, value in found.items():
            yield from _differences(claimed.get(key), value, f"{name}.{key}")
    elif claimed != found:
        yield f"{name[1:]} is {claimed}, found {found}"
