"""Examples of a task's page: right and wrong ones, chosen by a rule that knows no picture."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from mvlm.inference.images import decode_image, load_image
from mvlm.inference.overlay import draw_overlay
from mvlm.report.html import data_uri
from mvlm.report.task_maps import TaskMaps, task_maps
from mvlm.report.verdicts import Verdict
from mvlm.tasks.task import Task
from mvlm_dataloading import Dataset

SHOWN = 6  # of each kind
MOST_WORDS = 12  # with a map each, [CLS] included
SIDE = 96  # pixels of a panel


@dataclass(frozen=True, slots=True)
class Panel:
    """An image, or the map of a word over it."""

    word: str
    """Empty for the image itself."""
    image: str
    """Data URI."""


@dataclass(frozen=True, slots=True)
class TaskExample:
    """A sample with its prediction."""

    key: str
    verdict: Verdict
    probability: float | None
    """Of the prediction, by the run's checkpoint."""
    rows: list[list[Panel]]
    """For each image of the sample: the image, then the maps of words over it."""


def choose(verdicts: Sequence[Verdict], right: bool, dataset: Dataset) -> list[Verdict]:
    """The first `SHOWN` right (or wrong) samples in the order of the SHA-256 of their keys."""

    def place(verdict: Verdict) -> str:
        return hashlib.sha256(dataset.keys[verdict.sample].encode()).hexdigest()

    return sorted((v for v in verdicts if v.right is right), key=place)[:SHOWN]


def task_examples(task: Task, verdicts: Sequence[Verdict], right: bool, dataset: Dataset) -> list[TaskExample]:
    """The chosen right (or wrong) samples, with maps of words unless the model does without a modality."""
    found = []
    for verdict in choose(verdicts, right, dataset):
        squares = _squares(dataset, verdict.sample)
        side = task.config.image_size
        maps = None
        if task.options.blind == "no":
            pixels = torch.cat([load_image(square, side) for square in squares], dim=2)  # (3, S, n S)
            maps = task_maps(task, pixels, verdict.text, verdict.predicted)
        rows = [_row(square, maps, number) for number, square in enumerate(squares)]
        key = dataset.keys[verdict.sample]
        found.append(TaskExample(key, verdict, maps.probability if maps else None, rows))
    return found


def _squares(dataset: Dataset, sample: int) -> list[np.ndarray]:
    """The images of a sample, uint8 (H, W, 3) each: those side by side of a strip, else the one."""
    whole = decode_image(dataset.image_bytes(sample), dataset.where(sample))
    return np.split(whole, int(dataset.metadata(sample).get("images", 1)), axis=1)


def _row(image: np.ndarray, maps: TaskMaps | None, number: int) -> list[Panel]:
    panels = [Panel("", data_uri(load_image(image, SIDE)))]
    for word, heat in zip(maps.words, maps.maps[number], strict=True) if maps else ():
        if len(panels) > MOST_WORDS:
            break
        panels.append(Panel(word, data_uri(draw_overlay(image, heat, side=SIDE))))
    return panels
