"""`mvlm finetune`: downstream tasks trained."""

from collections.abc import Sequence

from mvlm.tasks import task_names
from mvlm.terminal import say

# Commands import what they need when they run, so that --help and errors are immediate.


def finetune(arguments: Sequence[str]) -> None:
    """Fine-tune a pretrained model on a task.

    `mvlm finetune TASK [RECIPE] --checkpoint RUN --data SHARDS --out RUN`.
    Tasks: {tasks}. `mvlm eval TASK` evaluates the finished run.
    TASK may be a Python file with a task of your own (docs/guides/tasks.md).
    Recipes: tiny (the default), for two CPU cores; base, for a model of the paper's size.
    """
    if not arguments or arguments[0] in ("-h", "--help"):
        say(f"{finetune.__doc__}\nAll settings of a task: mvlm finetune TASK --help")
        return
    import tyro

    from mvlm.commands.pretrain import parse_settings
    from mvlm.errors import ConfigError
    from mvlm.tasks.recipes import finetune_defaults

    if arguments[0] not in task_names() and not arguments[0].endswith(".py"):
        raise ConfigError(
            f"wanted a task after `mvlm finetune`: {', '.join(task_names())}, or a Python file with one; "
            f"got {arguments[0]!r}"
        )
    task, words, recipe = arguments[0], arguments[1:], "tiny"
    if words and not words[0].startswith("-"):
        recipe, words = words[0], words[1:]
    defaults = finetune_defaults(task, checkpoint=tyro.MISSING, data=tyro.MISSING, out=tyro.MISSING, recipe=recipe)
    about = f"Fine-tune on the task `{task}`. The defaults below are those of the `{recipe}` recipe."
    config = parse_settings(words, f"mvlm finetune {task}", about, defaults)
    from mvlm.tasks.finetune import finetune as run
    from mvlm.training.freed_memory import keep_freed_memory

    keep_freed_memory(config.device)
    run(config)


finetune.__doc__ = (finetune.__doc__ or "").format(tasks=", ".join(task_names()))
