"""`mvlm report`: HTML pages about runs."""

from pathlib import Path

# A command imports what it needs when it runs, so that --help and mistakes answer at once.


def report(run: Path, others: tuple[Path, ...] = (), /, data: Path | None = None, out: Path | None = None) -> None:
    """Write a run's report: curves, reconstructions, filled-in words, retrievals, tables, in one HTML file.

    Several runs are compared side by side instead, from their metrics and evaluations.

    Args:
        run: The run folder.
        others: Run folders to compare it with, up to five.
        data: Folder of shards; the one it was evaluated on when not given. A comparison needs none.
        out: The file to write; report.html, or compare.html, in the (first) run folder when not given.
    """
    if others:
        from mvlm.report.comparison import write_comparison
        from mvlm.runs.folder import RunFolder

        print(write_comparison([run, *others], out or RunFolder(run).comparison))
        return
    from mvlm.report.page import write_report

    print(write_report(run, data, out))
