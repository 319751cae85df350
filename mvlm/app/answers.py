"""Answers of a model to what a visitor sent: each function checks it, and returns what is shown."""

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mvlm.app.gallery import Found, Gallery
from mvlm.app.uploads import MAX_BYTES
from mvlm.errors import ConfigError, RunError
from mvlm.inference.attention_maps import draw_overlay
from mvlm.inference.images import rgb_image
from mvlm.inference.texts import shortened
from mvlm.inference.trained_model import TrainedModel
from mvlm_dataloading import DataError
from mvlm_dataloading.images.limits import ImageLimits

LIMITS = ImageLimits(max_bytes=MAX_BYTES, max_pixels=40_000_000, max_memory=150_000_000)
"""Limits of one image. SECURITY.md lists the others."""
MAX_CHARACTERS = 1_000
"""Most characters of a text that a visitor sends."""
MAX_LABELS = 100
MAX_TEXTS = 1_000
"""Most texts of one question: labels times templates."""
SHARED_SECONDS = 2.0
"""Longest time that the texts of one question take on a page that several visitors share."""
TIMED_TEXTS = 32
SIDE = 288
"""Side of the images that are shown, in pixels."""
PARTS = ("nothing", "left half", "right half", "top half", "bottom half", "scattered, as in training")
"""Parts of an image that a visitor can hide from the model by a button."""
TOP = 5
log = logging.getLogger(__name__)


def check_image(file: Path) -> Image.Image:
    """The image of an uploaded file, turned as its EXIF data say, transparent areas white.

    Raises:
        RunError: it is no regular file, or not an image within the limits. An SVG is none: it is a program, not pixels.
    """
    return rgb_image(file, "image", LIMITS)


def check_text(text: str | None, name: str = "text") -> str:
    """A text without blanks around it. ConfigError if it is empty or too long."""
    text = (text or "").strip()
    if not text:
        raise ConfigError(f"{name}: wanted a text, found none; write one")
    if len(text) > MAX_CHARACTERS:
        raise ConfigError(f"{name}: wanted at most {MAX_CHARACTERS} characters, got {len(text):,}; shorten it")
    return text


def check_lines(text: str | None, name: str) -> list[str]:
    """The lines of a text that are not empty. ConfigError if there are too many."""
    if text and len(text) > MAX_LABELS * MAX_CHARACTERS:
        raise ConfigError(f"{name}: wanted at most {MAX_LABELS} lines, got {len(text):,} characters; shorten it")
    lines = [check_text(line, name) for line in (text or "").splitlines() if line.strip()]
    if len(lines) > MAX_LABELS:
        raise ConfigError(f"{name}: wanted at most {MAX_LABELS} lines, got {len(lines)}; leave some out")
    return lines


def search(gallery: Gallery, text: str | None, image: Image.Image | None) -> list[Found]:
    """Images that fit a text, an image, or both."""
    text = check_text(text) if (text or "").strip() else None
    try:
        return gallery.search(text, image)
    except (RunError, DataError) as error:  # they name files and URLs, which are for whoever runs the page
        log.warning("search: %s", error)
        raise RunError("search: wanted the images that are searched, found some changed; ask for other ones") from None


def about_task(model: TrainedModel) -> str:
    """A sentence that names the task of the model and the tab that asks it."""
    if model.task is None:
        return (
            "This model has no task's head, as after pretraining: it answers no questions, judges no statements and "
            "writes no captions. `mvlm finetune vqa`, `entailment` or `caption` trains a head; a task of your own is "
            "shown with `--task FILE`."
        )
    where = "The tab Ask has its answers" if images_of_task(model) else "`mvlm eval retrieval` measures it"
    return f"This model was fine-tuned for {model.task.name}. {where}; the other tabs ask the network without its head."


def images_of_task(model: TrainedModel) -> int:
    """Number of images in a sample of the model's task, such as 2 for NLVR2; 0 for a model without such a task."""
    if model.task is None or model.task.whole_batch:
        return 0
    return model.task.loader_options().get("strip", 1)


def ask(model: TrainedModel, *given: Any) -> str:
    """Prediction of the model's task, as text.

    given: the images of a sample, and then its text if the task reads one.
    """
    count = images_of_task(model)
    images = [_given(image) for image in given[:count]]
    texts = [check_text(text) for text in given[count:]]
    (found,) = model.predict(images[0] if count == 1 else images, texts[0] if texts else None)
    if len(found) == 1:
        return str(*found.values())
    return "\n".join(f"{name}: {value}" for name, value in found.items())


def fill(model: TrainedModel, image: Image.Image | None, text: str | None) -> tuple[str, list[list[str]]]:
    """The text with its [MASK]s filled in, and rows (number of the [MASK], token, probability)."""
    filled = model.fill(check_text(text), _given(image), TOP)
    rows = [
        [str(number), guess.token, f"{100 * guess.probability:.1f} %"]
        for number, guesses in enumerate(filled.guesses, 1)
        for guess in guesses
    ]
    return filled.text, rows


def most_shared_texts(model: TrainedModel) -> int:
    """Number of texts of full length that a model encodes within SHARED_SECONDS on this machine, at most MAX_TEXTS."""
    longest = model.network.config.text_length
    texts = [shortened("a " * longest, model.tokenizer, longest)] * TIMED_TEXTS
    model.embed_texts(texts[:1])  # the first call is slower
    began = time.perf_counter()
    model.embed_texts(texts)
    return min(MAX_TEXTS, max(2, int(TIMED_TEXTS * SHARED_SECONDS / (time.perf_counter() - began))))


