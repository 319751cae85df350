"""Tasks by name, and trained models and tasks loaded from their folders."""

import importlib
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mvlm.config.json_files import task_options
from mvlm.device import choose_device
from mvlm.errors import ConfigError, RunError
from mvlm.files import check_finite
from mvlm.inference.trained_model import TrainedModel
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
from mvlm.tasks.task import Task
from mvlm.training.own_code import run_file
from mvlm_dataloading import Tokenizer

log = logging.getLogger(__name__)


def find_task(name: str) -> type[Task]:
    """Class of a task.

    name: name of a task of the library, or path of a Python file of the user's that defines one subclass of `Task`. The
        file is run.

    ConfigError for an unknown name, or a file that does not define exactly one task.
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


def described_task(checkpoint: Path) -> dict[str, Any] | None:
    """Name, options and state of the task in a verified checkpoint (`Task.describe`); None if it is of pretraining.

    An option that this version no longer has is left out if it had its default, else ConfigError. One that the
    checkpoint does not have gets its default.
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
    """Load the task of a verified checkpoint, in eval mode on `device`, and its tokenizer.

    described: name, options and state of the task, from `described_task`.
    """
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
