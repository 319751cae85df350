"""The commands that check, index and select data sets, and helpers of all `mvlm data` commands."""

import logging
from pathlib import Path
from typing import Any

from mvlm_dataloading.options import ViewOptions

log = logging.getLogger(__name__)

# Commands import what they need when they run, so that --help and errors are immediate.


def check(shards: Path, /, sheet: Path | None = None, workers: int | None = None) -> None:
    """Check every byte of a data folder: hashes, indices, images and captions; print a table, write a contact sheet.

    Args:
        shards: Data folder.
        sheet: PNG for the contact sheet. Default: contact-sheet.png in the data folder.
        workers: Number of processes. Default: one per core.
    """
    from mvlm.progress import WorkProgress
    from mvlm_dataloading.errors import DataError
    from mvlm_dataloading.tools.check import check_shards, contact_sheet, findings_table

    with WorkProgress("images") as counting:
        found = check_shards(
            shards, workers=processes(workers), progress=lambda done, all: counting.show(done, all, done)
        )
    print(findings_table(shards, found))
    problems = [problem for findings in found.values() for problem in findings.problems]
    for problem in problems[:20]:
        print(f"problem: {problem}")
    sheet = sheet or shards / "contact-sheet.png"
    try:
        print(contact_sheet(shards, sheet))
    except DataError:  # a split that cannot be opened is among the problems
        pass
    except OSError as error:  # data sets are checked on media that nobody can write to
        reason = error.strerror or error
        log.warning("%s: wanted to write the contact sheet, found %s; --sheet names another place", sheet, reason)
    if problems:
        raise DataError(
            f"{shards}: wanted a data set without problems, found {len(problems)}; the first: {problems[0]}"
        )


def index(folder: Path, /, split: str | None = None, without_tars: bool = False) -> None:
    """Rebuild a data set's indices from its tars, or index existing WebDataset tars so that they can be used in place.

    Of a view, whose samples only its DALI indices know, the index of each split is written from these.

    Args:
        folder: Data folder, view, or folder of tars.
        split: Split of all tars. Default: the one in a tar's name (train-000.tar), else train.
        without_tars: Write only the index with which a split opens at once, from the DALI indices of a data folder.
    """
    from mvlm_dataloading.tools.reindex import rebuild_indices

    description = rebuild_indices(folder, split, without_tars=without_tars)
    left_out = "".join(f"; left out: {n} {reason}" for reason, n in description.get("rejected", {}).items())
    print(f"{folder}: {counts(description)}{left_out}")


def merge(parts: tuple[Path, ...], out: Path, /) -> None:
    """Join the parts that `mvlm data NAME ... --part i/n` has written. The parts stay as they are.

    Args:
        parts: Folders or URLs of all parts, one or more.
        out: Folder or URL for the shards. To resume a killed merge, give the same command again.
    """
    from mvlm_dataloading.build.build import merge_parts

    merge_parts(parts, out)
    print(summary(out))


def view(
    out: Path,
    /,
    sources: tuple[Path, ...],
    weights: tuple[float, ...] = (),
    selection: ViewOptions = ViewOptions(),  # noqa: B008 (frozen)
) -> None:
    """Select, deduplicate, subsample and mix data sets without writing a tar. The view is a data folder of indices.

    Args:
        out: Folder for the view.
        sources: Data folders. They must keep their place relative to the view.
        weights: Copies per epoch of each source's training samples. Default: 1. 0.5 takes half of them.
    """
    from mvlm_dataloading.tools.view import make_view

    description = make_view(out, sources, selection, weights=weights)
    print(f"{out}: {counts(description)}")
    for reason, count in description["rejected"].items():
        print(f"left out: {count} {reason}")


def summary(out: Path, *splits: str) -> str:
    """A data set and the number of samples of each split, as text. Default: all splits, by name."""
    import json

    from mvlm_dataloading.dataset.description import read_description
    from mvlm_dataloading.dataset.folders import RemoteFolder, is_remote

    written = json.loads(RemoteFolder(out).read("dataset.json")) if is_remote(out) else read_description(out)
    return f"{out}: {counts({'splits': {split: written['splits'][split] for split in splits or written['splits']}})}"


def counts(description: dict[str, Any]) -> str:
    """Number of samples of each split, as text, from a dataset.json."""
    return ", ".join(f"{part['samples']} {split}" for split, part in description["splits"].items())


def processes(given: int | None, pieces: int | None = None) -> int:
    """Number of processes: the given number, or one per core, and at most one per piece."""
    import os

    from mvlm.errors import ConfigError

    if given is not None and given < 1:
        raise ConfigError(f"workers: wanted at least 1, got {given}")
    return min(given or len(os.sched_getaffinity(0)), max(1, pieces or 1 << 10))
