"""Fine-tuning: the pretraining engine with a task's loss and evaluation in place of pretraining's.

Run folder, checkpoints, resume, guards, ranks, averaged weights, loggers and watchdog are those of
`mvlm.training.trainer.Trainer`.
"""

import logging
import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mvlm.config.finetune import FinetuneConfig
from mvlm.config.model import MaskVLMConfig
from mvlm.distributed.coordination import run_on_all_ranks
from mvlm.distributed.parallel import Parallel, checkpoint_activations, parallelize, unsharded_copy
from mvlm.distributed.world import World
from mvlm.errors import ConfigError, RunError
from mvlm.evaluation.workspace import Workspace
from mvlm.model.adaptation import adapt
from mvlm.model.maskvlm import IMPLEMENTATIONS, MaskVLM
from mvlm.model.pretrained import check_sizes
from mvlm.objectives.losses import Losses
from mvlm.runs.checkpoint import MODEL, MODEL_CONFIG, checkpoints, read_folder_shapes, read_state
from mvlm.runs.folder import RunFolder
from mvlm.runs.load import identify, load_without_head, read_architecture, read_architecture_of
from mvlm.tasks.load import described_task, find_task
from mvlm.tasks.task import Task
from mvlm.training.loggers import LogSinks
from mvlm.training.optimizer import GuardedAdamW, make_optimizer
from mvlm.training.own_code import with_hashes
from mvlm.training.run import (
    check_attention,
    do_run,
    gathered_dtype,
    make_loader,
    open_splits,
    warn_of_cut_texts,
)
from mvlm.training.trainer import RunInputs, Trainer, evaluation_workspace
from mvlm.weights.resize import resized_config, resized_model
from mvlm_dataloading import Batch, Dataset, Loader, Masks, Tokenizer
from mvlm_dataloading.files import sha256

log = logging.getLogger(__name__)


def finetune(config: FinetuneConfig, say_next: bool = True) -> str | None:
    """Start or resume one fine-tuning run. Every file it writes is under `config.out`.

    It takes, returns and raises what `mvlm.training.run.pretrain` does.
    """
    return do_run(config, open_inputs, build_trainer, say_next)


class FineTuner(Trainer):
    """Training loop of one rank of a fine-tuning run: a `Trainer` whose model is a `Task`."""

    model: Task

    def __init__(
        self,
        inputs: RunInputs,
        world: World,
        parallel: Parallel,
        optimizer: GuardedAdamW,
        loader: Loader,
        initial_model: dict[str, str] | None,
    ) -> None:
        super().__init__(inputs, world, parallel, optimizer, loader, initial_model)
        self.targets: Sequence[Tensor] = [x.to(world.device) for x in self.model.targets(inputs.dataset)]
        """Targets of the training split (`Task.targets`), on the device."""
        task = getattr(inputs.config, "task", "")
        self.task_file = sha256(Path(task)) if task.endswith(".py") else None
        """Hash of the file of the user's own task, as this process reads it. None for a task of the library."""

    def forward_backward(self, microbatches: list[tuple[Batch, Masks]], step: int | Tensor) -> Losses:
        """Compute the task's loss on the global batch, and the parameters' gradients."""
        assert isinstance(self.config, FinetuneConfig)
        return self.model.backward(self.parallel, microbatches, self.targets, self.world, self.config, step)

    def after_update(self) -> dict[str, Tensor]:
        """Clamp ITC's temperature after an optimizer step, and return it to be logged; {} if it is not trained."""
        return super().after_update() if self.model.log_scale.requires_grad else {}

    def extra_state(self) -> dict[str, Any]:
        """Name, options and state of the task for a checkpoint's state.json, and the hash of its file if the user's."""
        return {"task": self.model.describe()} | ({"task_file": self.task_file} if self.task_file else {})

    def restore(self, checkpoint: Path) -> None:
        """Continue from a verified checkpoint. RunError if its task, options or answers differ.

        A warning is logged if the file of the user's own task has changed.
        """
        assert isinstance(self.config, FinetuneConfig)
        if described_task(checkpoint) != self.model.describe():
            raise RunError(
                f"{checkpoint}: wanted the task, options and answers of this run, found others; "
                f"restore the training data, or choose another --out"
            )
        before, now = read_state(checkpoint).get("task_file"), self.task_file  # None in checkpoints of earlier versions
        if before and now and before != now and self.world.first:
            log.warning(
                "%s: changed since %s was written (sha256 %s then, %s now); restore the file, or choose another --out, "
                "if more than comments differ",
                self.config.task, checkpoint, before[:12], now[:12],
            )  # fmt: skip
        super().restore(checkpoint)

    def figures(self, validation: Dataset, sinks: LogSinks | None) -> tuple[dict[str, float], float]:
        """Evaluate on a validation split: ({"val_NAME": main figure}, main figure); ({}, NaN) if a rank is to stop."""
        task = unsharded_copy(self.model, self.new_task).eval()
        found = {}  # stays empty if a rank is to stop
        with evaluation_workspace(self.config, len(validation), self.world, self.may_go_on) as workspace:
            implementation = IMPLEMENTATIONS[self.config.plan]
            found, _ = task.evaluate(validation, self.config.precision, implementation, workspace)
        task.train()
        return ({f"val_{task.main}": found[task.main]}, found[task.main]) if found else ({}, math.nan)

    def new_task(self) -> Task:
        """A task with this one's options and state, and with weights of its own."""
        ours = self.model
        model = MaskVLM(ours.config)
        model.set_attention(self.config.self_attention, self.config.cross_attention)
        task = type(ours)(model, ours.options, ours.state)
        adapt(model, self.config)
        task.set_tokenizer(self.tokenizer)
        return task.to(self.device)


