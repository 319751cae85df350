"""The commands `mvlm data ...` that build data sets: of every registered source, and from Python packages."""

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_type_hints

from mvlm.commands import data_tools
from mvlm_dataloading.options import BuildOptions
from mvlm_dataloading.sources import all_sources

if TYPE_CHECKING:
    from mvlm_dataloading.sources.record import Source

# Commands import what they need when they run, so that --help and errors are immediate.


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
    """What does the work: processes of this machine, or the nodes of a Ray cluster."""


def source_commands() -> dict[str, Callable[..., None]]:
    """The command of each source by name, without torch."""
    return {name: command_of(function) for name, function in all_sources().items()}


def command_of(function: "Callable[..., Source]") -> Callable[..., None]:
    """The command that builds a source's data set: the function's parameters, OUT, and the options of all builds."""
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
    from mvlm_dataloading.build.build import build_part, build_shards
    from mvlm_dataloading.build.part import parse_part

    part = None if common.part is None else parse_part(common.part)
    with WorkProgress("samples") as counting:
        settings: dict[str, Any] = {
            "evaluation_sets": common.against,
            "workers": data_tools.processes(common.workers, len(source.pieces)),
            "executor": common.executor,
            "progress": lambda done: counting.show(done.pieces, done.of_pieces, done.records),
        }
        if part is None:
            build_shards(source, out, build, **settings)
        else:
            build_part(source, out, part, build, **settings)
    print(f"{out}: part {common.part} is complete" if part else data_tools.summary(out))


def emoji(out: Path, /, size: int = 144) -> None:
    """Build the emoji data set: about 3,900 images with their English names, from Python packages only.

    Args:
        out: Folder for the shards.
        size: Side of the square images in pixels.
    """
    from mvlm_dataloading.build.packaged_sets import build_emoji

    build_emoji(out, size)
    print(data_tools.summary(out, "train", "validation", "test"))


def twemoji(out: Path, /, size: int = 144) -> None:
    """Build another artist's drawings of the emoji, for evaluation only: there is no train split.

    Args:
        out: Folder for the shards.
        size: Side of the square images in pixels.
    """
    from mvlm_dataloading.build.packaged_sets import build_twemoji

    build_twemoji(out, size)
    print(data_tools.summary(out, "seen", "validation", "test"))


def easy_vqa(out: Path, /) -> None:
    """Build easy-VQA: 48,248 questions about 5,000 images of simple shapes, from a Python package.

    Args:
        out: Folder for the shards.
    """
    from mvlm_dataloading.build.packaged_sets import build_easy_vqa

    build_easy_vqa(out)
    print(data_tools.summary(out, "train", "validation", "test"))


def scenes(
    out: Path,
    /,
    train: int = 8000,
    validation: int = 1000,
    test: int = 1000,
    seed: int = 0,
    tasks: tuple[str, ...] = ("vqa", "pairs", "entailment", "caption", "grounding", "names", "places"),
    workers: int | None = None,
) -> None:
    """Build composed scenes: emoji artwork in generated layouts, for five tasks, with texts that alone tell nothing.

    OUT/names has scenes of one object each, with captions, OUT/places questions about what is where.

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

    build_scenes(
        out, train=train, validation=validation, test=test, seed=seed, tasks=tasks,
        workers=data_tools.processes(workers),
    )  # fmt: skip
    for task in tasks:
        print(data_tools.summary(out / task))
