"""`mvlm finetune` and `mvlm eval TASK`: downstream tasks trained and evaluated."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from mvlm.tasks import task_names

# Commands import what they need when they run, so that --help and errors are immediate.


def finetune(arguments: Sequence[str]) -> None:
    """Fine-tune a pretrained model: `mvlm finetune TASK [RECIPE] --checkpoint RUN --data SHARDS --out RUN`.

    Tasks: {tasks}. `mvlm eval TASK` evaluates the finished run.
    TASK may be a Python file with a task of your own (docs/guides/tasks.md).
    Recipes: tiny (the default), for two CPU cores; base, for a model of the paper's size.
    """
    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"{finetune.__doc__}\nAll settings of a task: mvlm finetune TASK --help")
        return
    import tyro

    from mvlm.commands.pretrain import parse_settings
    from mvlm.config.recipes import finetune_defaults
    from mvlm.errors import ConfigError

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


def _evaluate(
    task: str,
    checkpoint: Path,
    data: Path,
    split: str,
    out: Path | None,
    predictions: Path | None,
    device: str,
    **changes: Any,
) -> None:
    import json

    from mvlm.commands.arguments import check_no_input, check_replaced, check_result_file
    from mvlm.distributed.coordination import joined_ranks, run_on_all_ranks
    from mvlm.errors import ConfigError
    from mvlm.tasks.evaluate import evaluate_task
    from mvlm.tasks.records import are_predictions, write_predictions
    from mvlm.tasks.registry import find_task
    from mvlm_dataloading import open_dataset
    from mvlm_dataloading.files import write_json

    def check() -> None:
        check_result_file(out)  # before minutes are spent
        if predictions is not None:
            check_no_input(predictions, out, flag="predictions")
            check_replaced(predictions, "earlier predictions", lambda old: are_predictions(task, old), "predictions")
        for name in ("lengths", "iterations"):
            if (number := changes.get(name)) is not None and number < 1:
                raise ConfigError(f"{name}: wanted at least 1, got {number}")

    given = {name: value for name, value in changes.items() if value is not None}
    with joined_ranks(device) as world:
        run_on_all_ranks(world, check)
        kind = run_on_all_ranks(world, lambda: find_task(task))
        figures, records = evaluate_task(checkpoint, data, split, world.device, world, kind, **given)
        if world.first:
            print(json.dumps(figures, indent=1))
            if out is not None:
                about = {"checkpoint": str(checkpoint), "data": str(data)}
                write_json(out, {**about, **figures, **given, "records": records})
            if predictions is not None:
                dataset = open_dataset(data, split)
                write_predictions(predictions, task, records, [dataset.metadata(i) for i in range(len(dataset))])


def eval_task(task: str) -> Callable[..., None]:
    """The command `mvlm eval TASK` of a task without options of its own."""

    def evaluate(
        *,
        checkpoint: Path,
        data: Path,
        split: str = "test",
        out: Path | None = None,
        predictions: Path | None = None,
        device: str = "auto",
    ) -> None:
        _evaluate(task, checkpoint, data, split, out, predictions, device)

    evaluate.__name__ = f"eval_{task}"
    evaluate.__doc__ = f"""Evaluate a run of `mvlm finetune {task}` on a data set.

    Args:
        checkpoint: Run folder of `mvlm finetune {task}`, or one of its checkpoints.
        data: Folder of shards.
        split: Split to evaluate on.
        out: JSON file for the figures and the predictions. Default: print the figures only.
        predictions: File for the predictions alone, in the format of the task's benchmark and of `mvlm score`.
        device: auto, cpu or cuda.
    """
    return evaluate


def eval_caption(
    *,
    checkpoint: Path,
    data: Path,
    split: str = "test",
    out: Path | None = None,
    predictions: Path | None = None,
    device: str = "auto",
    lengths: int | None = None,
    iterations: int | None = None,
    choose_by: Literal["itm", "likelihood"] | None = None,
) -> None:
    """Evaluate a run of `mvlm finetune caption` on a data set.

    Args:
        checkpoint: Run folder of `mvlm finetune caption`, or one of its checkpoints.
        data: Folder of shards.
        split: Split to evaluate on.
        out: JSON file for the figures and the predictions. Default: print the figures only.
        predictions: File for the predictions alone, in the format of the task's benchmark and of `mvlm score`.
        device: auto, cpu or cuda.
        lengths: Number of lengths to try: a caption is written for each of the likeliest. Default: the run's.
        iterations: Passes of mask-predict. Default: the run's.
        choose_by: Figure that chooses among the lengths. Default: the run's.
    """
    options = {"lengths": lengths, "iterations": iterations, "choose_by": choose_by}
    _evaluate("caption", checkpoint, data, split, out, predictions, device, **options)
