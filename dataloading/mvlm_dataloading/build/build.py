"""Building a data set from a source: on one machine, in parts on several, resumed after a kill.

    PART/plan.json        name, origin, recipe, splits and labels of all pieces of the data set, and which part this is
    PART/tokenizer.json   with --tokenizer
    PART/pieces/000002/   one folder per finished piece (see `piece`)
    PART/lock             flock: exclusive while a process writes the part
    .OUT.partial/         the unfinished data set: part 1/1 of it, if this machine builds all
        final/            the data set; renamed to OUT when it is complete

Piece k belongs to part k mod n + 1 of n. The tar of a record depends on the source and the options alone. Every step
either renames a finished result or can be repeated. A build that was killed at any moment and resumed therefore gives
the same bytes as an uninterrupted one, and so do parts that were built anywhere and merged.

OUT and the parts may be at a URL (s3://, gs://, hf://). The unfinished data set is then in MVLM_CACHE/builds, and
dataset.json is the last file that OUT gets.
"""

import errno
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

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
    discard,
    empty_folder,
    lock_folder,
    open_folder,
)
from mvlm_dataloading.errors import DataError
from mvlm_dataloading.files import place_folder, write_file
from mvlm_dataloading.options import BuildOptions
from mvlm_dataloading.sources.record import Source, file_sha256, records_sha256
from mvlm_dataloading.tokenizer import load_tokenizer
from mvlm_dataloading.untrusted import LIMITS, read_regular
from mvlm_dataloading.urls import is_remote, normal_url

from .assemble import REPEATED_KEY, Assembly, assemble
from .workers import finished_pieces, ray_cores, wait_for_files, working_folder, write_pieces, write_pieces_on_ray

log = logging.getLogger(__name__)

# Increment when equal input gives other samples. Data sets of an older revision are then refused, not reused.
_REVISION = 3
SPEC_BYTES = 256 << 20
"""Most bytes of a plan.json."""
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
Executor = Literal["processes", "ray"]
# Fields of plan.json that version 0.1.0 wrote too.
_ESSENTIAL = ("name", "recipe", "pieces")


@dataclass(frozen=True, slots=True)
class BuildProgress:
    """Progress of a build: pieces that are finished, all pieces, and records."""

    pieces: int
    of_pieces: int
    records: int
    """Records processed by this run. Pieces of earlier runs do not count."""


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
    options, spec = _checked_spec(source, options, evaluation_sets)
    out = _place(out)
    partial = _beside(out)
    if _is_finished(out, spec):
        _remove(partial)  # left by a run that was killed at the very end
        return Path(out)
    with _writing(partial) as work:
        if isinstance(out, Path):
            require_free_folder(out)
        own = LocalFolder(partial, gives_away=True) if isinstance(partial, Path) else RemoteFolder(partial)
        if isinstance(own, LocalFolder) and not own.has("plan.json"):
            # What a `ShardWriter` left, or a build that was killed before it wrote its specification.
            empty_folder(own.folder)
        _begin(own, spec, options, (1, 1))
        _write_part(source, own, options, (1, 1), workers, executor, progress)
        _finish(work, [own], *_read_parts([own]), out)
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
    options, spec = _checked_spec(source, options, evaluation_sets)
    out = _place(out)
    folder = open_folder(out)
    if isinstance(out, Path) and not folder.has("plan.json") and not folder.has("lock"):
        require_free_folder(out)
    with _writing(out) as work:
        _begin(folder, spec, options, part)
        _write_part(source, folder, options, part, workers, executor, progress)
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
    spec, owner = _read_parts(folders)
    if _hashes(spec["evaluation_sets"]) != spec["recipe"]["against"]:
        raise DataError(
            f"{', '.join(spec['evaluation_sets'])}: wanted the data sets of --against as the parts were built with, "
            "found others; restore them, or build the parts again"
        )
    if _is_finished(out, spec):
        shutil.rmtree(working_folder(_beside(out)), ignore_errors=True)
        return Path(out)
    with _writing(_beside(out)) as work:
        if isinstance(out, Path):
            require_free_folder(out)
        _start_or_resume(LocalFolder(work), spec, "merged")
        _finish(work, folders, spec, owner, out)
        shutil.rmtree(work, ignore_errors=True)
    return Path(out)


