"""The tasks by name, tasks loaded from finished runs, their predictions on a split, and their figures."""

import importlib.util
import logging
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from mvlm.config.json_files import task_options
from mvlm.device import autocast, choose_device, chosen_precision
from mvlm.distributed.coordination import check_same, run_on_all_ranks
from mvlm.distributed.world import World
from mvlm.errors import ConfigError, RunError
from mvlm.evaluation.workspace import ALONE, SAME_WORK, Workspace
from mvlm.files import check_finite
from mvlm.inference.encode import BATCH, eval_loader
from mvlm.inference.trained_model import TrainedModel, hash_of
from mvlm.model.pretrained import WEIGHTS_FILE
from mvlm.runs.checkpoint import MANIFEST, MODEL, read_state
from mvlm.runs.folder import find_checkpoint, log_unfinished
from mvlm.runs.load import (
    find_model,
    network_of,
    read_architecture,
    read_network,
    read_weights,
    warn_without_itm,
)
from mvlm.tasks import task_names
from mvlm.tasks.retrieval import Retrieval
from mvlm.tasks.task import Task
from mvlm_dataloading import Dataset, Tokenizer, open_dataset

log = logging.getLogger(__name__)


def find_task(name: str) -> type[Task]:
    """The task of this name, or the one subclass of `Task` that a Python file of the user's defines, which is run.

    ConfigError for an unknown name, or a file without one task.
    """
    if name.endswith(".py"):
        module = run_file(Path(name))
    elif name in task_names():
        module = importlib.import_module(f"mvlm.tasks.{name}")
    else:
        raise ConfigError(f"task: wanted one of {', '.join(task_names())}, or a Python file with a task, got {name!r}")
    kinds = [x for x in vars(module).values() if isinstance(x, type) and issubclass(x, Task)]
    own = [kind for kind in kinds if kind.__module__ == module.__name__]
    if len(own) != 1:
        where = module.__file__
        raise ConfigError(f"{where}: wanted one subclass of mvlm.tasks.task.Task, found {len(own)}; split the file")
    return own[0]


