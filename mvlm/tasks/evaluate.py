"""Predictions of a task on a split, and their figures."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mvlm.device import autocast, chosen_precision
from mvlm.distributed.coordination import check_same, run_on_all_ranks
from mvlm.distributed.world import World
from mvlm.errors import RunError
from mvlm.evaluation.workspace import ALONE, SAME_WORK, Workspace
from mvlm.inference.encode import BATCH, eval_loader
from mvlm.inference.trained_model import hash_of
from mvlm.tasks.registry import load_task
from mvlm.tasks.retrieval import Retrieval
from mvlm.tasks.task import Task
from mvlm_dataloading import Dataset, Tokenizer, open_dataset


@torch.no_grad()
def predict_split(
    task: Task,
    dataset: Dataset,
    tokenizer: Tokenizer,
    precision: str = "auto",
    plan: str = "fast",
    go_on: Callable[[], bool] = lambda: True,
    world: World = ALONE,
) -> list[dict[str, Any]] | None:
    """A record {"sample": id, **prediction} for every sample of a split, in order, on every rank of `world`.

    Each rank predicts a part of the split, in the batches that one rank would make. The task's mode is restored.

    Args:
        go_on: asked after each batch. If it is False on one rank before its last one, the work ends on all, with None
            in place of records.
    """
    was_training = task.training
    task.eval()
    device = task.log_scale.device
    start, stop = share(len(dataset), world.rank, world.size)
    part, records = dataset.rows(start, stop), []
    options = {"per_image": 1 if task.shares else None, **task.loader_options()}

    def predict() -> None:
        for batch, _ in eval_loader(part, task.model, tokenizer, **options) if start < stop else ():
            with autocast(device, precision):
                predictions = task.predict(batch.to(device), plan)
            records.extend(
                {"sample": start + i, **p} for i, p in zip(batch.sample_id.tolist(), predictions, strict=True)
            )
            if not go_on():
                return

    run_on_all_ranks(world, predict)
    task.train(was_training)
    found = world.gather_objects({"records": records, "whole": len(records) == stop - start})
    if not all(part["whole"] for part in found):
        return None
    return join_records([part["records"] for part in found], len(dataset))


def share(samples: int, rank: int, ranks: int) -> tuple[int, int]:
    """First sample of a rank's part of a split, and the one after its last. Parts begin at multiples of a batch."""
    batches = -(-samples // BATCH)
    start, stop = (min(samples, BATCH * (batches * place // ranks)) for place in (rank, rank + 1))
    return start, stop


def join_records(parts: list[list[dict[str, Any]]], samples: int) -> list[dict[str, Any]]:
    """The records of all ranks by their samples' ids, 0 to `samples` - 1. RunError if one is missing or there twice."""
    found = sorted((record for part in parts for record in part), key=lambda record: record["sample"])
    if [record["sample"] for record in found] != list(range(samples)):
        ids = {record["sample"] for record in found}
        raise RunError(
            f"records: wanted one for each of {samples} samples, found {len(found)} for {len(ids)} samples; "
            f"evaluate the split again"
        )
    return found


def evaluate_task(
    checkpoint: Path,
    data: Path,
    split: str,
    device: torch.device | str = "cpu",
    world: World = ALONE,
    kind: type[Task] | None = None,
    precision: str = "auto",
    **changes: Any,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Figures of a fine-tuned run on a split, and its records. `kind` and `changes` are those of `load_task`.

    Retrieval ranks the whole split and has no records; `mvlm eval retrieval` says more about it.

    Before anything is predicted: DataError for a split that the task cannot score, and RunError, on rank 0 alone, if
    ranks have different models, options or data, or compute differently.
    """

    def prepare() -> tuple[Task, Tokenizer, Dataset]:
        task, tokenizer = load_task(checkpoint, device, kind, **changes)
        dataset = open_dataset(data, split)
        task.check_split(dataset, task.state)
        return task, tokenizer, dataset

    task, tokenizer, dataset = run_on_all_ranks(world, prepare)
    about = {"task": task.name, "split": split, "model": hash_of(task.config, tokenizer, task)}
    used = {"data": dataset.fingerprint, "device": task.log_scale.device.type}
    used["precision"] = chosen_precision(task.log_scale.device, precision)
    check_same(world, {**about, **task.options.plain(), **used}, SAME_WORK)
    if isinstance(task, Retrieval):
        return {**about, **task.evaluate(dataset, tokenizer, precision, Workspace(None, world))}, []
    records = predict_split(task, dataset, tokenizer, precision, world=world)
    assert records is not None
    return {**about, **run_on_all_ranks(world, lambda: task.score(records, dataset))}, records