def _checked_spec(
    source: Source, options: BuildOptions | None, evaluation_sets: Sequence[Path]
) -> tuple[BuildOptions, dict[str, Any]]:
    """Check the options, and specify the data set: all that determines its bytes, and all that a merge reads.

    Returns the options, with defaults if None was given, and the specification as plain values for JSON.
    """
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
        load_tokenizer(options.tokenizer)  # before anything is written that the corrected command would differ from
        given["tokenizer"] = file_sha256(options.tokenizer)
    given |= {"questions": True} if source.questions else {}
    fixed = {"revision": _REVISION, **source.recipe, "records": records_sha256(source.pieces)}
    spec = {
        "name": source.name,
        "recipe": {**fixed, **given, "against": _hashes(evaluation_sets)},
        "pieces": [piece.label for piece in source.pieces],
        "splits": [piece.split for piece in source.pieces],
        "source": source.origin,
        "licence": source.licence,
        "attribution": source.attribution,
        "evaluation_sets": [str(Path(folder).resolve()) for folder in evaluation_sets],
    }
    return options, json.loads(json.dumps(spec))  # as a merge reads it


def _hashes(evaluation_sets: Sequence[Path]) -> list[str]:
    return [file_sha256(Path(folder) / "dataset.json") for folder in evaluation_sets]


def _place(out: Path | str) -> Path | str:
    """Normal form of the place `out` of a data set: a URL, or an absolute path behind all links."""
    return normal_url(out) if is_remote(out) else Path(out).resolve()


def _beside(out: Path | str) -> Path | str:
    """Folder or URL in which the data set `out` is built before it is complete: a hidden neighbour of `out`."""
    if isinstance(out, Path):
        return out.with_name(f".{out.name}.partial")
    protocol, _, path = out.partition("://")
    parts = path.split("/")
    # A bucket, or a repository of the hub (owner/name, behind the kind if it is no model), has no folder beside it.
    whole = 1 if protocol != "hf" else 3 if parts[0] in ("datasets", "spaces", "buckets") else 2
    parent, _, name = out.rpartition("/")
    return f"{out}/.partial" if len(parts) <= whole else f"{parent}/.{name}.partial"


def _is_finished(out: Path | str, spec: dict[str, Any]) -> bool:
    """True if `out` holds the data set of this specification; False if nothing is there.

    DataError for anything else.
    """
    if isinstance(out, Path):
        return already_written(out, name=spec["name"], recipe=spec["recipe"])
    if not RemoteFolder(out).has("dataset.json"):
        return False
    content = RemoteFolder(out).read("dataset.json", LIMITS["dataset.json"], json.loads)
    found = parse_description(content, f"{out}/dataset.json")
    require_same(found, out, spec["name"], spec["recipe"])
    return True


def _begin(
    folder: LocalFolder | RemoteFolder, spec: dict[str, Any], options: BuildOptions, part: tuple[int, int]
) -> None:
    """Write plan.json, the specification of a part, into its folder, or check that the one that is there is equal.

    The caller holds the lock of the folder. DataError if the folder has another specification.
    """
    if is_remote(folder.url):  # what this machine keeps may be of another specification
        work = working_folder(folder.url)
        file, wanted = work / "plan.sha256", hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()
        if not file.is_file() or file.read_text() != wanted:
            empty_folder(work)
            write_file(file, wanted)
    _start_or_resume(folder, spec, f"{part[0]}/{part[1]}")
    if options.tokenizer is not None and not folder.has("tokenizer.json"):
        folder.write("tokenizer.json", read_regular(options.tokenizer, "tokenizer"))


def _finish(
    work: Path, parts: Sequence[LocalFolder | RemoteFolder], spec: dict[str, Any], owner: list[int], out: Path | str
) -> None:
    """Join the parts in the working folder `work`, and move the complete data set to `out`.

    Args:
        owner: for each piece, the index in `parts` of the part that has it.
    """
    remote = None if isinstance(out, Path) else RemoteFolder(out)
    counts = assemble(Assembly(work, spec, parts, owner, remote))
    if remote is None:
        place_folder(work / "final", Path(out))
    else:
        for path in sorted((work / "final").iterdir(), key=lambda path: (path.name == "dataset.json", path.name)):
            remote.put(path, path.name)
    for what, count in sorted(counts.items()):
        log.info("%s: %d %s", out, count, what)
    if counts[REPEATED_KEY] and "tars" in spec["recipe"]:
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


