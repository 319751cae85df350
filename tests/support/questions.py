"""Questions and hypotheses about the coloured squares of `support.scenes`, as data sets of downstream tasks."""

from pathlib import Path

from mvlm_dataloading import ShardWriter
from support.scenes import COLOURS, png, scene

COUNTS = {"train": 32, "validation": 16, "test": 16}
LABELS = ("contradiction", "neutral", "entailment")


def _writer(folder: Path) -> ShardWriter:
    return ShardWriter(
        folder, name="questions", source="made up for tests", licence="CC0", attribution="drawn by <nobody>", recipe={}
    )


def write_questions(folder: Path, counts: dict[str, int] | None = None) -> Path:
    """VQA on scenes: the colour and the ground of each scene are asked in turn, with ten equal answers."""
    with _writer(folder) as writer:
        for split, count in (counts or COUNTS).items():
            for i in range(count):
                pixels, caption = scene(i // 2 if split == "train" else 3 * i + 1)
                words = caption.split()
                question, answer, kind = [
                    ("what colour is the square?", words[0], "what colour"),
                    ("what is behind it?", words[-1], "what is"),
                ][i % 2]
                metadata = {
                    "question_id": f"{split}-{i}",
                    "image_id": caption,
                    "question_type": kind,
                    "answer_type": "other",
                    "answers": [{"answer": answer, "answer_id": a} for a in range(1, 11)],
                }
                assert writer.add(f"{split}{i:03d}", png(pixels), [question], metadata, split=split) is None
    return folder


def write_hypotheses(folder: Path, counts: dict[str, int] | None = None) -> Path:
    """Entailment on scenes: the right colour is entailed, a wrong one contradicted, the weather neutral."""
    colours = list(COLOURS)
    with _writer(folder) as writer:
        for split, count in (counts or COUNTS).items():
            for i in range(count):
                pixels, caption = scene(i // 2 if split == "train" else 3 * i + 1)
                colour = caption.split()[0]
                wrong = colours[(colours.index(colour) + 1) % len(colours)]
                text = {"entailment": f"it is {colour}", "contradiction": f"it is {wrong}", "neutral": "it rains"}
                label = LABELS[i % 3]
                metadata = {"pairID": f"{split}-{i}", "label": label, "image_id": caption}
                assert writer.add(f"{split}{i:03d}", png(pixels), [text[label]], metadata, split=split) is None
    return folder


def write_phrases(folder: Path, counts: dict[str, int] | None = None, candidates: bool = False) -> Path:
    """Grounding on scenes: the colour of the square is the phrase. Its colour is also its class, for recognition."""
    with _writer(folder) as writer:
        for split, count in (counts or COUNTS).items():
            for i in range(count):
                pixels, caption = scene(i if split == "train" else 3 * i + 1)
                left, top = 16 * ("right" in caption), 16 * ("bottom" in caption)
                metadata = {"id": f"{split}-{i}", "image_id": caption, "box": [left, top, 16, 16], "size": [32, 32]}
                metadata |= {"label": caption.split()[0], "group": caption.split()[-1]}
                if candidates:
                    metadata["candidates"] = [[x, y, 16, 16] for y in (0, 16) for x in (0, 16)]
                assert writer.add(f"{split}{i:03d}", png(pixels), [caption], metadata, split=split) is None
    return folder
