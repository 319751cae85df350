"""Evaluation of a fine-tuned run on a split."""

from pathlib import Path
from typing import Any

import torch

from mvlm.device import chosen_precision
from mvlm.distributed.coordination import check_same, run_on_all_ranks
from mvlm.distributed.world import World
from mvlm.evaluation.workspace import ALONE, SAME_WORK, Workspace
from mvlm.inference.trained_model import hash_of
from mvlm.model.maskvlm import IMPLEMENTATIONS
from mvlm.tasks.load import load_task
from mvlm.tasks.task import Task
from mvlm_dataloading import Dataset, Tokenizer, open_dataset


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
    """Evaluate a fine-tuned run on a split: (scores and what they depend on, prediction of each sample in order).

    Retrieval ranks the whole split and has no predictions; `mvlm eval retrieval` says more about it.

    Args:
        kind: the run's task, if it is the user's own.
        changes: options to change, of those that say how predictions are made.

    Raises, before anything is predicted: DataError for a split that the task cannot score, and RunError, on rank 0
    alone, if ranks have different models, options or data, or compute differently.
    """

    def prepare() -> tuple[Task, Tokenizer, Dataset]:
        task, tokenizer = load_task(checkpoint, device, kind, **changes)
        dataset = open_dataset(data, split)
        task.check_split(dataset, task.state)
        return task, tokenizer, dataset

    task, tokenizer, dataset = run_on_all_ranks(world, prepare)
    about = {"task": task.name, "split": split, "model": hash_of(task.config, tokenizer, task)}
    about["fingerprint"] = dataset.fingerprint
    used = {"device": task.log_scale.device.type}
    used["precision"] = chosen_precision(task.log_scale.device, precision)
    check_same(world, {**about, **task.options.plain(), **used}, SAME_WORK)
    if task.bootstrapped_over:
        about["bootstrapped_over"] = task.bootstrapped_over
    figures, records = task.evaluate(dataset, precision, IMPLEMENTATIONS["fast"], Workspace(None, world))
    return {**about, **figures}, records
