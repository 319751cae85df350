"""Run of pretraining, from its configuration to its last checkpoint, and what every run shares with it.

`pretrain` is at the top; `open_inputs` and `build_trainer` are its two stages before training. The loader that they
build is below; weights and tokenizer are those of `mvlm.weights.start`.
"""

import gc
import logging
import shlex
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from mvlm import waiting
from mvlm.config.groups import RunConfig, way_of
from mvlm.config.json_files import read_config
from mvlm.config.pretrain import STARTS, PretrainConfig
from mvlm.device import choose_device, chosen_precision, deterministic_kernels
from mvlm.distributed.coordination import check_ranks, check_shared, naming_lost_ranks, run_on_all_ranks
from mvlm.distributed.parallel import checkpoint_activations, compile_step, parallelize
from mvlm.distributed.world import World, join_ranks
from mvlm.errors import ConfigError
from mvlm.evaluation.class_images import open_classes
from mvlm.model.adaptation import adapt
from mvlm.model.attention_backends import choose_for_model
from mvlm.model.maskvlm import MaskVLM
from mvlm.objectives.pretraining import KeepStart, objectives_of
from mvlm.objectives.step import idle_parameters
from mvlm.progress import format_duration
from mvlm.runs.folder import RunFolder, RunLock, write_config
from mvlm.runs.history import History, changed_ways, starts_of
from mvlm.runs.load import identify
from mvlm.runs.mirror import Mirror, open_mirror
from mvlm.runs.resume import open_run
from mvlm.training.cuda_graphs import check_graphs
from mvlm.training.extension import extended
from mvlm.training.loggers import check_services, start_services
from mvlm.training.optimizer import make_optimizer
from mvlm.training.own_code import own_objective, with_hashes
from mvlm.training.trainer import RunInputs, Trainer
from mvlm.training.warm_up import compile_kernels
from mvlm.weights.start import check_settings, make_model, share_tokenizer, with_text_tower
from mvlm_dataloading import Augment, Dataset, Loader, LoaderWork, Tokenizer, open_dataset

log = logging.getLogger(__name__)

Config = TypeVar("Config", bound=RunConfig)


def pretrain(config: PretrainConfig, say_next: bool = True) -> str | None:
    """Start or resume one pretraining run. Every file it writes is under `config.out`.

    `say_next` logs the commands that evaluate the complete run. Returns what asked it to stop, such as SIGTERM, even if
    that was after the last step; None if nothing did.

    Raises:
        ConfigError, RunError, DataError: a setting, the run folder or the data are not usable; nothing was changed.
        NonFiniteLossError: too many updates in a row were skipped.
        LostRankError: another process of the run is gone.
    """
    return do_run(config, open_inputs, build_trainer, say_next)


def do_run(
    config: Config,
    open_inputs: Callable[[Config, World], RunInputs],
    build_trainer: Callable[[RunInputs, World, str], Trainer],
    say_next: bool,
) -> str | None:
    """Build a run and train to its last step, if it is not complete.

    open_inputs, build_trainer: as for `build_run`. say_next, and the result: as for `pretrain`.
    """
    began = time.monotonic()
    world = join_ranks(config.device)
    if world.first and world.device.type == "cpu":
        for notice in waiting.NOTICE:
            log.warning(notice)
    kernels = deterministic_kernels(world.device) if config.deterministic else nullcontext()
    with kernels, build_run(config, world, open_inputs, build_trainer) as trainer:
        first_step = trainer.step
        with trainer.writer.mirror or nullcontext():
            if not trainer.complete:
                if isinstance(trainer.config, PretrainConfig):
                    compile_kernels(trainer.config, world)
                record_start(trainer)
                advice = "Continue from the last checkpoint with --resume"
                with naming_lost_ranks(world, trainer.notices.failure, advice):
                    trainer.train()
        if trainer.complete and world.first:
            _log_end(trainer, trainer.step - first_step, time.monotonic() - began, say_next)
        reason = trainer.stop.reason
    # NOTE: the trainer goes before the process group, or the rank may never end. If DDP's reducer is the last to hold
    # the group, its destructor can wait for a thread that waits for the GIL (torch 2.13, gloo).
    del trainer
    gc.collect()  # what a cycle of objects still holds
    world.close()
    return reason


def _log_end(trainer: Trainer, steps: int, seconds: float, say_next: bool) -> None:
    """Log that the run is complete, how long this process took for its `steps`, and, if `say_next`, what to do next."""
    config, splits, advice = trainer.config, trainer.loader.dataset.splits, ""
    if say_next:
        split = next((name for name in ("test", "validation") if name in splits), splits[0])
        task = getattr(config, "task", "retrieval")
        command = RunFolder(config.out).evaluation_command(config.data, task, split)
        advice = f"; next: {command}, and then mvlm report {shlex.quote(str(config.out))}"
    log.info(
        "%s is complete: %d of %d steps, %d of them in %s%s",
        config.out, trainer.step, config.max_steps, steps, format_duration(seconds), advice,
    )  # fmt: skip


