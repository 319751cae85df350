"""Building a data set from a source: on one machine, in parts on several, resumed after a kill.

    .OUT.partial/             the unfinished data set
        plan.json, pieces/    part 1/1 of it, if this machine builds all (see `part`)
        lock                  flock: exclusive while a process builds
        final/                the data set; renamed to OUT when it is complete

The tar of a record depends on the source and the options alone. Every step either renames a finished result or can be
repeated. A build that was killed at any moment and resumed therefore gives the same bytes as an uninterrupted one, and
so do parts that were built anywhere and merged.

OUT and the parts may be at a URL (s3://, gs://, hf://). The unfinished data set is then in MVLM_CACHE/builds, and
dataset.json is the last file that OUT gets.
"""

import errno
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mvlm_dataloading.dataset.description import (
    already_written,
    parse_description,
    require_free_folder,
    require_same,
    require_split_name,
)
from mvlm_dataloading.dataset.folders import (
    LocalFolder,
    RemoteFolder,
    empty_folder,
    is_remote,
    lock_folder,
    normal_url,
    open_folder,
)
from mvlm_dataloading.errors import DataError
from mvlm_dataloading.files import place_folder
from mvlm_dataloading.options import BuildOptions
from mvlm_dataloading.sources.record import Source, file_sha256, records_sha256
from mvlm_dataloading.tokenizer import load_tokenizer

from .assemble import REPEATED_KEY, Assembly, assemble
from .part import (
    WHOLE,
    BuildProgress,
    Executor,
    claim_working_folder,
    make_plan,
    read_parts,
    start_or_resume,
    write_part,
)
from .workers import working_folder

log = logging.getLogger(__name__)

# Increment when equal input gives other samples. Data sets of an older revision are then refused, not reused.
_REVISION = 3
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def build_shards(
    source: Source,
    out: Path | str,
    options: BuildOptions | None = None,
    *,
    evaluation_sets: Sequence[Path] = (),
    workers: int | None = None,
    executor: Executor = "processes",
    progress: Callable[[BuildProgress], None] = lambda done: None,
) -> Path:
    """Write a source's shards to the folder or URL `out`, or resume the build of an earlier run that was killed.

    Args:
        evaluation_sets: folders of other data sets. Their validation and test images are excluded from training, like
            those of this data set.
        workers: number of worker processes, one per core by default. 0 works in this process, which then dies if the
            decoder crashes.
        executor: "processes" of this machine, or the nodes of a "ray" cluster (see `write_pieces_on_ray`).

    Raises:
        DataError: `out` is in use, another process writes it, no record is usable, the disk is full, or worker
            processes keep dying. In the last two cases finished pieces are kept next to `out`, and the same call
            resumes from them.
    """
    options, plan = _planned(source, options, evaluation_sets)
    out = _place(out)
    partial = _beside(out)
    if _is_finished(out, plan):
        _remove(partial)  # left by a run that was killed at the very end
        return Path(out)
    with _writing(partial) as work:
        if isinstance(out, Path):
            require_free_folder(out)
        own = LocalFolder(partial, gives_away=True) if isinstance(partial, Path) else RemoteFolder(partial)
        if isinstance(own, LocalFolder) and not own.has("plan.json"):
            # What a `ShardWriter` left, or a build that was killed before it wrote its plan.
            empty_folder(own.folder)
        _begin(own, plan, options, WHOLE)
        write_part(source, own, options, WHOLE, workers, executor, progress)
        _finish(work, [own], *read_parts([own]), out)
        _remove(partial)
    return Path(out)


def build_part(
    source: Source,
    out: Path | str,
    part: tuple[int, int],
    options: BuildOptions | None = None,
    *,
    evaluation_sets: Sequence[Path] = (),
    workers: int | None = None,
    executor: Executor = "processes",
    progress: Callable[[BuildProgress], None] = lambda done: None,
) -> Path:
    """Write one part of a source to the folder or URL `out`, or resume it. `merge_parts` joins the parts.

    Args:
        part: number of the part, from 1, and number of parts. The other arguments are those of `build_shards`, and the
            same for all parts.

    Raises:
        DataError: `out` is in use, holds another part, or as `build_shards`.
    """
    options, plan = _planned(source, options, evaluation_sets)
    out = _place(out)
    folder = open_folder(out)
    if isinstance(out, Path) and not folder.has("plan.json") and not folder.has("lock"):
        require_free_folder(out)
    with _writing(out) as work:
        _begin(folder, plan, options, part)
        write_part(source, folder, options, part, workers, executor, progress)
    if not isinstance(out, Path):
        shutil.rmtree(work, ignore_errors=True)
    return Path(out)


def merge_parts(parts: Sequence[Path | str], out: Path | str) -> Path:
    """Join the parts of a data set, which stay as they are. Equals the data set that `build_shards` writes.

    Args:
        parts: folders or URLs of `build_part`, in any order. Together they have all pieces.

    Raises:
        DataError: parts are missing, unfinished or of several builds, an evaluation set has changed, or as
            `build_shards`.
    """
    out = _place(out)
    folders = [open_folder(_place(part)) for part in parts]
    plan, owner = read_parts(folders)
    if _hashes(plan["evaluation_sets"]) != plan["recipe"]["against"]:
        raise DataError(
            f"{', '.join(plan['evaluation_sets'])}: wanted the data sets of --against as the parts were built with, "
            "found others; restore them, or build the parts again"
        )
    if _is_finished(out, plan):
        shutil.rmtree(working_folder(_beside(out)), ignore_errors=True)
        return Path(out)
    with _writing(_beside(out)) as work:
        if isinstance(out, Path):
            require_free_folder(out)
        start_or_resume(LocalFolder(work), plan, "merged")
        _finish(work, folders, plan, owner, out)
        shutil.rmtree(work, ignore_errors=True)
    return Path(out)


