"""Claims of a finished run, read from its folder, and its files compared with its history and its data."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mvlm.config.json_files import read_config, run_config
from mvlm.config.pretrain import PretrainConfig
from mvlm.errors import RunError
from mvlm.files import check_folder
from mvlm.runs.checkpoint import MANIFEST, checkpoints, read_state, step_of, verify_checkpoint
from mvlm.runs.folder import RunFolder, read_metrics
from mvlm.runs.history import START, prefix_hash, read_history
from mvlm_dataloading import Dataset, open_dataset
from mvlm_dataloading.dataset.description import shard_paths
from mvlm_dataloading.dataset.sample_index import fingerprint_of
from mvlm_dataloading.files import sha256
from mvlm_dataloading.tools.reindex import lists_samples_of


@dataclass(frozen=True, kw_only=True, slots=True)
class Claims:
    """Files of a finished run, parsed and not yet believed."""

    run: RunFolder
    config: PretrainConfig
    """Its config.json, with the folder of the data that it is verified on."""
    rows: dict[int, dict[str, Any]]
    """Rows of metrics by step."""
    parts: list[dict[str, Any]]
    """`start` events of the history, in order: one for each process that trained."""
    saves: dict[int, dict[str, Any]]
    """`save` events of the history by step, without those that a later part went back behind."""
    gaps: list[int]
    """Steps after which a part went on though no part before it had saved them."""
    kept: list[Path]
    """Checkpoints, oldest first. The last is that of the last step."""
    figures: dict[str, Any] | None
    """Its eval/test.json; None without one."""

    def part_of(self, step: int) -> dict[str, Any]:
        """The `start` event of the process that made a step, from 1."""
        return next(part for part in reversed(self.parts) if part["step"] < step)

    def row_due(self, step: int) -> bool:
        """True if a step has a row of metrics. Parts may differ in `log_every`; older histories do not name it."""
        every = self.part_of(step).get("log_every", self.config.log_every)
        return step % every == 0 or step == self.config.max_steps


def read_claims(path: Path, data: Path | None) -> Claims:
    """Read the folder of a finished pretraining run; `data` replaces the folder of its data.

    RunError if the run is missing, not finished, not a pretraining run, or older than the history of runs.
    """
    check_folder(path, "the folder of a finished run")
    run = RunFolder(path)
    values = read_config(run.config)
    if "task" in values:
        raise RunError(f"{path}: wanted a pretraining run, found one of fine-tuning; only pretraining can be replayed")
    config = run_config(values, str(run.config))
    for file in (run.metrics, run.history):
        if not file.is_file():
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
    return Claims(
        run=run,
        config=replace(config, out=path, data=data or config.data),
        rows={row["step"]: row for row in read_metrics(run.metrics)},
        parts=parts,
        saves=saves,
        gaps=gaps,
        kept=kept,
        figures=_read_figures(run.evaluation) if run.evaluation.is_file() else None,
    )


def _read_figures(file: Path) -> dict[str, Any]:
    """Figures on the test split. RunError for a file that no evaluation writes."""
    try:
        found = json.loads(file.read_text())
        assert isinstance(found, dict)
        good = {
            "rerank": _is_count(found["rerank"], least=0),  # 0: a model without ITM
            "precision": found["precision"] in ("fp32", "bf16"),
            "machine": _is_count(found["machine"]["threads"]),
            "versions": isinstance(found["versions"], dict),
        }
    except (ValueError, AssertionError, KeyError, TypeError, RecursionError) as error:
        good = {repr(error): False}
    if wrong := [name for name, fine in good.items() if not fine]:
        raise RunError(f"{file}: wanted the figures of `mvlm eval retrieval`, got another {wrong[0]}; evaluate again")
    return found


def _is_count(value: Any, least: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def wrong_data(claims: Claims) -> Iterator[str]:
    """Hash every shard of the run's splits and of the test split; compare with dataset.json, index and history."""
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
    """Files of a split that do not fit: an index with the fingerprint of other samples, shards with other bytes.

    Training reads the samples where the index says. So the index of a local split may list samples of its tars alone.
    """
    if dataset.index.fingerprint != fingerprint_of(dataset.index, dataset.split, dataset.shards):
        yield f"{dataset.split}.index: its fingerprint is not that of its samples"
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
    """Parts that do not join up, rows that are missing, and rows that are not those that the history has."""
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


def wrong_checkpoints(claims: Claims) -> Iterator[str]:
    """Hash the files of every kept checkpoint, and compare manifest, step and data."""
    for path in claims.kept:
        yield from (f"{path.name}: {problem}" for problem in _problems_of(path, claims))


def _problems_of(path: Path, claims: Claims) -> Iterator[str]:
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