@contextmanager
def build_run(
    config: Config,
    world: World,
    open_inputs: Callable[[Config, World], RunInputs],
    build_trainer: Callable[[RunInputs, World, str], Trainer],
) -> Iterator[Trainer]:
    """Context with a trainer at the run's first step or at its newest good checkpoint. It locks the run folder.

    Every stage runs on all ranks, and if it fails on one, all of them end: none is left waiting for another.

    Args:
        open_inputs: opens and checks what the run reads, on all ranks together.
        build_trainer: builds the trainer from it, on a rank, at a checkpoint ("" for the first step).
    """
    copied, place = config.mirror is not None and world.first, config.mirror or Path()
    store = run_on_all_ranks(world, lambda: open_mirror(place, config.out, config.resume) if copied else None)
    ends = run_on_all_ranks(world, lambda: extended(config) if world.first else config)
    max_steps, extensions = world.gather_objects([ends.max_steps, list(ends.extensions)])[0]
    config = replace(config, max_steps=max_steps, extensions=tuple(extensions))
    inputs = open_inputs(config, world)
    read = {"validation": inputs.validation, "also_evaluate": inputs.also_evaluated, "classes": inputs.classes}
    check_ranks(world, inputs.config, inputs.dataset, read)
    # Rank 0 locks the folder and verifies the checkpoints, for all ranks.
    with run_on_all_ranks(world, lambda: RunLock(config.out) if world.first else nullcontext()):
        check_shared(world, config.out)
        found = run_on_all_ranks(world, lambda: str(open_run(inputs.config) or "") if world.first else "")
        checkpoint = world.gather_objects(found)[0]
        trainer = run_on_all_ranks(world, lambda: build_trainer(inputs, world, checkpoint))
        if not trainer.complete:
            run_on_all_ranks(world, lambda: start_services(inputs.config) if world.first else None)
        # Last, so that a run that cannot be built leaves no config.json, which would claim the folder.
        run_on_all_ranks(world, lambda: write_config(inputs.config) if world.first else None)
        if store is not None:
            trainer.writer.mirror = Mirror(store, RunFolder(config.out), config.keep_checkpoints)
            if trainer.writer.newest is not None:
                trainer.writer.mirror.add(trainer.writer.newest)
        yield trainer


def record_start(trainer: Trainer) -> None:
    """Record in the run's history, on rank 0, that training starts or continues.

    Warns of a warm-up as long as the run.
    """
    world, config = trainer.world, trainer.config
    if not world.first:
        return
    if config.warmup_steps >= config.max_steps:
        log.warning(
            "warmup_steps: wanted fewer than the run's %d steps, got %d: the learning rates end at %.0f %% of "
            "their peaks; give --warmup-steps",
            config.max_steps, config.warmup_steps, 100 * config.max_steps / config.warmup_steps,
        )  # fmt: skip
    splits = {"train": trainer.loader.dataset, "validation": trainer.validation}
    data = {name: split.fingerprint for name, split in splits.items() if split is not None}
    precision = chosen_precision(world.device, config.precision)
    folder = RunFolder(config.out)
    History(folder).start(trainer.step, world.device, world.size, precision, data, config.log_every, way_of(config))
    if changed := changed_ways(starts_of(folder.history), read_config(folder.config))[-1]:
        log.info("after step %d: %s; sums round otherwise from here", trainer.step, ", ".join(changed))


def open_splits(config: RunConfig) -> tuple[Dataset, Dataset | None]:
    """Open the training split and, if the run evaluates, the validation split.

    Before that, checks whatever needs no data: the preemption file and the logging services.
    """
    notice = config.preemption_file
    if notice is not None and notice.exists():  # left by an earlier preemption: it would end the run at once
        raise ConfigError(f"preemption_file: {notice} exists before the run starts; remove it to train")
    check_services(config)
    dataset = open_dataset(config.data, "train")
    validation = open_dataset(config.data, "validation") if config.eval_every_steps else None
    if validation is not None and config.eval_images:
        validation = validation.head(config.eval_images)
    return dataset, validation


def open_inputs(config: PretrainConfig, world: World) -> RunInputs:
    """Open data and tokenizer, and check everything that can be checked before there is a folder. All ranks call it."""
    dataset, validation = run_on_all_ranks(world, lambda: open_splits(config))
    config = run_on_all_ranks(world, lambda: with_text_tower(with_hashes(config)))
    tokenizer = share_tokenizer(config, dataset, world)
    return run_on_all_ranks(world, lambda: _checked_inputs(config, dataset, validation, tokenizer))


