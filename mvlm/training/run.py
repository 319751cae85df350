"""One pretraining run from its configuration to its last checkpoint."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import torch

from mvlm.config.pretrain import PretrainConfig
from mvlm.distributed.coordination import check_ranks, is_lost_rank, run_on_all_ranks
from mvlm.distributed.parallel import checkpoint_activations, compile_step, parallelize
from mvlm.distributed.world import World, start
from mvlm.errors import ConfigError, LostRankError
from mvlm.runs.folder import RunFolder, RunLock, open_run, write_config
from mvlm.training.build import check_attention, choose_tokenizer, fit_to_tokenizer, make_loader, make_model
from mvlm.training.loggers import check_services
from mvlm.training.optimizer import make_optimizer
from mvlm.training.trainer import Trainer
from mvlm_dataloading import Dataset, Tokenizer, open_dataset

log = logging.getLogger(__name__)


def pretrain(config: PretrainConfig) -> None:
    """Start or resume one pretraining run. Every file it writes is under `config.out`.

    Raises:
        ConfigError, RunError, DataError: a setting, the run folder or the data are not usable; nothing was changed.
        NonFiniteLossError: too many updates in a row were skipped.
        LostRankError: another process of the run is gone.
    """
    world = start(config.device)
    with open_trainer(config, world) as trainer:
        if trainer.complete:
            log.info("%s is complete: %d of %d steps", config.out, trainer.step, config.max_steps)
        else:
            train(trainer)
    world.close()


def train(trainer: Trainer) -> None:
    """`trainer.train()`, with LostRankError where a collective fails because another rank is gone."""
    world = trainer.world
    try:
        trainer.train()
    except RuntimeError as error:
        if world.size == 1 or not is_lost_rank(error):
            raise
        raise LostRankError(
            f"rank {world.rank} lost another rank after step {trainer.step} and ends too; that rank's log says why. "
            f"Continue from the last checkpoint with --resume ({str(error).splitlines()[0]})"
        ) from error


@contextmanager
def open_trainer(config: PretrainConfig, world: World) -> Iterator[Trainer]:
    """A trainer at the run's first step, or at its newest good checkpoint; the run folder is locked in this context.

    Every stage runs on all ranks: if it fails on one, all of them end.
    """
    dataset, validation, tokenizer, config = run_on_all_ranks(world, lambda: open_inputs(config))
    check_ranks(world, config, dataset)
    # Rank 0 looks at the folder, locks it, and verifies the checkpoints, for all ranks.
    with run_on_all_ranks(world, lambda: RunLock(config.out) if world.first else nullcontext()):
        found = run_on_all_ranks(world, lambda: str(open_run(config) or "") if world.first else "")
        checkpoint = world.gather_objects(found)[0]
        trainer = run_on_all_ranks(
            world, lambda: build_trainer(config, world, dataset, validation, tokenizer, checkpoint)
        )
        run_on_all_ranks(world, lambda: write_config(config) if world.first else None)
        yield trainer


def open_inputs(config: PretrainConfig) -> tuple[Dataset, Dataset | None, Tokenizer, PretrainConfig]:
    """The training split, the validation split if it is needed, the tokenizer, and the configuration fitted to it."""
    notice = config.preemption_file
    if notice is not None and notice.exists():  # left by an earlier preemption: the run would end after every step
        raise ConfigError(f"preemption_file: {notice} exists before the run starts; remove it to train")
    check_services(config)
    dataset = open_dataset(config.data, "train")
    evaluates = config.eval_every_steps or config.eval_every_minutes
    validation = open_dataset(config.data, "validation") if evaluates else None
    if validation is not None and config.eval_images:
        validation = validation.head(config.eval_images)
    tokenizer = choose_tokenizer(config, dataset)
    config = replace(config, model=fit_to_tokenizer(config, tokenizer))
    check_attention(config)
    if (config.image_weights or config.text_weights) and not RunFolder(config.out).config.exists():
        make_model(config, fresh=True)  # weights that do not fit are reported before there is a folder
    return dataset, validation, tokenizer, config


def build_trainer(
    config: PretrainConfig,
    world: World,
    dataset: Dataset,
    validation: Dataset | None,
    tokenizer: Tokenizer,
    checkpoint: str,
) -> Trainer:
    """A trainer at its first step or, if `checkpoint` is not empty, at that verified checkpoint."""
    torch.manual_seed(config.seed)
    loader = make_loader(dataset, tokenizer, config, world)
    model = make_model(config, fresh=not checkpoint).to(world.device)
    if config.checkpoint_activations:
        checkpoint_activations(model)
    if config.compile:
        compile_step(model, world)
    parallel = parallelize(model, world, config.parallel)
    optimizer = make_optimizer(model, config, world.device)
    trainer = Trainer(config, world, parallel, optimizer, loader, tokenizer, validation)
    if checkpoint:
        trainer.restore(Path(checkpoint))
        log.info("resuming from %s", checkpoint)
    return trainer
