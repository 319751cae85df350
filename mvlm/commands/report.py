"""`mvlm report`: HTML pages about runs."""

from pathlib import Path

# Commands import what they need when they run, so that --help and errors are immediate.


def report(run: Path, others: tuple[Path, ...] = (), /, data: Path | None = None, out: Path | None = None) -> None:
    """Write a report of a run, or a comparison of several runs, as one HTML file.

    A report has tables, curves, reconstructions, filled-in captions and retrievals. A comparison has the metrics,
    evaluations and differing settings of its runs.

    Args:
        run: Run folder.
        others: Up to five run folders to compare it with.
        data: Folder of shards for a report's examples. Default: the one that the run was evaluated on.
        out: File to write. Default: report.html in the run folder, or compare.html in the first one.
    """
    if others:
        from mvlm.report.comparison import write_comparison
        from mvlm.runs.folder import RunFolder

        print(write_comparison([run, *others], out or RunFolder(run).comparison))
        return
    from mvlm.report.page import write_report

    print(write_report(run, data, out))
