"""`mvlm doctor`: a report on this machine."""

import sys
from pathlib import Path

from mvlm.terminal import say

# Commands import what they need when they run, so that --help and errors are immediate.


def doctor(
    *,
    preset: str = "tiny",
    data: Path | None = None,
    out: Path = Path("runs"),
    batch_size: int | None = None,
    device: str = "auto",
    task: str = "",
    checkpoint: Path | None = None,
    image_size: int | None = None,
    config: Path | None = None,
    own_loss: str | None = None,
    own_masks: str | None = None,
    warm: bool = False,
) -> None:
    """Check this machine: packages, devices, backends, disk.

    With --data also shards, the preset for so many pairs, memory and training speed.
    Lines are green (works), amber (works at a cost) or red (does not work). The exit code is 1 if a line is red.

    Args:
        preset: Preset of the trial, one of `mvlm pretrain`.
        data: Folder of shards for the trial. Default: no trial.
        out: Folder in which runs would be written.
        batch_size: Pairs per step. Default: the preset's.
        device: auto, cpu or cuda.
        task: Task of a trial of fine-tuning from --checkpoint, instead of pretraining.
        checkpoint: Pretrained model for the trial of fine-tuning.
        image_size: Side of the images for the trial of fine-tuning. Default: as trained.
        config: config.json of a pretraining run for the trial, instead of a preset.
        own_loss: Own loss of that run, again: a config.json names no code to run.
        own_masks: Own masks of that run, again.
        warm: Compile the kernels of the preset's steps for this GPU, by 12 processes, into Triton's cache.
    """
    from dataclasses import replace

    from mvlm.commands.machine_check import examine, warm_up
    from mvlm.commands.pretrain import parse_config
    from mvlm.config.pretrain import PretrainConfig, recipe_of
    from mvlm.device import choose_device
    from mvlm.errors import ConfigError
    from mvlm.tasks import task_names
    from mvlm.tasks.recipes import finetune_defaults

    if not task and (checkpoint is not None or image_size is not None):
        raise ConfigError("wanted --checkpoint and --image-size with --task alone; name the task, or leave them out")
    if batch_size is not None and data is None and config is None:
        raise ConfigError("wanted --batch-size with --data alone, as there is no trial without data; leave it out")
    if task and config is not None:
        raise ConfigError(f"config: wanted none with --task {task}, got {config}; leave one of them out")
    run = None
    if task:
        if task not in task_names() or checkpoint is None or data is None:
            raise ConfigError(
                f"task: wanted one of {', '.join(task_names())} with --checkpoint and --data, got {task} with "
                f"{checkpoint} and {data}"
            )
        run = replace(finetune_defaults(task, checkpoint, data, out), image_size=image_size)
    elif config is not None:
        given = {"--out": out, "--data": data, "--own-loss": own_loss, "--own-masks": own_masks}
        places = [word for flag, value in given.items() if value is not None for word in (flag, str(value))]
        run = parse_config(["--config", str(config), *places])
    elif data is not None:
        run = PretrainConfig.preset(preset, data=data, out=out)
    if run is not None:
        batch = run.batch_size if batch_size is None else batch_size
        run = replace(run, device=device, batch_size=batch, eval_every_steps=0)
    states = []
    chosen = choose_device(device)
    model = recipe_of(preset).model
    for finding in (*([warm_up(model, chosen)] if warm else []), *examine(model, run, out, chosen)):
        states.append(finding.state)
        say(f"{finding.state:<6} {finding.name:<18} {finding.text}", flush=True)
    if "red" in states:
        sys.exit(1)