def open_inputs(config: FinetuneConfig, world: World) -> RunInputs:
    """Open the data and read the model's architecture; check both before a run folder is made. All ranks call it."""
    return run_on_all_ranks(world, lambda: _checked_inputs(config))


def _checked_inputs(config: FinetuneConfig) -> RunInputs:
    kind = find_task(config.task)
    dataset, validation = open_splits(config)
    state = kind.make_state(dataset, config.options)
    if validation is not None:
        kind.check_references(validation, state)
    if config.questions_per_image > 1 and not kind.shares:
        raise ConfigError(
            f"questions_per_image: wanted 1, got {config.questions_per_image}; the task {kind.name} reads each sample "
            f"alone"
        )
    if config.all_frozen and not kind.has_head(config.options):
        raise ConfigError(
            f"train_cross: wanted another value than frozen if both encoders are frozen, as the task {kind.name} has "
            f"no head to train"
        )
    architecture, tokenizer = architecture_of(config)
    longest = kind.longest_text(state, config.options, tokenizer, architecture)
    warn_of_cut_texts(dataset, tokenizer, longest, "--question-length")
    if config.own_masks is not None and (kind.losses_of_step is Task.losses_of_step or config.questions_per_image > 1):
        raise ConfigError(
            f"own_masks: wanted none, as the task {kind.name} reads no masks, got {config.own_masks}; leave it out"
        )
    config = replace(with_hashes(config), model=architecture)
    check_attention(config)
    return RunInputs(config, dataset, validation, tokenizer)


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
    pretrained, tokenizer = read_architecture_of(config.checkpoint)
    longest = pretrained.text_length
    fixed = config.train_text != "full" and not config.random_weights and not pretrained.text_tower
    if fixed and (config.question_length or 0) > longest:
        raise ConfigError(
            f"question_length: wanted at most the {longest} tokens of the pretrained model if nothing trains further "
            f"positions, got {config.question_length}; give --question-length {longest}, or --train-text full"
        )
    block = pretrained.mask_block
    if config.image_size is not None and config.image_size % block:
        raise ConfigError(
            f"image_size: wanted a multiple of {block} pixels, as the pretrained model has blocks of masks, got "
            f"{config.image_size}; give --image-size {max(1, round(config.image_size / block)) * block}"
        )
    return resized_config(pretrained, config.image_size, config.question_length), tokenizer


def starting_network(config: FinetuneConfig) -> MaskVLM:
    """Network from which fine-tuning starts, with position embeddings for the run's image size and text length.

    Its weights are the pretrained ones, or random if the configuration says so.
    """
    pretrained = load_without_head(config.checkpoint).network
    if config.random_weights:  # these are drawn behind those of the network that was loaded, as ever
        log.info("%s: only its architecture and tokenizer are used; weights are random", config.checkpoint)
        return MaskVLM(config.model)
    return resized_model(pretrained, config.image_size, config.question_length)


def build_trainer(inputs: RunInputs, world: World, checkpoint: str) -> FineTuner:
    """Build a trainer at its first step or, if `checkpoint` is not empty, at that verified checkpoint."""
    config = inputs.config
    assert isinstance(config, FinetuneConfig)
    torch.manual_seed(config.seed)
    kind = find_task(config.task)
    initial = identify(config.checkpoint) if config.adapted else None
    model = starting_network(config) if not checkpoint or initial is not None else MaskVLM(config.model)
    model.set_attention(config.self_attention, config.cross_attention)
    task = kind(model.train(), config.options, kind.make_state(inputs.dataset, config.options)).to(world.device)
    task.set_tokenizer(inputs.tokenizer)
    adapt(model, config)
    if config.all_frozen:
        model.requires_grad_(False)
    if config.checkpoint_activations:
        checkpoint_activations(task)
    together = config.questions_per_image
    # Masks are a task's own, whatever those of pretraining were.
    masking = replace(config.model.masking, whole_word_masking=False)
    options = {"masking": masking, "per_image": together if together > 1 else None, **task.loader_options()}
    loader = make_loader(inputs.dataset, inputs.tokenizer, config, world, **options)
    parallel = parallelize(task, world, config.parallel, gathered=gathered_dtype(config, world))
    optimizer = make_optimizer(task, config, world.device, peak_rate)
    trainer = FineTuner(inputs, world, parallel, optimizer, loader, initial)
    if checkpoint:
        trainer.restore(Path(checkpoint))
        log.info("resuming from %s%s", checkpoint, "; the pretrained model is not read" if initial is None else "")
    return trainer


def untrained_figures(config: FinetuneConfig, few: Dataset) -> dict[str, Any]:
    """Evaluate the task with random weights on a few samples, to know the names of its figures before training."""
    inputs, kind = _checked_inputs(config), find_task(config.task)
    task = kind(MaskVLM(inputs.config.model), config.options, kind.make_state(inputs.dataset, config.options)).eval()
    task.set_tokenizer(inputs.tokenizer)
    return task.evaluate(few, "fp32", IMPLEMENTATIONS["fast"], Workspace())[0]


def peak_rate(name: str, config: FinetuneConfig) -> float:
    """Peak learning rate of a task's parameter `name`: that of encoders, of other pretrained parts, or of the head."""
    if name.startswith(("model.image_encoder.", "model.text_encoder.")):
        return config.lr_encoder
    return config.lr_cross if name.startswith("model.") else config.lr_head