def classify(
    model: TrainedModel,
    image: Image.Image | None,
    labels: str | None,
    templates: str | None,
    *,
    most_texts: int = MAX_TEXTS,
) -> dict[str, float]:
    """Probability of each label; `labels` and `templates` have one a line. ConfigError for more than `most_texts`."""
    names = list(dict.fromkeys(check_lines(labels, "labels")))
    if len(names) < 2:
        raise ConfigError(f"labels: wanted two or more, one a line, got {len(names)}; add some")
    sentences = check_lines(templates, "templates")
    if len(names) * max(1, len(sentences)) > most_texts:
        raise ConfigError(
            f"templates: wanted at most {most_texts:,} texts, got {len(names)} labels times {max(1, len(sentences))} "
            "templates; leave some out"
        )
    found = model.classify(_given(image), names, sentences or None)
    return dict(zip(found.labels, found.probability[0].tolist(), strict=True))


def look(model: TrainedModel, image: Image.Image | None, text: str | None) -> list[tuple[Image.Image, str]]:
    """For each word of a text an overlay on the image, labelled: where it looks, by GradCAM on ITM."""
    image = _given(image)
    found = model.attention(image, check_text(text))
    words = ["the whole text", *found.words[1:]]
    maps = [found.gradcam[-1, 0], *found.relevance[1:]]  # ITM reads [CLS], and in the last layer nothing else
    return [(draw_overlay(image, heat, side=SIDE), word) for heat, word in zip(maps, words, strict=True)]


def rebuild(
    model: TrainedModel, image: Image.Image | None, hidden: NDArray[np.bool_], text: str | None, wrong: str | None
) -> tuple[Image.Image, Image.Image]:
    """The image with its hidden patches rebuilt under a text, and under a wrong one; the first twice without it."""
    image = _given(image)
    if not hidden.any():
        raise ConfigError("image: wanted a part that is rubbed out, found none; click on the image or choose a part")
    texts = [check_text(text), check_text(wrong if (wrong or "").strip() else text)]
    right, other = (Image.fromarray(model.reconstruct(image, text, hidden).rebuilt) for text in texts)
    return right.resize((SIDE, SIDE), Image.Resampling.NEAREST), other.resize((SIDE, SIDE), Image.Resampling.NEAREST)


def hide_part(model: TrainedModel, part: str) -> NDArray[np.bool_]:
    """Grid of patches, bool (rows, columns), True = hidden, that hides one of PARTS of the image."""
    side = _side(model)
    if part == PARTS[-1]:
        return model.reconstruct(Image.new("RGB", (side, side)), "a").hidden
    half, rows, columns = side // 2, slice(None), slice(None)
    if part in ("top half", "bottom half"):
        rows = slice(half) if part == "top half" else slice(half, None)
    elif part != PARTS[0]:
        columns = slice(half) if part == "left half" else slice(half, None)
    hidden = np.zeros((side, side), bool)
    hidden[rows, columns] = part != PARTS[0]
    return hidden


def _side(model: TrainedModel) -> int:
    """Number of patches along a side of the model's images."""
    return model.network.config.image_size // model.network.config.patch_size


def toggle_patch(hidden: NDArray[np.bool_], point: Sequence[float]) -> NDArray[np.bool_]:
    """Hide the patch at a point (x, y) of the shown image, or show it if it is hidden. The other patches stay."""
    side = len(hidden)
    column, row = (min(side - 1, max(0, int(at * side / SIDE))) for at in point)
    changed = hidden.copy()
    changed[row, column] = not changed[row, column]
    return changed


def write_patches(hidden: NDArray[np.bool_]) -> str:
    """Write the grid of hidden patches, bool (rows, columns), as text for the browser: row by row, 1 = hidden."""
    return "".join("01"[int(patch)] for patch in hidden.ravel())


def read_patches(model: TrainedModel, text: str | None) -> NDArray[np.bool_]:
    """Grid of hidden patches, bool (rows, columns), from the text of `write_patches`. ConfigError for another text."""
    side = _side(model)
    if text is None or len(text) != side * side or not set(text) <= {"0", "1"}:
        raise ConfigError("image: wanted its patches, found others; load the page again")
    return np.array([patch == "1" for patch in text]).reshape(side, side)


def draw_hidden(image: Image.Image | None, hidden: NDArray[np.bool_]) -> Image.Image | None:
    """The image as the model sees it, with hidden patches grey and the grid of patches drawn in."""
    if image is None:
        return None
    pixels = np.array(image.convert("RGB").resize((SIDE, SIDE)))
    rows = np.arange(SIDE) * len(hidden) // SIDE
    pixels[hidden[rows][:, rows]] = 128
    starts = np.flatnonzero(np.diff(rows)) + 1
    for line in starts:
        pixels[line] = pixels[line] // 2 + 96
        pixels[:, line] = pixels[:, line] // 2 + 96
    return Image.fromarray(pixels)


def _given(image: Image.Image | None) -> Image.Image:
    if image is None:
        raise ConfigError("image: wanted an image, found none; upload one")
    return image