def _write_part(
    source: Source,
    folder: LocalFolder | RemoteFolder,
    options: BuildOptions,
    part: tuple[int, int],
    workers: int | None,
    executor: Executor,
    progress: Callable[[BuildProgress], None],
) -> None:
    """Write the pieces of a part that are not finished yet. The caller has written its plan.json and holds its lock."""
    pieces = working_folder(folder.url) / "pieces"
    pieces.mkdir(parents=True, exist_ok=True)
    for left in pieces.glob("*.tmp"):
        discard(left)
    for left in pieces.glob("*.old"):
        shutil.rmtree(left, ignore_errors=True)
    mine, finished = range(part[0] - 1, len(source.pieces), part[1]), finished_pieces(folder)
    tasks = [(number, source.pieces[number]) for number in mine if number not in finished]
    if executor == "ray":
        cores = min(ray_cores(), len(tasks))
        events = write_pieces_on_ray(folder.url, options, tasks)
    else:
        cores = min(len(os.sched_getaffinity(0)) if workers is None else workers, len(tasks))
        events = write_pieces(folder.url, options, tasks, cores)
        cores = max(cores, 1)
    done, records, start = len(mine) - len(tasks), 0, time.monotonic()
    progress(BuildProgress(done, len(mine), records))
    for more_pieces, more_records in events:
        done, records = done + more_pieces, records + more_records
        progress(BuildProgress(done, len(mine), records))
    if executor == "ray":
        wait_for_files(folder.url, lambda: {number for number, _ in tasks} - finished_pieces(folder))
    if records:
        seconds = time.monotonic() - start
        speed = records / seconds / cores
        log.info("%s: %d records in %.1f s, %.1f a second and core", folder.url, records, seconds, speed)


def _start_or_resume(folder: LocalFolder | RemoteFolder, spec: dict[str, Any], part: str) -> None:
    """Write plan.json into `folder`, or compare the one that is there. DataError if it is of another build or part."""
    state = {**spec, "part": part}
    if folder.has("plan.json"):
        try:
            found = json.loads(folder.read("plan.json", SPEC_BYTES))
        except ValueError:
            found = {}
        found.pop("evaluation_sets", None)  # the recipe has their hashes; they may have been moved
        if not set(_ESSENTIAL) <= found.keys() or any(state.get(name) != value for name, value in found.items()):
            raise DataError(
                f"{folder.url}: wanted an unfinished build of this input with these options, found another "
                f"one; finish it with its own command, or remove the folder to start over"
            )
        log.info("%s: resuming where the last run ended", folder.url)
    folder.write("plan.json", json.dumps(state).encode())


def _read_parts(parts: Sequence[LocalFolder | RemoteFolder]) -> tuple[dict[str, Any], list[int]]:
    """Specification that all parts share, and for each piece the number of the part that has it, from 0."""
    if not parts:
        raise DataError("parts: wanted the folders of all parts and that of the data set, found none of the parts")
    specs, names, moved = [], [], []
    for part in parts:
        if not part.has("plan.json"):
            raise DataError(
                f"{part.url}: wanted a part of a build, found none; `mvlm data NAME ... --part i/n` writes it"
            )
        specs.append(json.loads(part.read("plan.json", SPEC_BYTES)))
        names.append(specs[-1].pop("part"))
        moved.append(specs[-1].pop("evaluation_sets"))  # machines may have them under several paths
        if specs[-1] != specs[0]:
            raise DataError(
                f"{part.url}: wanted the same input and options as {parts[0].url}, found others; "
                "build all parts with the same command but for --part, on the same files"
            )
    owner: dict[int, int] = {}
    for number, part in enumerate(parts):
        for piece in finished_pieces(part):
            owner.setdefault(piece, number)
    count, of_parts = len(specs[0]["pieces"]), int(names[0].split("/")[1])
    missing = {f"{i % of_parts + 1}/{of_parts}" for i in range(count) if i not in owner}
    if missing:
        raise DataError(
            f"{specs[0]['name']}: wanted all {count} pieces, found {len(owner)}; name or finish the parts "
            f"{', '.join(sorted(missing))} with the commands that began them"
        )
    hashes = specs[0]["recipe"]["against"]
    found = [_first_there(places, wanted) for places, wanted in zip(zip(*moved, strict=True), hashes, strict=True)]
    return {**specs[0], "evaluation_sets": found}, [owner[i] for i in range(count)]


def _first_there(places: Sequence[str], wanted: str) -> str:
    """The first of `places`, folders of an evaluation set on several machines, that is here and has its hash.

    wanted: SHA-256 of its dataset.json. Returns the first place if none has it.
    """
    files = {place: Path(place) / "dataset.json" for place in places}
    return next((p for p, file in files.items() if file.is_file() and file_sha256(file) == wanted), places[0])


def parse_part(text: str) -> tuple[int, int]:
    """Number of a part and number of parts, from `i/n`. Raises DataError."""
    words = text.split("/")
    if len(words) == 2 and all(word.isdecimal() for word in words) and 1 <= int(words[0]) <= int(words[1]):
        return int(words[0]), int(words[1])
    raise DataError(f"part: wanted i/n with i from 1 to n, such as 3/8, got {text!r}")
