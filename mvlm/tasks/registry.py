"""The tasks by name, and tasks loaded from finished runs."""

import json
from pathlib import Path
from typing import Any

import torch

from mvlm.config.json_files import model_config
from mvlm.errors import ConfigError, RunError
from mvlm.model.maskvlm import MaskVLM
from mvlm.runs.checkpoint import EMA, MODEL, MODEL_CONFIG, TOKENIZER, read_state, read_tensors
from mvlm.runs.folder import find_checkpoint
from mvlm.tasks.caption import Captioning
from mvlm.tasks.entailment import Entailment
from mvlm.tasks.pairs import Pairs
from mvlm.tasks.retrieval import Retrieval
from mvlm.tasks.task import Task, TaskOptions
from mvlm.tasks.vqa import VisualQuestionAnswering
from mvlm_dataloading import Tokenizer, load_tokenizer

TASKS: dict[str, type[Task]] = {
    task.name: task for task in (VisualQuestionAnswering, Entailment, Retrieval, Pairs, Captioning)
}
"""Tasks that can be fine-tuned, by name."""


def find_task(name: str) -> type[Task]:
    """The task of this name. ConfigError for an unknown one."""
    if name not in TASKS:
        raise ConfigError(f"task: wanted one of {', '.join(TASKS)}, got {name!r}")
    return TASKS[name]


def load_task(path: Path, device: torch.device | str = "cpu", **changes: Any) -> tuple[Task, Tokenizer]:
    """Load a fine-tuned task, in eval mode on `device`, and its tokenizer, from a run or one of its checkpoints.

    The weights are the averaged ones (EMA) if the run kept them. `changes` are options to change, of those that say how
    predictions are made. RunError for a pretraining run or a damaged one.
    """
    folder = find_checkpoint(path)
    described = read_state(folder).get("task")
    if described is None:
        raise RunError(f"{path}: wanted a fine-tuned run, found a pretraining run; `mvlm finetune` makes one from it")
    config = model_config(json.loads((folder / MODEL_CONFIG).read_text()), str(folder / MODEL_CONFIG))
    options = TaskOptions(**described["options"] | changes)
    task = find_task(described["name"])(MaskVLM(config), options, described["state"])
    read_tensors(folder / (EMA if (folder / EMA).is_dir() else MODEL), task.state_dict())
    tokenizer = load_tokenizer(folder / TOKENIZER)
    task.set_tokenizer(tokenizer)
    return task.to(device).eval(), tokenizer
