"""The model that fine-tuning starts from: a pretrained one, with its position embeddings resized where needed."""

import logging
from pathlib import Path

from mvlm.model.maskvlm import MaskVLM
from mvlm.runs.load import load_model
from mvlm.weights.resize import resized_config, resized_model
from mvlm_dataloading import Tokenizer

log = logging.getLogger(__name__)


def starting_model(
    checkpoint: Path, image_size: int | None = None, text_length: int | None = None, random_weights: bool = False
) -> tuple[MaskVLM, Tokenizer]:
    """A pretrained model for images of another size or texts of another length (`resized_model`), and its tokenizer.

    Args:
        image_size: side in pixels; None for the pretrained one.
        text_length: longest text in tokens; None for the pretrained one.
        random_weights: keep the random weights of a new model, from torch's generator.
    """
    pretrained, tokenizer = load_model(checkpoint)
    if random_weights:
        log.info("%s: only its architecture and tokenizer are used; weights are random", checkpoint)
        return MaskVLM(resized_config(pretrained.config, image_size, text_length)), tokenizer
    return resized_model(pretrained, image_size, text_length), tokenizer
