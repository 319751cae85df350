"""`mvlm report`: HTML pages about runs."""

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
        data: Folder of shards for a report's examples. Default: the one that the run was evaluated on.
        out: File to write. Default: report.html in the run folder, or compare.html in the first one.
    """
    from mvlm.runs.folder import RunFolder

    if others:
        from mvlm.report.comparison import write_comparison

        print(write_comparison([run, *others], out or RunFolder(run).comparison))
        return
    from mvlm.config.json_files import read_config
    from mvlm.files import check_folder

    check_folder(run, "a run folder")
    if read_config(RunFolder(run).config).get("task", "retrieval") != "retrieval":
        from mvlm.tasks.report.page import write_task_report

        print(write_task_report(run, data, out))
        return
    from mvlm.report.page import write_report

    print(write_report(run, data, out))
