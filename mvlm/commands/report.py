"""`mvlm report` and `mvlm verify`: HTML pages about runs, and the verification of a finished run."""

import sys
from collections.abc import Callable
from pathlib import Path

# Commands import what they need when they run, so that --help and errors are immediate.


def report(run: Path, others: tuple[Path, ...] = (), /, data: Path | None = None, out: Path | None = None) -> None:
    """Write a report of a run, or a comparison of several runs, as one HTML file.

    A report has tables, curves, reconstructions, filled-in captions and retrievals. That of a fine-tuned run has the
    task's figures, confusion, curves, and right and wrong examples with maps of their words. A comparison has the
    metrics, evaluations and differing settings of its runs.

    Args:
        run: Run folder.
        others: Up to five run folders to compare it with.
        data: Folder of shards for a report's examples, of one run. Default: the one that the run was evaluated on.
        out: File to write. Default: report.html in the run folder, or compare.html in the first one.
    """
    from mvlm.commands.arguments import check_page
    from mvlm.runs.folder import RunFolder

    check_page(out)
    if others:
        if data is not None:
            from mvlm.errors import ConfigError

            raise ConfigError("data: a comparison of runs shows no examples; leave --data out, or name one run")
        from mvlm.report.comparison import write_comparison

        print(write_comparison([run, *others], out or RunFolder(run).comparison))
        return
    from mvlm.report.page import write_report

    print(write_report(run, data, out))


def verify(
    run: Path,
    /,
    *,
    data: Path | None = None,
    steps: int = 3,
    reach: int = 64,
    seed: int | None = None,
    device: str = "auto",
    track: str = "",
    json: Path | None = None,
    record: Path | None = None,
) -> None:
    """Verify a finished pretraining run: hashes, rows, replayed steps, and its evaluation. The exit code is 1 for no.

    Each check is a line that begins with yes or no; - is a note. Nothing in the run's folder is changed.

    Args:
        run: Run folder.
        data: Folder of shards. Default: that of the run's config.json.
        steps: Random steps to replay, each from the nearest checkpoint before it.
        reach: Most steps to replay after a checkpoint. Steps further away are not replayed.
        seed: Seed of the choice of steps. Default: drawn, and printed.
        device: Device of the replay and the evaluation: auto, cpu or cuda.
        track: Track of the speedrun whose rules and targets the run has to meet: two-cores or one-h100.
        json: File for the verdict.
        record: File for the record that the run sets on --track, if the answer is yes.
    """
    from mvlm.commands.arguments import check_replaced, read_json
    from mvlm.errors import ConfigError
    from mvlm.files import write_json
    from mvlm.speedrun.tracks import find_track
    from mvlm.speedrun.verify import record_of, verify_run

    if steps < 0 or reach < 1:
        raise ConfigError(f"steps, reach: wanted at least 0 and 1, got {steps} and {reach}")
    for name, file in (("json", json), ("record", record)):
        if file is not None and (file.is_dir() or (file.is_file() and file.resolve().is_relative_to(run.resolve()))):
            raise ConfigError(f"{name}: wanted a new file, got {file}; choose another name")

    def has(name: str) -> Callable[[bytes], bool]:
        return lambda content: isinstance(found := read_json(content), dict) and name in found

    check_replaced(json, "an earlier verdict", has("verified"), "json")
    check_replaced(record, "an earlier record", has("track"), "record")
    if record is not None and not track:
        raise ConfigError("record: wanted --track too, the track on which the run sets it")
    found = verify_run(
        run,
        data,
        steps=steps,
        reach=reach,
        seed=seed,
        device=device,
        track=find_track(track) if track else None,
        report=lambda check: print(check, flush=True),
    )
    failed = sum(check.passed is False for check in found.checks)
    print(f"{'verified' if found.verified else f'not verified: {failed} times no'} (--seed {found.seed})")
    if json is not None:
        write_json(json, found.to_dict())
    if record is not None and found.verified:
        write_json(record, record_of(found, track, find_track(track).targets))
    if not found.verified:
        sys.exit(1)
