"""Maps of words for a report: GradCAM of a caption over its image, beside that of a wrong caption."""

from dataclasses import dataclass

import numpy as np
import torch

from mvlm.errors import ConfigError
from mvlm.evaluation.cross_modal_gain import wrong_partners
from mvlm.inference.overlay import draw_words
from mvlm.inference.trained_model import TrainedModel
from mvlm.report.examples import chosen_samples, data_uri
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


def word_maps(model: TrainedModel, split: Dataset) -> list[tuple[WordMaps, WordMaps]]:
    """For a few images, chosen at random: maps of the own caption, and of another image's."""
    partner = wrong_partners(len(split))
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
            if len(words) < 2:
                raise
            words.pop()
    sheet = draw_words(image, found, side=SIDE, columns=1 + len(found.words))
    panels = data_uri(torch.from_numpy(np.array(sheet)).permute(2, 0, 1))
    return WordMaps(" ".join(words), found.log_odds, panels)
