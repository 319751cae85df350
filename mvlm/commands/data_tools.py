"""The commands that check, index and select data sets, and what all `mvlm data` commands share."""

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mvlm_dataloading.options import ViewOptions

if TYPE_CHECKING:
    from mvlm_dataloading.tools.check import Findings

# A command imports what it needs when it runs, so that --help and mistakes answer at once.


def check(shards: Path, /, sheet: Path | None = None, workers: int | None = None) -> None:
    """Read a data set through: hashes, indices, every picture and caption; a table, and a sheet of pictures.

    Args:
        shards: The data folder.
        sheet: PNG to write; contact-sheet.png in the data folder when not given.
        workers: Processes, one a core by default.
    """
    from mvlm.progress import WorkProgress
    from mvlm_dataloading.errors import DataError
    from mvlm_dataloading.tools.check import check_shards
    from mvlm_dataloading.tools.summary import contact_sheet, findings_table

    with WorkProgress("pictures") as counting:
        found = check_shards(
            shards, workers=processes(workers), progress=lambda done, all: counting.show(done, all, done)
        )
    print(findings_table(shards, found))
    with contextlib.suppress(DataError):  # what cannot be opened is among the problems
        print(contact_sheet(shards, sheet or shards / "contact-sheet.png"))
    _raise_problems(shards, found, DataError)


def index(folder: Path, /, split: str | None = None) -> None:
    """Make the indices of a data folder again, or of a folder of other tools' tars, which is then a data folder.

    Args:
        folder: The folder.
        split: The split of tars whose names (train-000.tar) do not say it; else train.
    """
    from mvlm_dataloading.tools.reindex import rebuild_indices

    description = rebuild_indices(folder, split)
    left_out = "".join(f"; left out: {n} {reason}" for reason, n in description.get("rejected", {}).items())
    print(f"{folder}: {counts(description)}{left_out}")


def view(
    out: Path,
    /,
    sources: tuple[Path, ...],
    weights: tuple[float, ...] = (),
    choice: ViewOptions = ViewOptions(),  # noqa: B008 (frozen)
) -> None:
    """Select, dedupe, thin out and mix data sets without writing a tar: the view is a data folder of indices.

    Args:
        out: Folder to write the view to.
        sources: Data folders, which have to stay where they are, seen from the view.
        weights: How often an epoch has the training samples of each source, 1 when not given; 0.5 takes half of them.
    """
    from mvlm_dataloading.tools.view import make_view

    description = make_view(out, sources, choice, weights=weights)
    print(f"{out}: {counts(description)}")
    for reason, count in description["rejected"].items():
        print(f"left out: {count} {reason}")


def counts(description: dict[str, Any]) -> str:
    """Samples of each split, from a dataset.json."""
    return ", ".join(f"{part['samples']} {split}" for split, part in description["splits"].items())


def processes(given: int | None, pieces: int | None = None) -> int:
    """How many to work with: as many as given, or one a core, and no more than there are pieces."""
    import os

    from mvlm.errors import ConfigError

    if given is not None and given < 1:
        raise ConfigError(f"workers: wanted at least 1, got {given}")
    return min(given or len(os.sched_getaffinity(0)), max(1, pieces or 1 << 10))


def _raise_problems(shards: Path, found: "dict[str, Findings]", error: type[Exception]) -> None:
    problems = [problem for findings in found.values() for problem in findings.problems]
    for problem in problems[:20]:
        print(f"problem: {problem}")
    if problems:
        raise error(f"{shards}: wanted a data set without faults, found {len(problems)}; the first: {problems[0]}")
