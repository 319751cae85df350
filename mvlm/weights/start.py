"""Weights and tokenizer that a pretraining run starts from: a trained model's, those of other libraries' encoders, or
random ones."""

import math
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch

from mvlm.config.json_files import read_config
from mvlm.config.pretrain import PretrainConfig
from mvlm.distributed.coordination import run_on_all_ranks
from mvlm.distributed.world import World
from mvlm.errors import ConfigError
from mvlm.files import check_fit, copy_into
from mvlm.model.maskvlm import MaskVLM
from mvlm.runs.checkpoint import TOKENIZER, checkpoints
from mvlm.runs.folder import RunFolder
from mvlm.runs.load import load_without_head, read_architecture_of
from mvlm.weights.image_tower import load_image_tower
from mvlm.weights.load import load_image_weights, load_text_weights
from mvlm.weights.resize import log_sizes, resized_tensors
from mvlm.weights.text_tower import load_text_tower, read_text_tower, read_tower_tokenizer
from mvlm_dataloading import DataError, Dataset, Tokenizer, load_tokenizer
from mvlm_dataloading.tokenizer import parse_tokenizer, stored_tokenizer, train_on_sample


def with_text_tower(config: PretrainConfig) -> PretrainConfig:
    """The configuration with the settings of the model that follow from its text tower, if it has one.

    They come from the run's own config.json, else from the tower's folder or from the initial model.
    """
    before = RunFolder(config.out).config
    if before.is_file():
        found = read_config(before).get("model") or {}
    elif config.text_tower is not None:
        found = read_text_tower(config.text_tower)
    elif config.initial_model is not None:
        found = read_architecture_of(config.initial_model)[0].to_dict()
    else:
        return config
    if not found.get("text_tower"):
        return config
    settings = {name: found[name] for name in ("text_tower", "vocab_size", "itc_width") if name in found}
    return replace(config, model=replace(config.model, **settings))


def choose_tokenizer(config: PretrainConfig, dataset: Dataset) -> Tokenizer:
    """Load the tokenizer that `find_tokenizer` finds, or train one on captions of the data set."""
    return find_tokenizer(config, dataset) or train_tokenizer(config, dataset)


def find_tokenizer(config: PretrainConfig, dataset: Dataset) -> Tokenizer | None:
    """Load the tokenizer of the run's checkpoints, of its initial model, the configured one or the data set's.

    A run that is resumed does not need its initial model any more. The configured file, if it is still there, comes
    before the checkpoints', which the trainer compares with it. None if a tokenizer has to be trained.
    """
    if config.initial_model is None and config.text_tower is None and config.tokenizer is not None:
        own = None if config.tokenizer.exists() else _own_tokenizer(config)
        return own or load_tokenizer(config.tokenizer)
    if (own := _own_tokenizer(config)) is not None:
        return own
    if config.initial_model is not None:
        return read_architecture_of(config.initial_model)[1]
    if config.text_tower is not None:
        return read_tower_tokenizer(config.text_tower)
    return stored_tokenizer(dataset)


def train_tokenizer(config: PretrainConfig, dataset: Dataset) -> Tokenizer:
    """Train a run's tokenizer on a sample of the data. ConfigError if the vocabulary is too small for all bytes."""
    try:
        return train_on_sample(dataset, config.model.vocab_size)
    except DataError:
        raise
    except ValueError as error:
        raise ConfigError(f"model.vocab_size: {error}") from None


def share_tokenizer(config: PretrainConfig, dataset: Dataset, world: World) -> Tokenizer:
    """Choose the tokenizer of all ranks. One that has to be trained is trained on rank 0 and sent.

    Every rank calls it. A rank that does not see the run's checkpoints gets rank 0's tokenizer too.
    """
    found = run_on_all_ranks(world, lambda: find_tokenizer(config, dataset))
    if not any(world.gather_objects(found is None)):
        assert found is not None
        return found
    trained = run_on_all_ranks(world, lambda: found or train_tokenizer(config, dataset) if world.first else None)
    text = world.send_text("" if trained is None else trained.to_str())
    return trained or parse_tokenizer(text, "tokenizer of rank 0")


def _own_tokenizer(config: PretrainConfig) -> Tokenizer | None:
    """The tokenizer in the run's own checkpoints. Checkpoints are not verified here, on every rank."""
    for checkpoint in reversed(checkpoints(RunFolder(config.out).checkpoints)):
        with suppress(DataError):  # damaged; an older one is resumed then
            return load_tokenizer(checkpoint / TOKENIZER)
    return None


def check_settings(config: PretrainConfig, dataset: Dataset) -> None:
    """Check the settings of a new run against those of the weights that it starts from. No weight is read.

    Raises:
        ConfigError: the architecture is not the initial model's, a tokenizer is missing, or nothing trains positions.
        RunError: there is no such model, or its tensors have other names or shapes.
    """
    if config.text_weights is not None and config.tokenizer is None and dataset.tokenizer_sha256 is None:
        raise ConfigError(
            f"text_weights: wanted the tokenizer that {config.text_weights} was trained with, found none, and one "
            f"trained on the captions has other tokens; give --tokenizer"
        )
    if config.initial_model is None:
        return
    wanted, (trained, _) = config.model, read_architecture_of(config.initial_model)
    if trained.output_positions and not wanted.output_positions:
        raise ConfigError(
            f"{config.initial_model} has positions behind the image encoder: wanted --model.output-positions"
        )
    for name in ("image_tower", "heads", "cross_norm", "mim_target", "image_mean", "image_std"):
        own, theirs = getattr(wanted, name), getattr(trained, name)
        if own != theirs:  # weights of another meaning would have the same names and shapes
            raise ConfigError(f"{config.initial_model} was trained with {name} {theirs}, got {own}; use the same")
    fixed = config.train_text != "full" and not wanted.text_tower
    if fixed and wanted.text_length > trained.text_length:
        raise ConfigError(
            f"model.text_length: wanted at most the {trained.text_length} tokens of {config.initial_model} if nothing "
            f"trains further positions, got {wanted.text_length}; lower it, or give --train-text full"
        )
    with torch.device("meta"):  # shapes without memory
        model = MaskVLM(wanted)
        tensors = model.state_dict(), resized_tensors(MaskVLM(trained), model)
    shapes, found = ({name: tuple(x.shape) for name, x in named.items()} for named in tensors)
    check_fit(shapes, found, Path(str(config.initial_model)))


def make_model(config: PretrainConfig, fresh: bool) -> MaskVLM:
    """Make a run's model.

    If `fresh`, at the beginning of a run, it gets the pretrained weights that the settings name: those of a trained
    model or of encoders.

    RunError if they do not fit, or cannot be read.
    """
    model = MaskVLM(config.model)
    model.set_attention(config.self_attention, config.cross_attention)
    if not fresh:
        return model
    if model.logit_bias is not None:
        # The log-odds of a match. From another value a short run never comes to it: the bias is one number.
        torch.nn.init.constant_(model.logit_bias, -math.log(max(1, config.batch_size - 1)))
    if config.initial_model is not None:
        trained = load_without_head(config.initial_model, "cpu").network
        # The trained model's own masking need not fit the new size: this run has its own.
        copy_into(model.state_dict(), resized_tensors(trained, model), config.initial_model)
        log_sizes(trained.config, config.model)
    if config.image_weights is not None:
        (load_image_tower if config.model.image_tower else load_image_weights)(model, config.image_weights)
    if config.text_weights is not None:
        load_text_weights(model, config.text_weights)
    if config.text_tower is not None:
        load_text_tower(model, config.text_tower)
    return model
