"""Tokenizer, loader and model of a run, built from its configuration."""

import logging
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch

from mvlm.config.model import MaskVLMConfig
from mvlm.config.pretrain import PretrainConfig
from mvlm.config.run import RunConfig
from mvlm.device import choose_device, chosen_precision
from mvlm.distributed.world import World
from mvlm.errors import ConfigError
from mvlm.files import copy_into
from mvlm.model.attention_backends import choose_for_model
from mvlm.model.maskvlm import MaskVLM
from mvlm.runs.checkpoint import TOKENIZER, checkpoints
from mvlm.runs.folder import RunFolder
from mvlm.runs.load import load_model, load_tokenizer_of
from mvlm.weights.load import load_image_weights, load_text_weights
from mvlm.weights.resize import resized_tensors
from mvlm_dataloading import Augment, DataError, Dataset, Loader, LoaderWork, Tokenizer, load_tokenizer, tokenizer_for

log = logging.getLogger(__name__)


def choose_tokenizer(config: PretrainConfig, dataset: Dataset) -> Tokenizer:
    """Load the tokenizer of the initial model, the configured one or the data set's, or train one on its captions.

    A run that is resumed does not need its initial model or its tokenizer's file any more.
    """
    if config.initial_model is not None:
        return _own_tokenizer(config) or load_tokenizer_of(config.initial_model)
    if config.tokenizer is not None:
        own = None if config.tokenizer.exists() else _own_tokenizer(config)
        return own or load_tokenizer(config.tokenizer)
    try:
        return tokenizer_for(dataset, config.model.vocab_size)
    except DataError:
        raise
    except ValueError as error:  # the vocabulary is too small for all bytes
        raise ConfigError(f"model.vocab_size: {error}") from None


def _own_tokenizer(config: PretrainConfig) -> Tokenizer | None:
    """The tokenizer in the run's own checkpoints. Checkpoints are not verified here, on every rank."""
    for checkpoint in reversed(checkpoints(RunFolder(config.out).checkpoints)):
        with suppress(DataError):  # damaged; an older one is resumed then
            return load_tokenizer(checkpoint / TOKENIZER)
    return None


def fit_to_tokenizer(config: PretrainConfig, tokenizer: Tokenizer) -> MaskVLMConfig:
    """Model configuration with the tokenizer's [MASK]. ConfigError if the tokenizer has more tokens than the model."""
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ConfigError(
            f"model.vocab_size: wanted at least the tokenizer's {tokenizer.vocab_size}, got {config.model.vocab_size}"
        )
    return replace(config.model, mask_token_id=tokenizer.mask_id)


def make_loader(dataset: Dataset, tokenizer: Tokenizer, config: RunConfig, world: World, **further: Any) -> Loader:
    """Make the training loader, which yields this rank's pairs of each microbatch.

    `further` are arguments of the loader, and `strip` of its `Augment`. ConfigError if the batch does not divide evenly
    among ranks and microbatches, and for augmentations of strips.
    """
    parts = world.size * config.accumulate
    if config.batch_size % parts:
        raise ConfigError(
            f"batch_size: wanted a multiple of {world.size} ranks x {config.accumulate} microbatches = {parts}, "
            f"got {config.batch_size}"
        )
    augmentations = [name for name in ("flip", "randaugment") if getattr(config, name)]
    strip = further.pop("strip", 1)
    if strip > 1 and augmentations:
        given = ", ".join(f"--{name.replace('_', '-')} {getattr(config, name)}" for name in augmentations)
        raise ConfigError(
            f"wanted no augmentation, as a sample is several images side by side, got {given}; leave it out"
        )
    if config.batch_size > len(dataset) and world.first:
        log.warning(
            "batch_size: %d is above the split's %d samples; batches repeat them", config.batch_size, len(dataset)
        )
    return Loader(
        dataset,
        tokenizer,
        batch_size=config.batch_size // config.accumulate,
        rank=world.rank,
        world_size=world.size,
        seed=config.seed,
        device=None if world.device.type == "cpu" else str(world.device),
        crop_scale=config.crop_scale,
        augment=Augment(
            flip=config.flip, operations=config.randaugment, magnitude=config.randaugment_magnitude, strip=strip
        ),
        # On a CPU the step is slower than the loader by far, and each wake-up of a thread interrupts it.
        work=LoaderWork(num_threads=1 if world.device.type == "cpu" else 2, keep_mb=config.keep_images_mb),
        **{**config.model.loader_options(), **further},
    )


def check_attention(config: RunConfig) -> None:
    """Raise ConfigError for an attention backend that cannot run here."""
    device = choose_device(config.device)
    dtype = torch.bfloat16 if chosen_precision(device, config.precision) == "bf16" else torch.float32
    choose_for_model(config.model, device, dtype, config.self_attention, config.cross_attention)


def make_model(config: PretrainConfig, fresh: bool) -> MaskVLM:
    """Make the model. A fresh one has the weights that the settings name: of a trained model, or of encoders.

    RunError if they do not fit, ConfigError if the architecture differs from the trained model's.
    """
    model = MaskVLM(config.model)
    model.set_attention(config.self_attention, config.cross_attention)
    if fresh and config.initial_model is not None:
        trained = load_model(config.initial_model, "cpu").network
        if trained.config.output_positions and not config.model.output_positions:
            raise ConfigError(
                f"{config.initial_model} has positions behind the image encoder: wanted --model.output-positions"
            )
        for name in ("heads", "cross_norm", "image_mean", "image_std"):
            own, wanted = getattr(config.model, name), getattr(trained.config, name)
            if own != wanted:  # weights of another meaning would have the same names and shapes
                raise ConfigError(f"{config.initial_model} was trained with {name} {wanted}, got {own}; use the same")
        # The trained model's own masking need not fit the new size: this run has its own.
        copy_into(model.state_dict(), resized_tensors(trained, model), config.initial_model)
    if fresh and config.image_weights is not None:
        load_image_weights(model, config.image_weights)
    if fresh and config.text_weights is not None:
        load_text_weights(model, config.text_weights)
    return model


def warn_of_cut_texts(dataset: Dataset, tokenizer: Tokenizer, longest: int, flag: str) -> None:
    """Log the share of a split's texts that are cut to `longest` tokens, if it is 1 % or more; `flag` raises that."""
    if (cut := share_cut(dataset, tokenizer, longest)) >= 0.01:
        log.warning(
            "%.0f %% of the first 1,000 texts have more than %d tokens and are cut; raise %s", 100 * cut, longest, flag
        )


def share_cut(dataset: Dataset, tokenizer: Tokenizer, longest: int) -> float:
    """Share of a split's first 1,000 texts with more than `longest` tokens."""
    texts = [dataset.captions(i)[0] for i in range(min(len(dataset), 1000))]
    _, lengths = tokenizer.encode(texts, longest + 1)
    return float((lengths > longest).mean())
