"""A part of a build: the plan of the whole data set, and the pieces that are this part's share.

    PART/plan.json        name, origin, recipe, splits and labels of all pieces of the data set, and which part this is
    PART/tokenizer.json   with --tokenizer
    PART/pieces/000002/   one folder per finished piece (see `piece`)
    PART/lock             flock: exclusive while a process writes the part

Piece k belongs to part k mod n + 1 of n. A data set that one machine builds is part 1/1. The tar of a record depends on
the source and the options alone, so the parts of any number of machines merge to the same bytes.
"""

import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mvlm_dataloading.dataset.folders import LocalFolder, RemoteFolder, discard, empty_folder, is_remote
from mvlm_dataloading.errors import DataError
from mvlm_dataloading.files import write_file
from mvlm_dataloading.options import BuildOptions
from mvlm_dataloading.sources.record import Source, file_sha256

from .workers import finished_pieces, ray_cores, working_folder, write_pieces, write_pieces_on_ray

log = logging.getLogger(__name__)

Executor = Literal["processes", "ray"]
WHOLE = (1, 1)
LISTING_S = 90.0
"""Longest time that a network disk hides new files from other machines."""
# Fields of plan.json that version 0.1.0 wrote too.
_ESSENTIAL = ("name", "recipe", "pieces")


@dataclass(frozen=True, slots=True)
class BuildProgress:
    """Progress of a build."""

    pieces: int
    of_pieces: int
    records: int
    """Records processed by this run. Pieces of earlier runs do not count."""


def make_plan(source: Source, recipe: dict[str, Any], evaluation_sets: Sequence[Path]) -> dict[str, Any]:
    """Everything that a merge has to know of a source and a build, as JSON values."""
    plan = {
        "name": source.name,
        "recipe": recipe,
        "pieces": [piece.label for piece in source.pieces],
        "splits": [piece.split for piece in source.pieces],
        "source": source.origin,
        "licence": source.licence,
        "attribution": source.attribution,
        "evaluation_sets": [str(Path(folder).resolve()) for folder in evaluation_sets],
    }
    return json.loads(json.dumps(plan))


def write_part(
    source: Source,
    folder: LocalFolder | RemoteFolder,
    options: BuildOptions,
    part: tuple[int, int],
    workers: int | None,
    executor: Executor,
    progress: Callable[[BuildProgress], None],
) -> None:
    """Write the pieces of a part that are not finished yet. The caller has written its plan and holds its lock.

    Raises:
        DataError: worker processes keep dying, or the nodes of a Ray cluster have written to disks of their own.
    """
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
        _wait_for_files(folder, {number for number, _ in tasks})
    if records:
        seconds = time.monotonic() - start
        speed = records / seconds / cores
        log.info("%s: %d records in %.1f s, %.1f a second and core", folder.url, records, seconds, speed)


def _wait_for_files(folder: LocalFolder | RemoteFolder, pieces: set[int]) -> None:
    """Wait until this machine sees pieces that others have written. Network disks keep old listings for a while."""
    deadline = time.monotonic() + LISTING_S
    while missing := pieces - finished_pieces(folder):
        if time.monotonic() >= deadline:
            raise DataError(
                f"{folder.url}: wanted a folder that all nodes of the cluster share, found {len(missing)} of "
                f"{len(pieces)} new pieces missing on this machine; name a shared folder or a URL"
            )
        time.sleep(0.5)


def start_or_resume(folder: LocalFolder | RemoteFolder, plan: dict[str, Any], part: str) -> None:
    """Compare the plan in `folder` with this one, or write it if there is none.

    Raises:
        DataError: the folder holds another build, or another part of this one.
    """
    state = {**plan, "part": part}
    if folder.has("plan.json"):
        try:
            found = json.loads(folder.read("plan.json"))
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


def read_parts(parts: Sequence[LocalFolder | RemoteFolder]) -> tuple[dict[str, Any], list[int]]:
    """The plan that all parts have, and for each piece the number of the part that has it, from 0.

    Raises:
        DataError: a folder is no part, the parts have several plans, or pieces are missing.
    """
    if not parts:
        raise DataError("parts: wanted the folders of all parts and that of the data set, found none of the parts")
    plans, names, moved = [], [], []
    for part in parts:
        if not part.has("plan.json"):
            raise DataError(
                f"{part.url}: wanted a part of a build, found none; `mvlm data NAME ... --part i/n` writes it"
            )
        plans.append(json.loads(part.read("plan.json")))
        names.append(plans[-1].pop("part"))
        moved.append(plans[-1].pop("evaluation_sets"))  # machines may have them under several paths
        if plans[-1] != plans[0]:
            raise DataError(
                f"{part.url}: wanted the same input and options as {parts[0].url}, found others; "
                "build all parts with the same command but for --part, on the same files"
            )
    owner: dict[int, int] = {}
    for number, part in enumerate(parts):
        for piece in finished_pieces(part):
            owner.setdefault(piece, number)
    count, of_parts = len(plans[0]["pieces"]), int(names[0].split("/")[1])
    missing = {f"{i % of_parts + 1}/{of_parts}" for i in range(count) if i not in owner}
    if missing:
        raise DataError(
            f"{plans[0]['name']}: wanted all {count} pieces, found {len(owner)}; name or finish the parts "
            f"{', '.join(sorted(missing))} with the commands that began them"
        )
    hashes = plans[0]["recipe"]["against"]
    found = [_first_there(places, wanted) for places, wanted in zip(zip(*moved, strict=True), hashes, strict=True)]
    return {**plans[0], "evaluation_sets": found}, [owner[i] for i in range(count)]


def _first_there(places: Sequence[str], wanted: str) -> str:
    """The first of the folders of a data set that is here with its hash; the first of all if none is."""
    files = {place: Path(place) / "dataset.json" for place in places}
    return next((p for p, file in files.items() if file.is_file() and file_sha256(file) == wanted), places[0])


def claim_working_folder(place: Path | str, plan: dict[str, Any]) -> None:
    """Empty the folder on this machine for a build at a URL, unless it holds work of the same plan. Hold its lock."""
    if not is_remote(place):
        return
    folder = working_folder(place)
    file, wanted = folder / "plan.sha256", hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()
    if file.is_file() and file.read_text() == wanted:
        return
    empty_folder(folder)
    write_file(file, wanted)


def parse_part(text: str) -> tuple[int, int]:
    """Number of a part and number of parts, from `i/n`. Raises DataError."""
    words = text.split("/")
    if len(words) == 2 and all(word.isdecimal() for word in words) and 1 <= int(words[0]) <= int(words[1]):
        return int(words[0]), int(words[1])
    raise DataError(f"part: wanted i/n with i from 1 to n, such as 3/8, got {text!r}")
