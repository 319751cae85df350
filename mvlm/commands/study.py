"""`mvlm study`: an experiment over several settings and seeds."""

import os
from pathlib import Path

from mvlm.terminal import say

# Commands import what they need when they run, so that --help and errors are immediate.


def study(
    file: Path,
    /,
    *,
    data: Path,
    out: Path,
    checkpoint: Path | None = None,
    part: str = "1/1",
    jobs: int = 1,
    reuse: tuple[Path, ...] = (),
    partial: bool = False,
) -> None:
    """Run a study: every arm of FILE with every seed.

    It ends with a table and a page of paired differences.
    The same command continues an interrupted study, and skips what is finished.

    Args:
        file: Study in TOML (docs/guides/studies.md).
        data: Folder of shards with a train split.
        out: Folder of the study: its trials, trials.jsonl, study.csv and study.html.
        checkpoint: Pretrained model of a study of a task: run folder, one of its checkpoints, or exported folder.
        part: i/n runs only every nth trial, beginning with the ith: one part for each GPU, or each task of an array.
        jobs: Processes on this machine that share the trials. Each gets its share of the cores, or a GPU. Small models
            train more pairs a second in two processes of one thread than in one process of two.
        reuse: Folders of other studies, or their files trials.jsonl, also with gzip. A trial that is equal to one of
            theirs takes its result.
        partial: Write table and page of the trials that are finished, and run none.
    """
    from mvlm.errors import ConfigError
    from mvlm.studies.run import report_finished, run_jobs, run_study
    from mvlm.studies.study import read_study
    from mvlm.training.freed_memory import keep_freed_memory
    from mvlm_dataloading.urls import is_remote, normal_url, with_credentials

    number, _, parts = part.partition("/")
    if not (number.isdecimal() and parts.isdecimal() and 1 <= int(number) <= int(parts)):
        raise ConfigError(f"part: wanted i/n with 1 <= i <= n, such as 1/4, got {part!r}")
    # Each rank would take another trial, and wait for the others in it.
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            "study: wanted one process, found ranks of torchrun; give --jobs N, or --part i/n to each GPU"
        )
    if jobs < 1:
        raise ConfigError(f"jobs: wanted at least 1, got {jobs}")
    description = read_study(file)
    shares = (int(number), int(parts))
    if partial:
        page = report_finished(description, data, out, reuse, checkpoint)
    elif jobs > 1:
        place = with_credentials(normal_url(data)) if is_remote(data) else data
        words = [file, "--data", place, "--out", out, *(["--checkpoint", checkpoint] if checkpoint else [])]
        run_jobs(list(map(str, [*words, *(["--reuse", *reuse] if reuse else [])])), shares, jobs)
        return
    else:
        keep_freed_memory("auto")
        page = run_study(description, data, out, shares, reuse, checkpoint)
    if page is not None:
        say(f"{out / 'study.csv'}\n{page}")
