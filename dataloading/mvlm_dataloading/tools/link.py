"""Linking: an index of tars and Parquet files of others, which stay where they are, from one streaming pass.

    PART/link.json               the files, the options, and which part this is
    PART/pieces/000/000002.index the samples of one file, an index of one shard
    PART/pieces/000/000002.json  what dataset.json says of it; written last
    PART/lock                    flock: exclusive while a process writes the part
    .OUT.link/                   the unfinished link: part 1/1 of it, if one process links all

File k belongs to part k mod n + 1 of n. A finished piece is never read again, so the same command resumes a killed
pass, and parts that were made anywhere give the bytes of one pass.
"""

import json
import logging
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mvlm_dataloading.build.build import Executor
from mvlm_dataloading.build.workers import run_tasks, run_tasks_on_ray, wait_for_files
from mvlm_dataloading.dataset.description import add_shard, require_free_folder, require_split_name, write_description
from mvlm_dataloading.dataset.folders import lock_folder
from mvlm_dataloading.dataset.sample_index import IndexWriter, index_path, map_index
from mvlm_dataloading.errors import DataError
from mvlm_dataloading.files import new_folder, replaced, write_file
from mvlm_dataloading.links.captions import CaptionSpec, read_spec
from mvlm_dataloading.links.samples import is_table
from mvlm_dataloading.links.scan import Scan, ScanOptions, columns_of
from mvlm_dataloading.links.store import RangeStore, tell_outage
from mvlm_dataloading.links.tables import scan_table
from mvlm_dataloading.links.tars import scan_tar
from mvlm_dataloading.links.urls import LINKED, PACKED, expand
from mvlm_dataloading.sources.record import canonical_split, split_in_name
from mvlm_dataloading.untrusted import parse_json, read_regular
from mvlm_dataloading.urls import with_credentials

log = logging.getLogger(__name__)

PLAN_BYTES = 256 << 20
"""Most bytes of a link.json."""
_MOST_FAILED = 16
"""A pass ends when so many files cannot be linked."""
_IN_FLIGHT = 8


@dataclass(frozen=True, slots=True)
class LinkOptions:
    """Settings of `mvlm data link`."""

    captions: CaptionSpec
    image: str = ""
    """File name extension of the images in tars, or their column in tables. Default: the only candidate."""
    split: str = ""
    """Split of all files. Default: a word of a file's name (cc12m-validation-000.tar) or of its folder on the hub, else
    train."""

    def to_json(self) -> dict[str, Any]:
        return {"captions": {**self.captions.to_json(), "image": self.image}, "split": self.split}


def link_files(
    given: Sequence[str],
    out: Path,
    options: LinkOptions,
    *,
    part: tuple[int, int] | None = None,
    workers: int = 1,
    executor: Executor = "processes",
    progress: Callable[[int, int, int], None] = lambda done, total, samples: None,
) -> dict[str, Any] | None:
    """Link tars and Parquet files, or one part of them, or resume a pass that was killed.

    Args:
        given: URLs and paths, as `expand` takes them.
        out: new folder of the data set, or of the part.
        part: number of the part, from 1, and number of parts. `merge_links` joins them.
        workers: number of processes; 0 works in this one.
        executor: "processes" of this machine, or the nodes of a "ray" cluster (see `run_tasks_on_ray`), which share the
            folder of `out`.
        progress: called with the number of finished files, of all files, and of samples that this call has found.

    Returns:
        The description; None for a part.

    Raises:
        DataError: a file cannot be linked, which the message names; finished files are kept for the same command.
    """
    out = Path(out).resolve()
    if options.split:
        require_split_name(options.split)
    plan = {"urls": _checked(expand(given)), **options.to_json()}
    folder = out if part else out.with_name(f".{out.name}.link")
    if part is None or not is_link_part(folder):
        require_free_folder(out)
    with lock_folder(folder):
        _begin(folder, {**plan, "part": "{}/{}".format(*(part or (1, 1)))})
        _write_pieces(folder, plan["urls"], options, part or (1, 1), workers, executor, progress)
        if part:
            return None
        description = _assemble([folder], plan, options, out)
    shutil.rmtree(folder, ignore_errors=True)
    return description


def is_link_part(folder: Path) -> bool:
    """True for the folder of a part of a link."""
    return (folder / "link.json").is_file()


