"""`mvlm report` and `mvlm verify`: HTML pages about runs, and the verification of a finished run."""

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


def verify(run: Path, /, *, steps: int = 0, data: Path | None = None, device: str = "auto") -> None:
    """Verify a finished run: its hashes, its last steps made again, its evaluation.

    Prints what holds and each thing that is not as claimed, then "verified", or "not verified" with exit code 1.
    Nothing in the run's folder is changed. docs/evidence/reliability.md says what this proves.

    Args:
        run: Run folder.
        steps: Random steps to replay too, each with all steps between two checkpoints.
        data: Folder of shards. Default: that of the run's config.json.
        device: Device of the replay and the evaluation: auto, cpu or cuda.
    """
    from mvlm.errors import ConfigError
    from mvlm.verify.verify import verify_run

    if steps < 0:
        raise ConfigError(f"steps: wanted at least 0, got {steps}")
    failed = 0
    for check in verify_run(run, data, steps=steps, device=device):
        failed += len(check.problems)
        shown = [*check.problems[:5], *([f"and {len(check.problems) - 5} more"] if len(check.problems) > 5 else [])]
        say("\n".join(f"no   {problem}" for problem in shown) or f"yes  {check.what}", flush=True)
    say("verified" if not failed else "not verified")
    if failed:
        sys.exit(1)
