"""The commands `mvlm data ...` that build data sets from packages and icon sets."""

from pathlib import Path

from mvlm.commands import data_tools
from mvlm.commands.data_build import CommonOptions, build_source
from mvlm_dataloading.options import BuildOptions

# Commands import what they need when they run, so that --help and errors are immediate.


def emoji(out: Path, /, size: int = 144) -> None:
    """Build the emoji data set: about 3,900 images with their English names, from Python packages only.

    Args:
        out: Folder for the shards.
        size: Side of the square images in pixels.
    """
    from mvlm_dataloading import build_emoji

    build_emoji(out, size)
    print(data_tools.summary(out, "train", "validation", "test"))


def twemoji(out: Path, /, size: int = 144) -> None:
    """Build another artist's drawings of the emoji, for evaluation only: there is no train split.

    Args:
        out: Folder for the shards.
        size: Side of the square images in pixels.
    """
    from mvlm_dataloading import build_twemoji

    build_twemoji(out, size)
    print(data_tools.summary(out, "seen", "validation", "test"))


def easy_vqa(out: Path, /) -> None:
    """Build easy-VQA: 48,248 questions about 5,000 images of simple shapes, from a Python package.

    Args:
        out: Folder for the shards.
    """
    from mvlm_dataloading import build_easy_vqa

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
    from mvlm_dataloading import build_scenes

    build_scenes(
        out, train=train, validation=validation, test=test, seed=seed, tasks=tasks,
        workers=data_tools.processes(workers),
    )  # fmt: skip
    for task in tasks:
        print(data_tools.summary(out / task))


def iconify(
    collection: Path,
    out: Path,
    /,
    size: int = 144,
    validation: float = 0.1,
    test: float = 0.1,
    evaluation_only: bool = False,
    build: BuildOptions = BuildOptions(),  # noqa: B008 (frozen)
    common: CommonOptions = CommonOptions(),  # noqa: B008 (frozen)
) -> None:
    """Build the icons of a collection in Iconify's JSON format: 200 open icon sets have it.

    Emoji collections get the names and splits of the emoji data set. Twemoji and Noto are for evaluation only.

    Args:
        collection: JSON file, such as icons.json of npm's package @iconify-json/mdi; info.json beside it is read.
        out: Folder for the shards. To resume a killed build, give the same command again.
        size: Side of the square images in pixels.
        validation: Share of the concepts for validation, chosen by a hash; "outline" and "bold" are no concepts.
        test: Share of the concepts for test.
        evaluation_only: Name the training split `seen`, so that no run can be trained on it.
    """
    from mvlm_dataloading.sources.drawings.iconify import iconify

    source = iconify(collection, size=size, validation=validation, test=test, evaluation_only=evaluation_only)
    build_source(source, out, build, common)
