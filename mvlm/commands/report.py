"""`mvlm report`, `mvlm verify` and `mvlm replay`: HTML pages about runs, and what is made again of them."""

import sys
from pathlib import Path

from mvlm.terminal import say

# Commands import what they need when they run, so that --help and errors are immediate.


def report(
    run: Path,
    others: tuple[Path, ...] = (),
    /,
    data: Path | None = None,
    out: Path | None = None,
    *,
    upload: bool = False,
) -> None:
    """Write a report of a run, or a comparison of several runs, as one HTML file.

    A report has tables, curves, reconstructions, filled-in captions and retrievals. That of a fine-tuned run has the
    task's figures, confusion, curves, and right and wrong examples with maps of their words. A comparison has the
    metrics, evaluations and differing settings of its runs.

    Args:
        run: Run folder.
        others: Up to five run folders to compare it with.
        data: Folder of shards for a report's examples, of one run. Default: the one that the run was evaluated on.
        out: File to write. Default: report.html in the run folder, or compare.html in the first one.
        upload: Upload the report of one run, as an artefact, to its run at Weights & Biases.
    """
    from mvlm.commands.arguments import check_page

    check_page(out)
    if others:
        from mvlm.errors import ConfigError

        if data is not None:
            raise ConfigError("data: a comparison of runs shows no examples; leave --data out, or name one run")
        if upload:
            raise ConfigError("upload: a comparison belongs to no run at W&B; leave --upload out, or name one run")
        from mvlm.report.comparison import write_comparison

        say(write_comparison([run, *others], out))
        return
    from mvlm.report.page import write_report

    page = write_report(run, data, out)
    say(page)
    if upload:
        from mvlm.training.loggers import upload_report

        upload_report(run, page)


def verify(
    run: Path,
    /,
    *,
    steps: int = 0,
    data: Path | None = None,
    device: str = "auto",
    own_loss: str | None = None,
    own_masks: str | None = None,
) -> None:
    """Verify a finished run: its hashes, its last steps made again, its evaluation.

    Prints what holds and each thing that is not as claimed, then "verified", or "not verified" with exit code 1.
    Nothing in the run's folder is changed. docs/evidence/reliability.md says what this proves.

    Args:
        run: Run folder.
        steps: Random steps to replay too, each with all steps between two checkpoints.
        data: Folder of shards. Default: that of the run's config.json.
        device: Device of the replay and the evaluation: auto, cpu or cuda.
        own_loss: The run's own loss, again: a config.json names no code to run.
        own_masks: The run's own masks, again.
    """
    from mvlm.errors import ConfigError
    from mvlm.verify.verify import verify_run

    if steps < 0:
        raise ConfigError(f"steps: wanted at least 0, got {steps}")
    failed = 0
    for check in verify_run(run, data, steps=steps, device=device, own_loss=own_loss, own_masks=own_masks):
        failed += len(check.problems)
        shown = [*check.problems[:5], *([f"and {len(check.problems) - 5} more"] if len(check.problems) > 5 else [])]
        say("\n".join(f"no   {problem}" for problem in shown) or f"yes  {check.what}", flush=True)
    say("verified" if not failed else "not verified")
    if failed:
        sys.exit(1)


def replay(folder: Path, /, *, device: str = "auto", own_loss: str | None = None) -> None:
    """Make a run's first step again that was not finite, and name the op where it began.

    Pretraining keeps this step in RUN/failed_step. The folder is all that is needed, on a machine like the run's. A
    step of several ranks has the run's bits on as many: `torchrun --nproc-per-node 2 -m mvlm replay FOLDER`. Exit code
    1 if bits differ, or if all is finite.

    Args:
        folder: Folder of the step.
        device: auto, cpu or cuda.
        own_loss: The run's own loss, again: a config.json names no code to run.
    """
    from mvlm.distributed.coordination import joined_ranks
    from mvlm.verify.replay import replay as make_again

    with joined_ranks(device) as world:
        found = make_again(folder, world, own_loss)
        if not world.first:
            return
        losses = ", ".join(f"{n} {v}" for n, v in found.recorded.items() if not n.startswith("grad_norm_"))
        shown = ", ".join(found.samples[:8]) + (
            "" if len(found.samples) <= 8 else f" and {len(found.samples) - 8} more"
        )
        say(f"step {found.step}: {losses}\nits samples: {shown}")
        for name, (before, now) in list(found.differences.items())[:5]:
            say(f"no   {name}: the run had {before}, here it is {now}")
        if not found.differences:
            say("yes  losses and gradient norms are those of the run, bit for bit")
        for rank, op in found.found.items():
            of_rank = f"rank {rank}: " if world.size > 1 else ""
            say(f"{of_rank}{op.describe()}")
        if not found.found:
            say("no   no op has an output that is not finite")
    if found.differences or not found.found:
        sys.exit(1)
