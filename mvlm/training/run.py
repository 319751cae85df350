"""Run of pretraining, from its configuration to its last checkpoint, and what every run shares with it."""

import gc
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch

from mvlm.config.pretrain import PretrainConfig
from mvlm.config.run import RunConfig
from mvlm.device import chosen_precision, deterministic_kernels
from mvlm.distributed.coordination import check_ranks, is_lost_rank, run_on_all_ranks
from mvlm.distributed.parallel import checkpoint_activations, compile_step, parallelize
from mvlm.distributed.world import World, join_ranks
from mvlm.errors import ConfigError, LostRankError
from mvlm.runs.folder import RunFolder, RunLock, write_config
from mvlm.runs.history import History
from mvlm.runs.resume import open_run
from mvlm.training.build import (
    check_attention,
    choose_tokenizer,
    fit_to_tokenizer,
    make_loader,
    make_model,
    warn_of_cut_texts,
)
from mvlm.training.cuda_graphs import CudaGraphs, check_graphs
from mvlm.training.loggers import check_services, start_services
from mvlm.training.optimizer import make_optimizer
from mvlm.training.trainer import Trainer
from mvlm_dataloading import Dataset, Tokenizer, open_dataset

log = logging.getLogger(__name__)

Config = TypeVar("Config", bound=RunConfig)


class RunInputs(NamedTuple):
    """Everything that a run reads before it has a model."""

    config: RunConfig
    """The given configuration, with the tokenizer's [MASK]."""
    dataset: Dataset
    validation: Dataset | None
    """Validation split, if the run evaluates."""
    tokenizer: Tokenizer


def pretrain(config: PretrainConfig) -> str | None:
    """Start or resume one pretraining run. Every file it writes is under `config.out`.

    Returns what asked it to stop, such as SIGTERM, even if that was after the last step; None if nothing did.

    Raises:
        ConfigError, RunError, DataError: a setting, the run folder or the data are not usable; nothing was changed.
        NonFiniteLossError: too many updates in a row were skipped.
        LostRankError: another process of the run is gone.
    """
    return do_run(config, open_inputs, build_trainer)


def do_run(
    config: Config,
    open_inputs: Callable[[Config], RunInputs],
    build_trainer: Callable[[RunInputs, World, str], Trainer],
) -> str | None:
    """Build a run and train to its last step, if it is not complete. The functions are those of `build_run`.

    Returns what asked it to stop, as `pretrain`.
    """
    world = join_ranks(config.device)
    kernels = deterministic_kernels(world.device) if config.deterministic else nullcontext()
    with kernels, build_run(config, world, open_inputs, build_trainer) as trainer:
        if trainer.complete:
            log.info("%s is complete: %d of %d steps", config.out, trainer.step, config.max_steps)
        else:
            train(trainer)
        reason = trainer.stop.reason
    # Before the process group. If DDP's reducer were the last to hold the group, its destructor could wait for a thread
    # that waits for the GIL, and the rank would never end (torch 2.13, gloo).
    del trainer
    gc.collect()  # what a cycle of objects still holds
    world.close()
    return reason


@contextmanager
def build_run(
    config: Config,
    world: World,
    open_inputs: Callable[[Config], RunInputs],
    build_trainer: Callable[[RunInputs, World, str], Trainer],
) -> Iterator[Trainer]:
    """Context with a trainer at the run's first step or at its newest good checkpoint. It locks the run folder.

    Every stage runs on all ranks, and if it fails on one, all of them end: none is left waiting for another.

    Args:
        open_inputs: opens and checks what the run reads.
        build_trainer: builds the trainer from it, on a rank, at a checkpoint ("" for the first step).
    """
    inputs = run_on_all_ranks(world, lambda: open_inputs(config))
    check_ranks(world, inputs.config, inputs.dataset, inputs.validation)
    # Rank 0 locks the folder and verifies the checkpoints, for all ranks.
    with run_on_all_ranks(world, lambda: RunLock(config.out) if world.first else nullcontext()):
        found = run_on_all_ranks(world, lambda: str(open_run(inputs.config) or "") if world.first else "")
        checkpoint = world.gather_objects(found)[0]
        trainer = run_on_all_ranks(world, lambda: build_trainer(inputs, world, checkpoint))
        if not trainer.complete:
            run_on_all_ranks(world, lambda: start_services(inputs.config) if world.first else None)
        # Last, so that a run that cannot be built leaves no config.json, which would claim the folder.
        run_on_all_ranks(world, lambda: write_config(inputs.config) if world.first else None)
        yield trainer