def _checked_inputs(
    config: PretrainConfig, dataset: Dataset, validation: Dataset | None, tokenizer: Tokenizer
) -> RunInputs:
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ConfigError(
            f"model.vocab_size: wanted at least the tokenizer's {tokenizer.vocab_size}, got {config.model.vocab_size}"
        )
    config = replace(config, model=replace(config.model, mask_token_id=tokenizer.mask_id))
    warn_of_cut_texts(dataset, tokenizer, config.model.text_length, "--model.text-length")
    check_attention(config)
    if not RunFolder(config.out).config.exists():
        check_settings(config, dataset)
    also = None if config.also_evaluate is None else open_dataset(config.also_evaluate, "validation")
    classes = None if config.classes is None else open_classes(config.classes, config.templates)
    classes = None if classes is None else classes.spread(config.eval_images)
    return RunInputs(config, dataset, validation, tokenizer, also, classes)


def build_trainer(inputs: RunInputs, world: World, checkpoint: str) -> Trainer:
    """Build a trainer at its first step or, if `checkpoint` is not empty, at that verified checkpoint."""
    config = inputs.config
    assert isinstance(config, PretrainConfig)
    torch.manual_seed(config.seed)
    loader = make_loader(inputs.dataset, inputs.tokenizer, config, world)
    needed = config.initial_model if config.adapted or config.keep_start else None
    initial = None if needed is None else identify(needed)
    model = make_model(config, fresh=not checkpoint or initial is not None).to(world.device)
    if not checkpoint and world.first:
        warn_of_frozen_noise(config)
    start = deepcopy(model).requires_grad_(False) if config.keep_start else None
    keep_start = None if start is None else KeepStart(config.keep_start, start=start)
    adapt(model, config)
    if config.adapted:
        freeze_rest(model, config)
    if config.capture == "compile":
        compile_step(model, world, config.accumulate, config.checkpoint_activations)
    if config.checkpoint_activations:
        checkpoint_activations(model)
    parallel = parallelize(model, world, config.parallel, gathered=gathered_dtype(config, world))
    optimizer = make_optimizer(model, config, world.device)  # after parallelize, which replaces the parameters
    if config.capture == "cuda-graphs":
        check_graphs(config, world)
    trainer = Trainer(inputs, world, parallel, optimizer, loader, initial, keep_start)
    if checkpoint:
        trainer.restore(Path(checkpoint))
        log.info("resuming from %s", checkpoint)
    return trainer


def warn_of_frozen_noise(config: PretrainConfig) -> None:
    """Warn of each part of the model that is frozen although it starts from random weights."""
    for part, names in STARTS.items():
        if getattr(config, f"train_{part}") == "frozen" and config.starts_random(part):
            log.warning(
                "train_%s: frozen at random weights, as no setting names others; give %s",
                part, " or ".join(f"--{name.replace('_', '-')}" for name in names),
            )  # fmt: skip


def freeze_rest(model: MaskVLM, config: PretrainConfig) -> None:
    """Freeze what no loss of a run with adapters uses, in place, so that its checkpoints leave it out.

    The heads that predict tokens and pixels are frozen too, unless the cross-modality encoders before them learn in
    full. A head whose bias is zero learns: nothing has trained it.
    """
    for parameter in idle_parameters(model, objectives_of(config) + own_objective(config)):
        parameter.requires_grad_(False)
    heads = {model.language_head: model.language_head.vocabulary.bias, model.pixel_head: model.pixel_head.bias}
    for head, bias in heads.items():
        if config.train_cross != "full" and bias.any():
            head.requires_grad_(False)


def make_loader(dataset: Dataset, tokenizer: Tokenizer, config: RunConfig, world: World, **further: Any) -> Loader:
    """Make the training loader, which yields this rank's pairs of each microbatch.

    further: arguments of `Loader`, and `strip` of its `Augment`. ConfigError if the batch does not divide evenly among
    ranks and microbatches, and for augmentations of strips.
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
        microbatches=config.accumulate,
        **{**config.model.loader_options(), **further},
    )


def gathered_dtype(config: RunConfig, world: World) -> torch.dtype | None:
    """Dtype in which FSDP2 gathers the parameters of blocks: that of the products. None for the parameters' own."""
    return torch.bfloat16 if chosen_precision(world.device, config.precision) == "bf16" else None


def check_attention(config: RunConfig) -> None:
    """Raise ConfigError for an attention backend that cannot run here."""
    device = choose_device(config.device)
    dtype = torch.bfloat16 if chosen_precision(device, config.precision) == "bf16" else torch.float32
    choose_for_model(config.model, device, dtype, config.self_attention, config.cross_attention)


def warn_of_cut_texts(dataset: Dataset, tokenizer: Tokenizer, longest: int, flag: str) -> None:
    """Warn of the share of a split's first 1,000 texts that are cut to `longest` tokens, if it is 1 % or more.

    flag: the one that raises the limit, for the message.
    """
    texts = [captions[0] for captions in dataset.captions_of(range(min(len(dataset), 1000)))]
    _, lengths = tokenizer.encode(texts, longest + 1)
    if (cut := float((lengths > longest).mean())) >= 0.01:
        log.warning(
            "%.0f %% of the first 1,000 texts have more than %d tokens and are cut; raise %s", 100 * cut, longest, flag
        )
