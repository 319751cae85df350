"""Questions and hypotheses about the coloured squares of `support.scenes`, as data sets of downstream tasks."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from mvlm.config.finetune import FinetuneConfig
from mvlm_dataloading import ShardWriter
from support.scenes import COLOURS, png, scene

COUNTS = {"train": 32, "validation": 16, "test": 16}
LABELS = ("contradiction", "neutral", "entailment")


Sample = tuple[np.ndarray, str, dict[str, Any]]
"""Pixels, text and metadata of a question."""


def _write(folder: Path, counts: dict[str, int] | None, sample: Callable[[str, int], Sample]) -> Path:
    with ShardWriter(
        folder, name="questions", source="made up for tests", licence="CC0", attribution="drawn by <nobody>", recipe={}
    ) as writer:
        for split, count in (counts or COUNTS).items():
            for i in range(count):
                pixels, text, metadata = sample(split, i)
                assert writer.add(f"{split}{i:03d}", png(pixels), [text], metadata, split=split) is None
    return folder


def write_questions(folder: Path, counts: dict[str, int] | None = None) -> Path:
    """VQA on scenes: the colour and the ground of each scene are asked in turn, with ten equal answers."""

    def sample(split: str, i: int) -> Sample:
        pixels, caption = scene(i // 2 if split == "train" else 3 * i + 1)
        words = caption.split()
        question, answer, kind = [
            ("what colour is the square?", words[0], "what colour"),
            ("what is behind it?", words[-1], "what is"),
        ][i % 2]
        answers = [{"answer": answer, "answer_id": a} for a in range(1, 11)]
        kinds = {"question_type": kind, "answer_type": "other"}
        return pixels, question, {"question_id": f"{split}-{i}", "image_id": caption, **kinds, "answers": answers}

    return _write(folder, counts, sample)


def write_hypotheses(folder: Path, counts: dict[str, int] | None = None) -> Path:
    """Entailment on scenes: the right colour is entailed, a wrong one contradicted, the weather neutral."""
    colours = list(COLOURS)

    def sample(split: str, i: int) -> Sample:
        pixels, caption = scene(i // 2 if split == "train" else 3 * i + 1)
        colour, label = caption.split()[0], LABELS[i % 3]
        wrong = colours[(colours.index(colour) + 1) % len(colours)]
        text = {"entailment": f"it is {colour}", "contradiction": f"it is {wrong}", "neutral": "it rains"}
        return pixels, text[label], {"pairID": f"{split}-{i}", "label": label, "image_id": caption}

    return _write(folder, counts, sample)


def write_statements(folder: Path, counts: dict[str, int] | None = None) -> Path:
    """NLVR2 on scenes: "the left is red" and "the right is red", of two images and of the same images swapped."""

    def sample(split: str, i: int) -> Sample:
        number, side, swapped = i // 4, ("left", "right")[i // 2 % 2], i % 2
        pair = [scene(number + (split != "train") + 5 * k) for k in (0, 1)]
        colour, other = (text.split()[0] for _, text in pair)
        assert colour != other
        metadata = {
            "identifier": f"{split}-{number}-{swapped}-{side}",
            "label": "true" if (side == "left") != bool(swapped) else "false",
            "images": 2,
            "set_id": f"{number}",
        }
        strip = np.concatenate([pixels for pixels, _ in (pair[::-1] if swapped else pair)], axis=1)
        return strip, f"the {side} is {colour}", metadata

    return _write(folder, counts, sample)


def write_captions(folder: Path, counts: dict[str, int] | None = None) -> Path:
    """Write a data set of scenes with one caption each. counts: split -> number of samples."""
    return _write(folder, counts, lambda split, i: (*scene(i if split == "train" else 3 * i + 1), {}))


WRITERS = {"vqa": write_questions, "entailment": write_hypotheses, "pairs": write_statements, "caption": write_captions}
"""Writer of a small data set for each task."""


def finetune_config(trained: Path, data: Path, out: Path, task: str = "vqa", **changes: Any) -> FinetuneConfig:
    """Configuration of a fine-tuning run of a few steps of the micro model."""
    settings: dict[str, Any] = {
        "task": task, "checkpoint": trained, "data": data, "out": out, "max_steps": 2, "batch_size": 8,
        "lr_encoder": 3e-3, "lr_cross": 3e-3, "lr_head": 3e-3, "warmup_steps": 2, "lr_end": 0.0,
        "crop_scale": (1.0, 1.0), "device": "cpu", "precision": "fp32", "weight_decay": 0.0, "answers": "classifier",
    }  # fmt: skip
    return FinetuneConfig(**(settings | changes))
