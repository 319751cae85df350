"""What a configuration asks for: the tokenizer, the loader, the optimizer, the schedule, the average of the weights."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from mvlm import backends
from mvlm.device import choose_device, has_fast_bf16
from mvlm.distributed import World
from mvlm.errors import ConfigError
from mvlm.model import PIXEL_MODULES, MaskVLM
from mvlm.pretrain_config import PretrainConfig
from mvlm.weights import load_image_weights, load_text_weights
from mvlm_dataloading import Augment, DataError, Dataset, Loader, Tokenizer, load_tokenizer, tokenizer_for


def choose_tokenizer(config: PretrainConfig, dataset: Dataset) -> Tokenizer:
    """The tokenizer by path, the data set's own, or one trained on its captions."""
    if config.tokenizer is not None:
        return load_tokenizer(config.tokenizer)
    try:
        return tokenizer_for(dataset, config.model.vocab_size)
    except DataError:
        raise
    except ValueError as error:  # a vocabulary with no room for all bytes
        raise ConfigError(f"model.vocab_size: {error}") from None


def fit_to_tokenizer(config: PretrainConfig, tokenizer: Tokenizer):
    """The model configuration with the tokenizer's [MASK]. ConfigError when the vocabulary does not hold its tokens."""
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ConfigError(
            f"model.vocab_size: wanted at least the tokenizer's {tokenizer.vocab_size}, got {config.model.vocab_size}"
        )
    return replace(config.model, mask_token_id=tokenizer.mask_id)


def make_loader(dataset: Dataset, tokenizer: Tokenizer, config: PretrainConfig, world: World) -> Loader:
    """The training loader that the model and the recipe ask for: of each microbatch, this rank's pairs.

    ConfigError when ranks and microbatches cannot share the batch evenly.
    """
    model, parts = config.model, world.size * config.accumulate
    if config.batch_size % parts:
        raise ConfigError(
            f"batch_size: wanted a multiple of {world.size} ranks x {config.accumulate} microbatches = {parts}, "
            f"got {config.batch_size}"
        )
    return Loader(
        dataset,
        tokenizer,
        batch_size=config.batch_size // config.accumulate,
        rank=world.rank,
        world_size=world.size,
        image_size=model.image_size,
        text_length=model.text_length,
        seed=config.seed,
        device=None if world.device.type == "cpu" else str(world.device),
        patch_size=model.patch_size,
        mask_block=model.mask_block,
        image_mask_ratio=model.image_mask_ratio,
        text_mask_ratio=model.text_mask_ratio,
        crop_scale=config.crop_scale,
        augment=Augment(
            flip=config.flip,
            jitter=config.color_jitter,
            operations=config.randaugment,
            magnitude=config.randaugment_magnitude,
        ),
    )


def check_attention(config: PretrainConfig) -> None:
    """ConfigError for an attention backend that cannot run here."""
    device = choose_device(config.device)
    half = config.precision == "bf16" or (config.precision == "auto" and has_fast_bf16(device))
    dtype = torch.bfloat16 if half else torch.float32
    backends.choices(config.model, device, dtype, config.self_attention, config.cross_attention)


def make_model(config: PretrainConfig, fresh: bool) -> MaskVLM:
    """The model; a fresh one with its first weights, those of its encoders from the files that are given."""
    model = MaskVLM(config.model)
    model.set_attention(config.self_attention, config.cross_attention)
    if fresh and config.image_weights is not None:
        load_image_weights(model, config.image_weights)
    if fresh and config.text_weights is not None:
        load_text_weights(model, config.text_weights)
    return model


class GuardedAdamW(torch.optim.AdamW):
    """Fused AdamW with the attribute that its kernels read and that torch's GradScaler sets too."""

    found_inf: Tensor | None = None
    """float32 (), 1 = leave weights, moments and step counts untouched; on the device, so that no host waits."""


def make_optimizer(model: MaskVLM, config: PretrainConfig, device: torch.device) -> GuardedAdamW:
    """AdamW with a group for each rate, with and without decay. `peak` is a group's highest rate."""
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        matrix = parameter.ndim >= 2 and not name.endswith(("position", "words.weight"))
        groups.setdefault((peak_rate(name, config), matrix), []).append(parameter)
    return GuardedAdamW(
        [
            {
                "params": parameters,
                "peak": peak,
                "weight_decay": config.weight_decay if matrix else 0.0,
            }
            for (peak, matrix), parameters in groups.items()
        ],
        lr=config.lr_cross,
        betas=(0.9, config.beta2),
        fused=True,
    )


def peak_rate(name: str, config: PretrainConfig) -> float:
    """The highest learning rate of the parameter with this name."""
    if name.startswith(("image_encoder.", "text_encoder.")):
        return config.lr_encoder
    if name.startswith(PIXEL_MODULES):
        return config.lr_pixels
    return config.lr_cross


def learning_rate_factor(step: int, config: PretrainConfig) -> float:
    """The share of its peak that a learning rate has at the step with this number (from 0): warm-up, then cosine."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, config.max_steps - config.warmup_steps)
    return config.lr_end + (1 - config.lr_end) * 0.5 * (1 + math.cos(math.pi * done))


class WeightAverage:
    """An exponential moving average (EMA) of a model's weights, kept beside them on the same device.

    The decay of update t, from 1, is min(decay, t / (9 + t)), so that the start is soon forgotten. A skipped update
    leaves the weights as they were, and the average moves on towards them.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._model, self._decay = model, decay
        self.tensors = {name: p.detach().clone() for name, p in model.named_parameters()}
        """By parameter name, shapes and dtypes of the parameters."""

    # torch has no public name for its list-wise operations.
    @torch.no_grad()
    def update(self, step: int) -> None:
        """Follow the weights after the update with this number, from 1."""
        decay = min(self._decay, step / (9 + step))
        weights = [p.detach() for p in self._model.parameters()]
        torch._foreach_lerp_(list(self.tensors.values()), weights, 1 - decay)  # pyright: ignore[reportPrivateImportUsage]

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model has the averaged weights within, and its own again after."""
        with torch.no_grad():
            own = [p.detach().clone() for p in self._model.parameters()]
            self._set(list(self.tensors.values()))
            try:
                yield
            finally:
                self._set(own)

    def _set(self, values: list[Tensor]) -> None:
        # One by one: torch's list-wise copy does not know tensors that are split over ranks.
        for parameter, value in zip(self._model.parameters(), values, strict=True):
            parameter.copy_(value)