def train(trainer: Trainer) -> None:
    """Record the start in the run's history, then train. LostRankError if a collective fails without another rank."""
    world, config = trainer.world, trainer.config
    if world.first:
        if config.warmup_steps >= config.max_steps:
            log.warning(
                "warmup_steps: wanted fewer than the run's %d steps, got %d: the learning rates end at %.0f %% of "
                "their peaks; give --warmup-steps",
                config.max_steps, config.warmup_steps, 100 * config.max_steps / config.warmup_steps,
            )  # fmt: skip
        splits = {"train": trainer.loader.dataset, "validation": trainer.validation}
        data = {name: split.fingerprint for name, split in splits.items() if split is not None}
        precision = chosen_precision(world.device, config.precision)
        history = History(RunFolder(config.out))
        history.start(trainer.step, world.device, world.size, precision, data, config.log_every)
    try:
        trainer.train()
    except RuntimeError as error:
        if world.size == 1 or not is_lost_rank(error):
            raise
        failure = trainer.notices.failure()
        reason = f"{str(error).splitlines()[0]}; that rank's log says why" if failure is None else failure
        raise LostRankError(
            f"rank {world.rank} lost another rank after step {trainer.step} and ends too ({reason}). "
            f"Continue from the last checkpoint with --resume"
        ) from error


def open_splits(config: RunConfig) -> tuple[Dataset, Dataset | None]:
    """Open the training split and, if the run evaluates, the validation split, after checks of what needs no data."""
    notice = config.preemption_file
    if notice is not None and notice.exists():  # left by an earlier preemption: it would end the run at once
        raise ConfigError(f"preemption_file: {notice} exists before the run starts; remove it to train")
    check_services(config)
    dataset = open_dataset(config.data, "train")
    validation = open_dataset(config.data, "validation") if config.eval_every_steps else None
    if validation is not None and config.eval_images:
        validation = validation.head(config.eval_images)
    return dataset, validation


def open_inputs(config: PretrainConfig) -> RunInputs:
    """Open data and tokenizer, and check everything that can be checked before there is a folder."""
    dataset, validation = open_splits(config)
    tokenizer = choose_tokenizer(config, dataset)
    config = replace(config, model=fit_to_tokenizer(config, tokenizer))
    warn_of_cut_texts(dataset, tokenizer, config.model.text_length, "--model.text-length")
    check_attention(config)
    weights = config.initial_model or config.image_weights or config.text_weights
    if weights and not RunFolder(config.out).config.exists():
        if config.text_weights is not None and config.tokenizer is None and dataset.tokenizer_sha256 is None:
            raise ConfigError(
                f"text_weights: wanted the tokenizer that {config.text_weights} was trained with, found none, and one "
                f"trained on the captions has other tokens; give --tokenizer"
            )
        make_model(config, fresh=True)  # raises for weights that do not fit
    return RunInputs(config, dataset, validation, tokenizer)


def build_trainer(inputs: RunInputs, world: World, checkpoint: str) -> Trainer:
    """Build a trainer at its first step or, if `checkpoint` is not empty, at that verified checkpoint."""
    config = inputs.config
    assert isinstance(config, PretrainConfig)
    torch.manual_seed(config.seed)
    loader = make_loader(inputs.dataset, inputs.tokenizer, config, world)
    model = make_model(config, fresh=not checkpoint).to(world.device)
    if config.checkpoint_activations:
        checkpoint_activations(model)
    if config.capture == "compile":
        compile_step(model, world)
    parallel = parallelize(model, world, config.parallel)
    optimizer = make_optimizer(model, config, world.device)  # after parallelize, which replaces the parameters
    trainer = Trainer(config, world, parallel, optimizer, loader, inputs.tokenizer, inputs.validation)
    if config.capture == "cuda-graphs":
        check_graphs(config, world)
        trainer.graphs = CudaGraphs(trainer.backward_alone, trainer.model.parameters())
    if checkpoint:
        trainer.restore(Path(checkpoint))
        log.info("resuming from %s", checkpoint)
    return trainer
