"""The model that fine-tuning starts from: a pretrained one, with its position embeddings resized where needed."""

import logging
from contextlib import suppress
from pathlib import Path

from mvlm.config.finetune import FinetuneConfig
from mvlm.config.model import MaskVLMConfig
from mvlm.errors import ConfigError, RunError
from mvlm.model.maskvlm import MaskVLM
from mvlm.model.shapes import check_sizes
from mvlm.runs.checkpoint import MODEL, MODEL_CONFIG, checkpoints, read_folder_shapes
from mvlm.runs.folder import RunFolder
from mvlm.runs.load import load_model, read_architecture
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
    loaded = load_model(checkpoint)
    pretrained, tokenizer = loaded.network, loaded.tokenizer
    if random_weights:
        log.info("%s: only its architecture and tokenizer are used; weights are random", checkpoint)
        return MaskVLM(resized_config(pretrained.config, image_size, text_length)), tokenizer
    return resized_model(pretrained, image_size, text_length), tokenizer


def architecture_of(config: FinetuneConfig) -> tuple[MaskVLMConfig, Tokenizer]:
    """The architecture and the tokenizer in the run's own checkpoints, or those of the pretrained model.

    A run that is resumed does not need its pretrained model any more. Checkpoints are not verified here, on every rank.
    """
    for checkpoint in reversed(checkpoints(RunFolder(config.out).checkpoints)):
        with suppress(RunError, OSError):  # damaged: an older one is resumed then
            found, tokenizer = read_architecture(checkpoint)
            shapes = read_folder_shapes(checkpoint / MODEL, "model.")
            check_sizes(found, shapes, checkpoint / MODEL_CONFIG, checkpoint / MODEL)
            return found, tokenizer
    loaded = load_model(config.checkpoint)
    pretrained, tokenizer = loaded.network, loaded.tokenizer
    longest = pretrained.config.text_length
    if config.freeze != "none" and not config.random_weights and (config.question_length or 0) > longest:
        raise ConfigError(
            f"question_length: wanted at most the {longest} tokens of the pretrained model if its text encoder is "
            f"frozen, got {config.question_length}, and nothing would train the further positions; give "
            f"--question-length {longest}, or --freeze none"
        )
    block = pretrained.config.mask_block
    if config.image_size is not None and config.image_size % block:
        raise ConfigError(
            f"image_size: wanted a multiple of {block} pixels, as the pretrained model has blocks of masks, got "
            f"{config.image_size}; give --image-size {max(1, round(config.image_size / block)) * block}"
        )
    return resized_config(pretrained.config, config.image_size, config.question_length), tokenizer