def merge_links(parts: Sequence[Path], out: Path) -> dict[str, Any]:
    """Join the parts of a link, which stay as they are. Returns the description.

    Raises:
        DataError: parts are missing, unfinished or of several links, or `out` is in use.
    """
    out = Path(out).resolve()
    require_free_folder(out)
    plans = [_read_plan(part) for part in parts]
    for folder, plan in zip(parts, plans, strict=True):
        if {**plan, "part": ""} != {**plans[0], "part": ""}:
            raise DataError(
                f"{folder}: wanted the same files and options as {parts[0]}, found others; link all parts with the "
                "same command but for --part"
            )
    plan = plans[0]
    captions = read_spec(plan["captions"], f"{parts[0]}/link.json")
    return _assemble(parts, plan, LinkOptions(captions, plan["captions"]["image"], plan["split"]), out)


def _checked(urls: list[str]) -> list[str]:
    for url in urls:
        if url.endswith(PACKED):
            raise DataError(
                f"{url}: wanted an uncompressed tar or a Parquet file, found a compressed one by its name; unpack it, "
                "or convert it with `mvlm data webdataset`"
            )
        if not url.endswith(LINKED):
            raise DataError(f"{url}: wanted a name that ends in .tar or .parquet, found another; name such files")
    return urls


def _begin(folder: Path, plan: dict[str, Any]) -> None:
    """Write `plan`, the specification of a link, to link.json, or check that the one that is there is equal.

    The caller holds the lock of the folder.
    """
    if not is_link_part(folder):
        write_file(folder / "link.json", json.dumps(plan))
    elif _read_plan(folder) != plan:
        raise DataError(
            f"{folder}: wanted an unfinished link of these files with these options, found another; finish it with its "
            "own command, or remove the folder to start over"
        )


def _read_plan(folder: Path) -> dict[str, Any]:
    """Content of a link.json. DataError if there is none, or if it is damaged."""
    if not is_link_part(folder):
        raise DataError(f"{folder}: wanted a part of a link, found none; `mvlm data link --part i/n` writes it")
    kinds = {"urls": list, "captions": dict, "split": str, "part": str}
    return _read_object(folder / "link.json", PLAN_BYTES, folder, kinds, "remove the folder and link again")


def _read_object(file: Path, limit: int, within: Path, kinds: dict[str, type], remedy: str) -> dict[str, Any]:
    try:
        found = parse_json(read_regular(file, limit, within=within))
        if not isinstance(found, dict) or not all(isinstance(found.get(name), kind) for name, kind in kinds.items()):
            raise ValueError("other fields")
    except DataError:
        raise
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: wanted a file of a link, found {error}; {remedy}") from None
    return found


def _piece(folder: Path, number: int) -> Path:
    return folder / "pieces" / f"{number // 1000:03d}" / f"{number:06d}.json"


def _write_pieces(
    folder: Path,
    urls: list[str],
    options: LinkOptions,
    part: tuple[int, int],
    workers: int,
    executor: Executor,
    progress: Callable[[int, int, int], None],
) -> None:
    mine = range(part[0] - 1, len(urls), part[1])
    left = [number for number in mine if not _piece(folder, number).exists()]
    failed, done, samples = list[str](), len(mine) - len(left), 0
    progress(done, len(mine), samples)
    tasks, scan = ((number, with_credentials(urls[number])) for number in left), partial(_scan, folder, options)
    on_ray = executor == "ray" and bool(left)
    with closing(
        run_tasks_on_ray(scan, tasks) if on_ray else run_tasks(scan, tasks, min(workers, len(left)))
    ) as events:
        for event in events:
            if event.kind == "died":
                failed.append(f"{urls[event.task[0]]}: wanted its process to finish, found that it died")
            elif event.kind == "progress" and isinstance(event.value, str):
                tell_outage(event.value)
            elif event.kind == "progress":
                samples += event.value
            elif isinstance(event.value, DataError):
                failed.append(str(event.value))
            else:
                done += 1
                if event.value:
                    log.warning("%s", event.value)
            progress(done, len(mine), samples)
            if len(failed) >= _MOST_FAILED:
                break
    if failed:
        raise DataError(
            f"{failed[0]} ({len(failed)} of {len(mine)} files could not be linked; {done} are finished, and the same "
            "command goes on from there)"
        )
    if on_ray:
        wait_for_files(folder, lambda: [number for number in left if not _piece(folder, number).exists()])


