"""The training loop: shard -> loader -> batch -> model -> losses -> step."""

import logging
import math
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from mvlm.checkpoint import load_training_state, remove_old_checkpoints, save_checkpoint
from mvlm.config import PretrainConfig
from mvlm.console import Progress
from mvlm.device import autocast, choose_device
from mvlm.errors import ConfigError, NonFiniteLossError
from mvlm.evaluation import evaluate_briefly
from mvlm.model import PIXEL_MODULES, MaskVLM
from mvlm.objectives import Losses
from mvlm.run_folder import MetricsFile, open_run
from mvlm.weights import load_image_weights, load_text_weights
from mvlm_dataloading import DataError, Dataset, Loader, Tokenizer, load_tokenizer, open_dataset, tokenizer_for

log = logging.getLogger(__name__)


def pretrain(config: PretrainConfig) -> None:
    """Run, or go on with, one pretraining run. Every file it writes is under `config.out`."""
    device = choose_device(config.device)
    dataset = open_dataset(config.data, "train")
    validation = open_dataset(config.data, "validation") if config.eval_every_steps else None
    tokenizer = choose_tokenizer(config, dataset)
    config = replace(config, model=fit_to_tokenizer(config, tokenizer))
    torch.manual_seed(config.seed)
    model = make_model(config).to(device)
    checkpoint = open_run(config)

    optimizer = make_optimizer(model, config, device)
    loader = make_loader(dataset, tokenizer, config, device)
    step = 0
    if checkpoint is not None:
        state = load_training_state(checkpoint, model, optimizer)
        loader.load_state_dict(state["loader"])
        step = state["step"]
        log.info("going on from %s", checkpoint)
    run = Run(config, model, optimizer, loader, tokenizer, device, step)
    if step >= config.max_steps:
        log.info("%s is complete: %d of %d steps", config.out, step, config.max_steps)
        return
    run.train(validation)


def make_model(config: PretrainConfig) -> MaskVLM:
    """The model with its first weights; those of its encoders from the files given, unless a run goes on."""
    model = MaskVLM(config.model)
    if not (config.resume and (config.out / "config.json").is_file()):
        if config.image_weights is not None:
            load_image_weights(model, config.image_weights)
        if config.text_weights is not None:
            load_text_weights(model, config.text_weights)
    return model


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


def make_loader(dataset: Dataset, tokenizer: Tokenizer, config: PretrainConfig, device: torch.device) -> Loader:
    """The training loader that the model and the recipe ask for."""
    model = config.model
    return Loader(
        dataset,
        tokenizer,
        batch_size=config.batch_size,
        image_size=model.image_size,
        text_length=model.text_length,
        seed=config.seed,
        device=None if device.type == "cpu" else str(device),
        patch_size=model.patch_size,
        mask_block=model.mask_block,
        image_mask_ratio=model.image_mask_ratio,
        text_mask_ratio=model.text_mask_ratio,
        crop_scale=config.crop_scale,
    )


def make_optimizer(model: MaskVLM, config: PretrainConfig, device: torch.device) -> torch.optim.AdamW:
    """AdamW with a group for each rate, with and without decay. `peak` is a group's highest rate."""
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        matrix = parameter.ndim >= 2 and not name.endswith(("position", "words.weight"))
        groups.setdefault((peak_rate(name, config), matrix), []).append(parameter)
    return torch.optim.AdamW(
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


class Run:
    """One run in progress."""

    def __init__(
        self,
        config: PretrainConfig,
        model: MaskVLM,
        optimizer: torch.optim.AdamW,
        loader: Loader,
        tokenizer: Tokenizer,
        device: torch.device,
        step: int,
    ) -> None:
        self.config, self.model, self.optimizer = config, model, optimizer
        self.loader, self.tokenizer, self.device = loader, tokenizer, device
        self.step = step
        """Updates made."""
        self.saved = step
        """The step of the newest checkpoint."""

    def train(self, validation: Dataset | None) -> None:
        """Go on to `max_steps`, with checkpoints on the way and at the end."""
        config = self.config
        metrics = MetricsFile(config.out / "metrics.jsonl", self.step)
        board = SummaryWriter(str(config.out / "tensorboard"), purge_step=self.step)
        last_save = time.monotonic()
        batches = iter(self.loader)
        try:
            with Progress(self.step, config.max_steps) as progress:
                while self.step < config.max_steps:
                    row = self.one_step(batches)
                    if validation is not None and self.due(config.eval_every_steps):
                        row |= evaluate_briefly(self.model, validation, self.tokenizer, config.precision)
                    if self.step % config.log_every == 0 or self.step == config.max_steps or "tr_r1" in row:
                        metrics.write(row)
                        write_scalars(board, row)
                    progress.show(row)
                    minutes = (time.monotonic() - last_save) / 60
                    if self.due(config.checkpoint_every_steps) or minutes >= config.checkpoint_every_minutes:
                        self.save()
                        last_save = time.monotonic()
            if self.saved != self.step:  # a checkpoint of the last step is not written over itself
                self.save()
        finally:
            metrics.close()
            board.close()

    def due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    def one_step(self, batches: Iterator[Any]) -> dict[str, Any]:
        """One update. Returns its line of metrics. NonFiniteLossError before the update when a term is not finite."""
        config, model, started = self.config, self.model, time.perf_counter()
        batch, masks = next(batches)
        batch, masks = batch.to(self.device, non_blocking=True), masks.to(self.device, non_blocking=True)
        waited = time.perf_counter() - started
        factor = learning_rate_factor(self.step, config)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        alone = self.step < config.reconstruction_first
        with autocast(self.device, config.precision):
            losses: Losses = model(batch, masks, seed=config.seed, step=self.step, reconstruction_only=alone)
        losses.total.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
        mlm, mim, itc, itm, total, grad_norm = torch.stack([*losses, norm]).tolist()
        terms = {"mlm": mlm, "mim": mim, "itc": itc, "itm": itm, "grad_norm": grad_norm}
        bad = [f"{name} is {value}" for name, value in terms.items() if not math.isfinite(value)]
        if bad:
            raise NonFiniteLossError(
                f"step {self.step + 1}: {', '.join(bad)}; the update was not made. "
                f"No checkpoint holds it: try a lower learning rate or --precision fp32"
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        model.clamp_temperature()
        self.step += 1
        return {
            "step": self.step,
            "pairs_seen": self.step * config.batch_size,
            "loss": total,
            "mlm": mlm,
            "mim": mim,
            "itc": None if alone else itc,
            "itm": None if alone else itm,
            "lr": config.lr_cross * factor,
            "grad_norm": grad_norm,
            "pairs_per_s": config.batch_size / (time.perf_counter() - started),
            "data_wait_s": waited,
            "skipped": self.loader.skipped,
        }

    def save(self) -> Path:
        root = self.config.out / "checkpoints"
        state = {"loader": self.loader.state_dict()}
        path = save_checkpoint(root, self.step, self.model, self.optimizer, state, self.tokenizer)
        remove_old_checkpoints(root, self.config.keep_checkpoints)
        self.saved = self.step
        return path


def write_scalars(board: SummaryWriter, row: dict[str, Any]) -> None:
    for name, value in row.items():
        if name not in ("step", "pairs_seen") and value is not None:
            board.add_scalar(name, value, row["step"])