def run_file(file: Path) -> ModuleType:
    """The module of a Python file. ConfigError if there is no such file."""
    if not file.is_file():
        raise ConfigError(f"{file}: wanted a Python file with a task, found no such file; check the path")
    spec = importlib.util.spec_from_file_location(f"task file {file.resolve()}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module  # dataclasses look their annotations up there
    spec.loader.exec_module(module)
    return module


def described_task(checkpoint: Path) -> dict[str, Any] | None:
    """The `Task.describe` of a verified checkpoint, or None in one of pretraining.

    Options that are gone are left out if they had their default, and newer ones have it. ConfigError for an option that
    is gone at another value.
    """
    described = read_state(checkpoint).get("task")
    if described is None:
        return None
    name, options = described["name"], described["options"]
    state = {key: x for key, x in described["state"].items() if (key, x) != ("others", [])}  # of earlier versions
    return {"name": name, "options": task_options(options, name, str(checkpoint)).plain(), "state": state}


def load_task(
    path: Path, device: torch.device | str = "cpu", kind: type[Task] | None = None, **changes: Any
) -> tuple[Task, Tokenizer]:
    """Load a fine-tuned task, in eval mode on `device`, and its tokenizer, from a run or one of its checkpoints.

    The weights are the averaged ones (EMA) if the run kept them.

    Args:
        kind: the run's task, if it is the user's own; a checkpoint names no code to run.
        changes: options to change, of those that say how predictions are made.

    RunError for a pretraining run, a run of another task, or a damaged one.
    """
    if not (path / MANIFEST).is_file() and (path / WEIGHTS_FILE).is_file():
        raise RunError(f"{path}: wanted a fine-tuned run or one of its checkpoints, found an exported folder")
    folder = find_checkpoint(path)
    described = described_task(folder)
    if described is None:
        raise RunError(f"{path}: wanted a fine-tuned run, found a pretraining run; `mvlm finetune` makes one from it")
    return _read_task(folder, described, device, kind, **changes)


def _read_task(
    folder: Path, described: dict[str, Any], device: torch.device | str, kind: type[Task] | None, **changes: Any
) -> tuple[Task, Tokenizer]:
    """The task of a verified checkpoint that has this `described_task`, and its tokenizer."""
    wanted = (kind.name,) if kind else task_names()
    if described["name"] not in wanted:
        raise RunError(
            f"{folder}: wanted a run of the task {', '.join(wanted)}, found one of {described['name']}; name that "
            f"task, or the file that defines it"
        )
    config, tokenizer = read_architecture(folder)
    network = network_of(folder, config, folder / MODEL, "model.")
    options = replace(task_options(described["options"], described["name"], str(folder)), **changes)
    task = (kind or find_task(described["name"]))(network, options, described["state"])
    read_weights(task, folder)
    check_finite(task.state_dict(), folder)
    task.set_tokenizer(tokenizer)
    return task.to(device).eval(), tokenizer


def load_model(
    path: Path | str,
    device: torch.device | str = "auto",
    precision: str = "auto",
    image_size: int | None = None,
    text_length: int | None = None,
    task: Path | str | None = None,
) -> TrainedModel:
    """Load a trained model and its tokenizer, and of a fine-tuned run its task with the head.

    The weights are the averaged ones (EMA) if the run kept them. A warning is logged if the model was trained without
    ITM, and a line if it comes without the head that its run has.

    Args:
        path: a run, one of its checkpoints, an exported folder, the model.safetensors in one, or an id owner/name on
            the Hugging Face hub, if there is no folder `owner` here.
        device: auto (the GPU if there is one), cpu, cuda, or a `torch.device`.
        precision: auto, bf16 or fp32 (`mvlm.device.autocast`).
        image_size: side of images in pixels, for which position embeddings are resized. Default: as trained. A model of
            another size has no head.
        text_length: longest text in tokens, at most the trained one. Default: as trained. As for `image_size`.
        task: the Python file that defines the run's task, if it is your own: a checkpoint names no code to run.

    Raises:
        RunError: there is no such model, or it is damaged or of another kind; its settings, weights and tokenizer do
            not fit each other; or its weights are not finite. Sizes are compared before a network is made.
        PermissionError: a file of its checkpoint may not be read.
        ConfigError: there is no such device, precision or size, or no such file of a task.
    """
    kind = None if task is None else find_task(str(task))
    folder, exported = find_model(path)
    described = None if exported else described_task(folder)
    if kind is not None and described is None:
        raise RunError(f"{path}: wanted a run of the task {kind.name}, found a model without a task")
    heads = task_names() if kind is None else (kind.name,)
    if described is None or (kind is None and described["name"] not in heads) or image_size or text_length:
        if described is not None:
            advice = "" if described["name"] in heads else "; name the file that defines it with task"
            log.info("%s: the network without the head of the task %s%s", path, described["name"], advice)
        return read_network(folder, exported, path, device, precision, image_size, text_length)
    chosen = device if isinstance(device, torch.device) else choose_device(device)
    log_unfinished(Path(path), folder)
    loaded, tokenizer = _read_task(folder, described, chosen, kind)
    warn_without_itm(loaded.model, path)
    return TrainedModel(loaded.model, tokenizer, precision, folder, loaded)


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
    about["fingerprint"] = dataset.fingerprint
    used = {"device": task.log_scale.device.type}
    used["precision"] = chosen_precision(task.log_scale.device, precision)
    check_same(world, {**about, **task.options.plain(), **used}, SAME_WORK)
    if isinstance(task, Retrieval):
        return {**about, **task.evaluate(dataset, tokenizer, precision, Workspace(None, world))}, []
    if task.bootstrapped_over:
        about["bootstrapped_over"] = task.bootstrapped_over
    records = predict_split(task, dataset, tokenizer, precision, world=world)
    assert records is not None
    return {**about, **run_on_all_ranks(world, lambda: task.score(records, dataset))}, records
