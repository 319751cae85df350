"""`mvlm finetune`: downstream tasks trained."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mvlm.tasks import task_names
from mvlm.terminal import say

if TYPE_CHECKING:
    from mvlm.config.finetune import FinetuneConfig

# Commands import what they need when they run, so that --help and errors are immediate.


def finetune(arguments: Sequence[str]) -> None:
    """Fine-tune a pretrained model on a task.

    `mvlm finetune TASK [RECIPE] --checkpoint RUN --data SHARDS --out RUN`.
    Tasks: {tasks}. `mvlm eval TASK` evaluates the finished run.
    TASK may be a Python file with a task of your own (docs/guides/tasks.md).
    Recipes: tiny (the default), for two CPU cores; base, for a model of the paper's size.
    `mvlm finetune --config FILE --out RUN` repeats the run whose config.json is FILE. Further settings override it.
    """
    if not arguments or arguments[0] in ("-h", "--help"):
        say(f"{finetune.__doc__}\nAll settings of a task: mvlm finetune TASK --help")
        return
    config = parse_config(arguments)
    from mvlm.tasks.finetune import finetune as run
    from mvlm.training.freed_memory import keep_freed_memory

    keep_freed_memory(config.device)
    run(config)


def parse_config(arguments: Sequence[str]) -> "FinetuneConfig":
    """The configuration of a task's recipe, or of a config.json, overridden by the given settings.

    Raises:
        ConfigError: the task or the recipe is unknown, or a setting is misspelt or out of its range.
        RunError: the config.json cannot be read.
    """
    import tyro

    from mvlm.commands.pretrain import parse_settings, split_config
    from mvlm.errors import ConfigError
    from mvlm.tasks.recipes import finetune_defaults

    task, words = ("", arguments) if arguments[0].startswith("-") else (arguments[0], arguments[1:])
    source, words = split_config(words)
    if source is not None:
        about = f"Fine-tune with the settings of {source}, which are the defaults below."
        return parse_settings(words, f"mvlm finetune --config {source}", about, _repeated(source, task))
    if task not in task_names() and not task.endswith(".py"):
        raise ConfigError(
            f"wanted a task after `mvlm finetune`: {', '.join(task_names())}, or a Python file with one, or --config "
            f"FILE; got {arguments[0]!r}"
        )
    recipe = "tiny"
    if words and not words[0].startswith("-"):
        recipe, words = words[0], words[1:]
    defaults = finetune_defaults(task, checkpoint=tyro.MISSING, data=tyro.MISSING, out=tyro.MISSING, recipe=recipe)
    about = f"Fine-tune on the task `{task}`. The defaults below are those of the `{recipe}` recipe."
    return parse_settings(words, f"mvlm finetune {task}", about, defaults)


def _repeated(source: str, task: str) -> "FinetuneConfig":
    """Read the configuration of a fine-tuned run from its config.json, to repeat the run.

    Args:
        source: path of the config.json.
        task: the task that the user named before --config; empty if none was.

    NOTE: a config.json may come from others. It names no Python file to run; the user does.
    """
    from mvlm.config.finetune import FinetuneConfig
    from mvlm.config.json_files import read_config, run_config
    from mvlm.errors import ConfigError

    values = read_config(Path(source))
    named = values.get("task")
    if named is None:
        raise ConfigError(
            f"{source}: wanted the configuration of a fine-tuned run, found one of pretraining; give it to "
            "`mvlm pretrain --config`"
        )
    if named in task_names() and task not in ("", named):
        raise ConfigError(f"{source}: wanted a run of the task {task}, found one of {named}; leave the task out")
    if named not in task_names() and not task.endswith(".py"):
        raise ConfigError(
            f"{source}: wanted a task of mvlm, found {named!r}; if you know that file, name it: "
            f"`mvlm finetune FILE.py --config {shlex.quote(source)}`"
        )
    return run_config(values | {"task": task or named}, source, FinetuneConfig)


finetune.__doc__ = (finetune.__doc__ or "").format(tasks=", ".join(task_names()))
