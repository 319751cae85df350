"""Maps of words for a report: GradCAM of a caption over its image, and of a wrong one. The pointing game."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mvlm.errors import ConfigError
from mvlm.evaluation.cross_modal_gain import partners_of
from mvlm.inference.overlay import draw_words
from mvlm.inference.trained_model import TrainedModel
from mvlm.report.examples import chosen_samples
from mvlm.report.html import data_uri, figures_of
from mvlm_dataloading import Dataset

SAMPLES = 4
MOST_WORDS = 7
SIDE = 112  # pixels of a panel


@dataclass(frozen=True, slots=True)
class WordMaps:
    """Maps of the words of a caption over an image."""

    caption: str
    log_odds: float
    """ITM's log-odds that image and caption belong together."""
    panels: str
    """Data URI: the image, and a panel for each word."""


@dataclass(frozen=True, slots=True)
class PointingGame:
    """Figures of `mvlm eval grounding` as a report shows them."""

    source: str
    """Model, data and number of phrases."""
    rows: list[list[str]]
    """Name, accuracy in per cent and 95 % interval of the model and of each baseline."""
    verdict: str
    """Sentence on the difference to the untrained model."""
    stale: bool
    """True if the figures are of another model than the report."""


def pointing_game(file: Path, model: str) -> PointingGame | None:
    """The pointing game of a file of `mvlm eval grounding`, None without the file.

    Args:
        model: hash of the model that the report is of. A file of an earlier version names no model.

    Raises:
        RunError: the file is something else.
    """
    if not file.is_file():
        return None
    with figures_of(file, "mvlm eval grounding") as found:
        rows = [
            ["this model", f"{found['accuracy']:.1f}", _interval(found["accuracy_95"])],
            ["the same with another phrase", f"{found['wrong_phrase']:.1f}", ""],
            ["untrained model, random weights", f"{found['untrained']:.1f}", _interval(found["untrained_95"])],
            ["centre of the image", f"{found['center']:.1f}", ""],
            ["chance, the mean share of the image that a box covers", f"{found['chance']:.1f}", ""],
        ]
        source = f"{found['phrases']} phrases of {found['data']}, {found['split']}; checkpoint {found['checkpoint']}"
        return PointingGame(source, rows, _verdict(found), stale=found.get("model", model) != model)


def _verdict(found: dict[str, Any]) -> str:
    low, high = found["above_untrained_95"]
    interval = f"95 % interval of the difference {low:+.1f} to {high:+.1f} points"
    if low > 0:
        return f"The model points better than the untrained one ({interval})."
    if high < 0:
        return f"The model points worse than the untrained one ({interval})."
    return f"The model does not point better than the untrained one ({interval})."


def _interval(bounds: Sequence[float]) -> str:
    return f"{bounds[0]:.1f} to {bounds[1]:.1f}"


def word_maps(model: TrainedModel, split: Dataset) -> list[tuple[WordMaps, WordMaps]]:
    """For a few images, chosen at random: maps of the own caption, and of another image's."""
    partner = partners_of(split)
    found = []
    for i in chosen_samples(SAMPLES, len(split), seed=3):
        captions = split.captions(i)[0], split.captions(int(partner[i]))[0]
        image = split.image_bytes(i)
        found.append((_maps(model, image, captions[0]), _maps(model, image, captions[1])))
    return found


def _maps(model: TrainedModel, image: bytes, caption: str) -> WordMaps:
    words = caption.split()[:MOST_WORDS]
    while True:
        try:
            found = model.attention(image, " ".join(words))
            break
        except ConfigError:  # more tokens than the model takes
            if len(words) > 1:
                words.pop()
            elif len(words[0]) > 1:  # a URL, or a language that is written without blanks
                words = [words[0][: len(words[0]) // 2]]
            else:
                raise
    sheet = draw_words(image, found, side=SIDE, columns=1 + len(found.words))
    return WordMaps(" ".join(words), found.log_odds, data_uri(sheet))
