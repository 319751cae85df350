"""The commands `mvlm data ...` that build data sets from files of Python and Debian packages."""

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


def openclipart(
    package: Path,
    out: Path,
    /,
    size: int = 144,
    validation: float = 0.2,
    test: float = 0.2,
    build: BuildOptions = BuildOptions(),  # noqa: B008 (frozen)
    common: CommonOptions = CommonOptions(),  # noqa: B008 (frozen)
) -> None:
    """Build titled drawings of the Open Clip Art Library: about 4,800, in the public domain.

    `apt-get download openclipart-svg` fetches the package file. Nothing is installed.

    Args:
        package: openclipart-svg_*.deb, a package of Debian.
        out: Folder for the shards. To resume a killed build, give the same command again.
        size: Side of the square images in pixels.
        validation: Share of the authors for validation, chosen by a hash of the name; large authors are for training.
        test: Share of the authors for test.
    """
    from mvlm_dataloading.sources.openclipart import openclipart

    build_source(openclipart(package, size=size, validation=validation, test=test), out, build, common)
