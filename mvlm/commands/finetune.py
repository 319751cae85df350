"""`mvlm finetune` and `mvlm eval TASK`: downstream tasks trained and evaluated."""

from collections.abc import Callable, Sequence
from pathlib import Path

# Commands import what they need when they run, so that --help and errors are immediate.


def finetune(arguments: Sequence[str]) -> None:
    """Fine-tune a pretrained model: `mvlm finetune TASK --checkpoint RUN --data SHARDS --out RUN`.

    Tasks: vqa, entailment, retrieval. `mvlm eval TASK` evaluates the finished run.
    """
    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"{finetune.__doc__}\nAll settings of a task: mvlm finetune TASK --help")
        return
    import tyro

    from mvlm.commands.pretrain import parse_settings
    from mvlm.config.finetune import GROUPS, TASK_NAMES, FinetuneConfig
    from mvlm.config.recipes import finetune_defaults
    from mvlm.errors import ConfigError

    if arguments[0] not in TASK_NAMES:
        raise ConfigError(f"wanted a task after `mvlm finetune`: {', '.join(TASK_NAMES)}; got {arguments[0]!r}")
    defaults = finetune_defaults(arguments[0], checkpoint=tyro.MISSING, data=tyro.MISSING, out=tyro.MISSING)
    settings = parse_settings(
        arguments[1:], f"mvlm finetune {arguments[0]}", f"Fine-tune on the task `{arguments[0]}`.", defaults, GROUPS
    )
    from mvlm.tasks.finetune import finetune as run

    run(FinetuneConfig(**settings))


def _evaluate(task: str, checkpoint: Path, data: Path, split: str, out: Path | None, device: str) -> None:
    import json

    from mvlm.device import choose_device
    from mvlm.errors import RunError
    from mvlm.files import write_json
    from mvlm.tasks.evaluate import evaluate_task

    figures, records = evaluate_task(checkpoint, data, split, choose_device(device))
    if figures["task"] != task:
        raise RunError(f"{checkpoint}: wanted a run of the task {task}, found one of {figures['task']}")
    print(json.dumps(figures, indent=1))
    if out is not None:
        write_json(out, {"checkpoint": str(checkpoint), "data": str(data), **figures, "records": records})


def eval_task(task: str) -> Callable[..., None]:
    """The command `mvlm eval TASK` of a task."""

    def evaluate(
        *, checkpoint: Path, data: Path, split: str = "test", out: Path | None = None, device: str = "auto"
    ) -> None:
        _evaluate(task, checkpoint, data, split, out, device)

    evaluate.__name__ = f"eval_{task}"
    evaluate.__doc__ = f"""Evaluate a run of `mvlm finetune {task}` on a data set.

    Args:
        checkpoint: Run folder of `mvlm finetune {task}`, or one of its checkpoints.
        data: Folder of shards.
        split: Split to evaluate on.
        out: JSON file for the figures and the predictions. Default: print the figures only.
        device: auto, cpu or cuda.
    """
    return evaluate
