"""Predictions of a task on a split, and their figures."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mvlm.device import autocast
from mvlm.inference.encode import eval_loader
from mvlm.tasks.registry import load_task
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
) -> list[dict[str, Any]]:
    """A record {"sample": id, **prediction} for every sample of a split, in order. The task's mode is restored.

    `go_on` is asked after each batch; False ends the work, with the records so far.
    """
    was_training = task.training
    task.eval()
    device = task.log_scale.device
    records = []
    for batch, _ in eval_loader(dataset, task.model, tokenizer):
        with autocast(device, precision):
            predictions = task.predict(batch.to(device), plan)
        records += [{"sample": i, **p} for i, p in zip(batch.sample_id.tolist(), predictions, strict=True)]
        if not go_on():
            break
    task.train(was_training)
    return records


def evaluate_task(
    checkpoint: Path, data: Path, split: str, device: torch.device | str = "cpu"
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Figures of a fine-tuned run on a split, and its records."""
    task, tokenizer = load_task(checkpoint, device)
    dataset = open_dataset(data, split)
    records = predict_split(task, dataset, tokenizer)
    return {"task": task.name, "split": split, **task.score(records, dataset)}, records