def _planned(
    source: Source, options: BuildOptions | None, evaluation_sets: Sequence[Path]
) -> tuple[BuildOptions, dict[str, Any]]:
    """Check the options, and make the plan with everything that determines the data set's bytes."""
    options = options or BuildOptions()
    options.check()
    if source.questions and options.drop_duplicates:
        raise DataError(
            f"drop-duplicates: wanted a data set with a sample per image, got {source.name}, whose samples are "
            "questions; leave the flag out"
        )
    for split in sorted({piece.split for piece in source.pieces}):
        require_split_name(split)
    if not source.pieces:
        raise DataError(f"{source.name}: wanted at least one sample, found none; give the folder that holds the data")
    given = {name: value for name, value in asdict(options).items() if value is not None}
    if options.tokenizer is not None:
        load_tokenizer(options.tokenizer)  # a mistake leaves no plan that the corrected command would differ from
        given["tokenizer"] = file_sha256(options.tokenizer)
    given |= {"questions": True} if source.questions else {}
    fixed = {"revision": _REVISION, **source.recipe, "records": records_sha256(source.pieces)}
    return options, make_plan(source, {**fixed, **given, "against": _hashes(evaluation_sets)}, evaluation_sets)


def _hashes(evaluation_sets: Sequence[Path]) -> list[str]:
    return [file_sha256(Path(folder) / "dataset.json") for folder in evaluation_sets]


def _place(out: Path | str) -> Path | str:
    """A URL, or an absolute path. A link is kept, and its target becomes the data set."""
    return normal_url(out) if is_remote(out) else Path(out).resolve()


def _beside(out: Path | str) -> Path | str:
    """Folder or URL of the unfinished data set."""
    if isinstance(out, Path):
        return out.with_name(f".{out.name}.partial")
    protocol, _, path = out.partition("://")
    parts = path.split("/")
    # A bucket, or a repository of the hub (owner/name, behind the kind if it is no model), has no folder beside it.
    whole = 1 if protocol != "hf" else 3 if parts[0] in ("datasets", "spaces", "buckets") else 2
    parent, _, name = out.rpartition("/")
    return f"{out}/.partial" if len(parts) <= whole else f"{parent}/.{name}.partial"


def _is_finished(out: Path | str, plan: dict[str, Any]) -> bool:
    """True if `out` holds this data set. Raises DataError if it holds something else."""
    if isinstance(out, Path):
        return already_written(out, name=plan["name"], recipe=plan["recipe"])
    if not RemoteFolder(out).has("dataset.json"):
        return False
    found = parse_description(RemoteFolder(out).read("dataset.json", json.loads), f"{out}/dataset.json")
    require_same(found, out, plan["name"], plan["recipe"])
    return True


def _begin(
    folder: LocalFolder | RemoteFolder, plan: dict[str, Any], options: BuildOptions, part: tuple[int, int]
) -> None:
    claim_working_folder(folder.url, plan)
    start_or_resume(folder, plan, f"{part[0]}/{part[1]}")
    if options.tokenizer is not None and not folder.has("tokenizer.json"):
        folder.write("tokenizer.json", options.tokenizer.read_bytes())


def _finish(
    work: Path, parts: Sequence[LocalFolder | RemoteFolder], plan: dict[str, Any], owner: list[int], out: Path | str
) -> None:
    """Join the parts in the working folder, and put the data set into place."""
    remote = None if isinstance(out, Path) else RemoteFolder(out)
    counts = assemble(Assembly(work, plan, parts, owner, remote))
    if remote is None:
        place_folder(work / "final", Path(out))
    else:
        for path in sorted((work / "final").iterdir(), key=lambda path: (path.name == "dataset.json", path.name)):
            remote.put(path, path.name)
    for what, count in sorted(counts.items()):
        log.info("%s: %d %s", out, count, what)
    if counts[REPEATED_KEY] and "tars" in plan["recipe"]:
        log.warning(
            "%s: wanted samples with different keys, found %d with the key of an earlier one, left out; if they are in "
            "several tars, give `mvlm data webdataset --prefix-keys`",
            out,
            counts[REPEATED_KEY],
        )


def _remove(partial: Path | str) -> None:
    """Remove an unfinished data set that is not needed any more, and what this machine keeps of it."""
    if not isinstance(partial, Path):
        RemoteFolder(partial).remove()
    shutil.rmtree(working_folder(partial), ignore_errors=True)


@contextmanager
def _writing(place: Path | str) -> Iterator[Path]:
    """A context in which this process alone writes an unfinished build. Yields its folder on this machine.

    Raises DataError if another process writes it, or if the disk is full.
    """
    try:
        with lock_folder(working_folder(place)):
            yield working_folder(place)
    except OSError as error:
        if error.errno not in _DISK_FULL:
            raise
        raise DataError(
            f"{place}: wanted room to write, found none ({error.strerror}); free some space and give the same command "
            "again, finished pieces are kept there"
        ) from None
