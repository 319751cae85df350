"""The tasks by name, and tasks loaded from finished runs."""

import importlib
import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from mvlm.config.json_files import task_options
from mvlm.errors import ConfigError, RunError
from mvlm.files import check_finite
from mvlm.model.maskvlm import MaskVLM
from mvlm.model.pretrained import WEIGHTS_FILE
from mvlm.model.shapes import check_sizes
from mvlm.runs.checkpoint import EMA, MANIFEST, MODEL, MODEL_CONFIG, read_folder_shapes, read_state, read_tensors
from mvlm.runs.folder import find_checkpoint
from mvlm.runs.load import read_architecture
from mvlm.tasks import task_names
from mvlm.tasks.task import Task
from mvlm_dataloading import Tokenizer


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
    wanted = (kind.name,) if kind else task_names()
    if described["name"] not in wanted:
        raise RunError(
            f"{path}: wanted a run of the task {', '.join(wanted)}, found one of {described['name']}; name that task, "
            f"or the file that defines it"
        )
    config, tokenizer = read_architecture(folder)
    check_sizes(config, read_folder_shapes(folder / MODEL, "model."), folder / MODEL_CONFIG, folder / MODEL)
    options = replace(task_options(described["options"], described["name"], str(folder)), **changes)
    task = (kind or find_task(described["name"]))(MaskVLM(config), options, described["state"])
    averages = {name: p.detach() for name, p in task.named_parameters()} if (folder / EMA).is_dir() else {}
    if averages.keys() != task.state_dict().keys():  # buffers have no averages, tied weights one of one name
        read_tensors(folder / MODEL, task.state_dict())
    if averages:
        read_tensors(folder / EMA, averages)
    check_finite(task.state_dict(), folder)
    task.set_tokenizer(tokenizer)
    return task.to(device).eval(), tokenizer