def _scan(
    folder: Path, options: LinkOptions, task: tuple[int, str], report: Callable[[int | str], None]
) -> DataError | str:
    """Write the piece of a file. Returns a warning, which may be empty, or the error if it cannot be linked.

    report: called with the number of samples, and with the name of a store that is away.
    """
    number, url = task
    file = _piece(folder, number)
    if file.exists():  # a node of a cluster that was lost has finished it
        return ""
    store = RangeStore(_IN_FLIGHT, report)
    try:
        linked = store.stat(url)
        split = options.split or canonical_split(_split_of(linked.url) or "train", linked.url, "give --split")
        scan = scan_table if is_table(linked.url) else scan_tar
        found = scan(store, linked, ScanOptions(options.captions, options.image))
    except DataError as error:
        return error
    finally:
        store.close()
    records = found.records
    shard = {"tar": linked.url, "samples": len(records), "bytes": linked.size, "sha256": "", "etag": linked.etag}
    if is_table(linked.url):
        shard["groups"] = found.groups
    file.parent.mkdir(parents=True, exist_ok=True)
    with replaced(file.with_suffix(".index")) as aside, aside.open("wb") as index:
        writer = IndexWriter(index, "", [shard], columns=found.columns)
        writer.add(records, bytes(found.keys))
        writer.finish()
    write_file(file, json.dumps({"split": split, "shard": shard, **_counted(found)}))
    report(len(records))
    return found.warning


def _split_of(url: str) -> str | None:
    """Split that the name of a file states, or on the hub a folder that it is in."""
    *folders, name = url.split("/")
    inside = folders[5:] if url.startswith("hf://") else []
    return next(filter(None, map(split_in_name, [name, *reversed(inside)])), None)


def _counted(found: Scan) -> dict[str, Any]:
    return {"captions": found.captions, "left_out": dict(found.left_out), "fields": dict(found.fields.most_common(20))}


_PIECE = {"split": str, "shard": dict, "captions": int, "left_out": dict, "fields": dict}


def _pieces(parts: Sequence[Path], count: int) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yield (index file, content of its .json) for each of the `count` linked files, in order.

    DataError if one is missing in all parts or is damaged.
    """
    for number in range(count):
        folder = next((part for part in parts if _piece(part, number).exists()), None)
        if folder is None:
            raise DataError(
                f"{parts[0]}: wanted the pieces of all {count} files, found none of file {number + 1}; name or finish "
                "all parts with the commands that began them"
            )
        file = _piece(folder, number)
        yield file.with_suffix(".index"), _read_object(file, 1 << 20, folder, _PIECE, "remove it and link again")


def _assemble(parts: Sequence[Path], plan: dict[str, Any], options: LinkOptions, out: Path) -> dict[str, Any]:
    """Write the data set `out` from the pieces of all files. Returns its description."""
    splits: dict[str, dict[str, Any]] = {}
    indices: dict[str, list[Path]] = {}
    left_out, fields = Counter[str](), Counter[str]()
    for index, about in _pieces(parts, len(plan["urls"])):
        left_out.update(about["left_out"])
        fields.update(about["fields"])
        if about["shard"]["samples"]:
            add_shard(splits, about["split"], about["shard"], about["captions"])
            indices.setdefault(about["split"], []).append(index)
    if not splits:
        found = ", ".join(name for name, _ in fields.most_common(8)) or "nothing"
        raise DataError(
            f"{out}: wanted at least one sample with an image and captions in {', '.join(options.captions.files)}, "
            f"found none (left out: {dict(left_out)}; the samples have {found}); name the captions with --caption"
        )
    about = {"name": out.name, "source": "files of others, linked where they are", "licence": "", "attribution": ""}
    captions, columns = [plan["captions"]], columns_of(options.captions)
    with new_folder(out, out.with_name(f".{out.name}.new")) as folder:
        description = write_description(folder, about, {"link": options.to_json()}, splits, left_out, captions=captions)
        for split, entry in splits.items():
            with index_path(folder, split).open("w+b") as file:
                writer = IndexWriter(file, split, entry["shards"], columns=columns, captions=captions)
                for index in indices[split]:
                    writer.add(*map_index(index, "remove it and link again").shard_content(0))
                writer.finish()
    return description
