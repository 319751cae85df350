"""The commands that check, index and select data sets, and helpers of all `mvlm data` commands."""

import logging
from pathlib import Path
from typing import Any

from mvlm_dataloading.options import ViewOptions

log = logging.getLogger(__name__)

# Commands import what they need when they run, so that --help and errors are immediate.


def check(
    what: str,
    root: Path | None = None,
    /,
    sheet: Path | None = None,
    workers: int | None = None,
    images: Path | None = None,
    subset: bool = False,
) -> None:
    """Check a built data set, or with a name and a folder the published files of one.

    `check FOLDER` reads every byte of a data folder: hashes, indices, images and captions. It prints a table and writes
    a contact sheet. `check NAME ROOT` writes nothing: it reads the published files as `mvlm data NAME` does, counts
    rows, images, missing images and repeated keys, and compares them with the published size. It exits with 1 if
    something is off.

    Args:
        what: Data folder; or coco, flickr30k, vqa-v2, visual-genome-qa, nlvr2, nlvr, snli-ve, refcoco or
            clip-benchmark.
        root: Folder of the published files.
        sheet: PNG for the contact sheet of a data folder. Default: contact-sheet.png in it.
        workers: Number of processes for a data folder. Default: one per core.
        images: Folder of the images of published files, if it is another one.
        subset: The published files are part of a data set: fewer rows and missing images are as they should be.
    """
    if root is not None:
        _check_published(what, root, images, subset)
        return
    from mvlm.progress import WorkProgress
    from mvlm_dataloading.errors import DataError
    from mvlm_dataloading.tools.check import check_shards
    from mvlm_dataloading.tools.summary import contact_sheet, findings_table

    shards = Path(what)
    if images is not None or subset:
        raise DataError(f"{shards}: --images and --subset are for published files: mvlm data check NAME ROOT")
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


def _check_published(name: str, root: Path, images: Path | None, subset: bool) -> None:
    from mvlm.progress import WorkProgress
    from mvlm_dataloading.tools.published_check import check_published, published_table

    with WorkProgress("pieces") as counting:
        found = check_published(
            name, root, images, subset=subset, progress=lambda done, all: counting.show(done, all, done)
        )
    print(published_table(found))
    for problem in found.problems:
        print(f"problem: {problem}")
    if found.problems:
        raise SystemExit(1)
    print(f"{found.name}: {'a subset' if subset else 'as published'}")


def index(folder: Path, /, split: str | None = None) -> None:
    """Rebuild a data set's indices from its tars, or index existing WebDataset tars so that they can be used in place.

    Args:
        folder: Data folder, or folder of tars.
        split: Split of all tars. Default: the one in a tar's name (train-000.tar), else train.
    """
    from mvlm_dataloading.tools.reindex import rebuild_indices

    description = rebuild_indices(folder, split)
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


def reindex(folder: Path, /) -> None:
    """Write the indices with which a data set opens at once, from its DALI indices. Its tars are not read.

    Args:
        folder: Data folder or view.
    """
    from mvlm_dataloading.tools.reindex import pack_indices

    for path in pack_indices(folder):
        print(f"{path}: {path.stat().st_size:,} bytes")


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
    from mvlm_dataloading.dataset.remote_files import RemoteFolder, is_remote

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
