"""The training loop: shard -> loader -> batch -> model -> losses -> step."""

import logging
import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mvlm.config.groups import RunConfig
from mvlm.config.pretrain import PretrainConfig
from mvlm.device import autocast, chosen_precision
from mvlm.distributed.collectives import HostNumbers
from mvlm.distributed.coordination import Notices, run_on_all_ranks
from mvlm.distributed.global_batch import backward_global
from mvlm.distributed.parallel import Parallel, unsharded_copy
from mvlm.distributed.step_exchange import StepExchange
from mvlm.distributed.world import World
from mvlm.errors import RunError
from mvlm.evaluation.class_images import ClassImages
from mvlm.evaluation.classification import classify_briefly
from mvlm.evaluation.evaluate import evaluate_briefly
from mvlm.evaluation.workspace import EvaluationStopped, Workspace
from mvlm.files import check_finite
from mvlm.inference.masked import reconstruction_strip
from mvlm.model.adaptation import adapt, learned
from mvlm.model.maskvlm import MaskVLM
from mvlm.model.packing import eager_buckets, pad_to_bucket
from mvlm.model.shadow_weights import shadow_weights, using
from mvlm.objectives.losses import Losses
from mvlm.objectives.pretraining import KeepStart, objectives_of
from mvlm.objectives.step import Objective
from mvlm.progress import TrainingProgress
from mvlm.runs.checkpoint import (
    EMA,
    MODEL,
    OPTIMIZER,
    TOKENIZER,
    generator_states,
    load_optimizer,
    optimizer_tensors,
    read_state,
    read_tensors,
    set_generators,
    step_of,
)
from mvlm.runs.checkpoint_writer import CheckpointWriter
from mvlm.runs.folder import RunFolder
from mvlm.runs.history import History
from mvlm.runs.load import check_start
from mvlm.training.cuda_graphs import CudaGraphs
from mvlm.training.failed_step import FailedStep, MadeStep
from mvlm.training.loggers import LogSinks
from mvlm.training.metrics import (
    MetricsBuffer,
    MetricsLogger,
    SkippedUpdates,
    finite_update,
    full_tensor,
    gradient_norms,
)
from mvlm.training.optimizer import ExponentialMovingAverage, GuardedAdamW, learning_rate_factor
from mvlm.training.own_code import own_masks, own_objective
from mvlm.training.own_masks import drawn_by_user
from mvlm.training.stopping import StopRequest, Watchdog
from mvlm_dataloading import Batch, Dataset, Loader, Masks, Tokenizer, load_tokenizer
from mvlm_dataloading.loader.resume import merge_states
from mvlm_kernels.shadows import Shadows

CHECKPOINT_SECONDS = 600.0
"""Time between checkpoints of a run that has no `checkpoint_every_steps`."""

log = logging.getLogger(__name__)


class RunInputs(NamedTuple):
    """Settings, data sets and tokenizer of a run, opened and checked before there is a model."""

    config: RunConfig
    """Configuration as given, with the tokenizer's id of [MASK]."""
    dataset: Dataset
    validation: Dataset | None
    """Validation split, if the run evaluates."""
    tokenizer: Tokenizer
    also_evaluated: Dataset | None = None
    """Validation split of the data set of `--also-evaluate`; None without the flag, or in fine-tuning."""
    classes: ClassImages | None = None
    """Images of classes for zero-shot classification at evaluations (`--classes`), or None."""


class Trainer:
    """One rank of a pretraining run: its model, optimizer, loader, guards and checkpoint writer.

    Args:
        initial_model: path and hash of the trained model that the run started from (`mvlm.runs.load.identify`), if its
            checkpoints refer to it: those of adapters leave its frozen weights out.
        keep_start: the objective of --keep-start, with a frozen copy of the initial model.
    """

    def __init__(
        self,
        inputs: RunInputs,
        world: World,
        parallel: Parallel,
        optimizer: GuardedAdamW,
        loader: Loader,
        initial_model: dict[str, str] | None = None,
        keep_start: KeepStart | None = None,
    ) -> None:
        config, _, self.validation, self.tokenizer, self.also_evaluated, self.classes = inputs
        self.config, self.world, self.parallel, self.optimizer = config, world, parallel, optimizer
        self.model: Any = parallel.model
        """The model; in fine-tuning, the task around it."""
        self.loader, self.device, self.initial_model, self.keep_start = loader, world.device, initial_model, keep_start
        self.own_masks, self.own_objective = own_masks(config), own_objective(config)
        self.average = ExponentialMovingAverage(self.model, config.ema_decay) if config.ema_decay else None
        self.skipped = SkippedUpdates(config.max_bad_steps)
        folder = RunFolder(config.out)
        self.writer = CheckpointWriter(folder.checkpoints, world, config.keep_checkpoints, History(folder))
        self.stop, self.notices = StopRequest(config.preemption_file), Notices(world)
        self.exchange = StepExchange(world, requests=2)
        self.watchdog = Watchdog(folder.stalled(world.rank), world.rank, config.stall_minutes, self.notices.failure)
        self.metrics = MetricsBuffer()
        """Metrics of the steps since the last row."""
        self.failed_step: FailedStep | None = None
        """Keeper of the first pretraining step that is not finite, while `train` runs; None once it has written one."""
        self.saved_at = math.inf
        """Monotonic time of the last checkpoint, or of the start of training."""
        self.step = 0
        """Number of updates made or skipped."""
        self.stage = config.model
        """Settings of the model in the stage that the loader reads for."""
        self.best: dict[str, float] | None = None
        """Step and figure of the best evaluation: the mean of both R@1 in per cent, or a task's main figure."""

    @cached_property
    def objectives(self) -> tuple[Objective, ...]:
        """Objectives of pretraining, with their weights."""
        assert isinstance(self.config, PretrainConfig)
        kept = () if self.keep_start is None else (self.keep_start,)
        return objectives_of(self.config) + kept + self.own_objective

    @cached_property
    def graphs(self) -> CudaGraphs | None:
        """CUDA graphs that replay the steps of one rank, with --capture cuda-graphs; else None."""
        wanted = isinstance(self.config, PretrainConfig) and self.config.capture == "cuda-graphs"
        return CudaGraphs(self.forward_backward, self.model.parameters()) if wanted else None

    @cached_property
    def shadows(self) -> Shadows | None:
        """Copies of the weights in bf16, if the fast implementation computes in it; else None.

        A compiler casts weights inside its kernels. Runs that recompute activations have no memory to spare.
        """
        config = self.config
        compiled = isinstance(config, PretrainConfig) and config.capture == "compile"
        if config.plan != "fast" or compiled or config.checkpoint_activations:
            return None
        return shadow_weights(self.model) if chosen_precision(self.device, config.precision) == "bf16" else None

    def enter_stage(self, step: int) -> None:
        """Let the loader go on with the images and masks of the stage that has the step after so many updates."""
        if (wanted := self.config.model_at(step)) == self.stage:
            return
        self.stage = wanted
        self.loader.resize(wanted.image_size, wanted.masking)
        if self.graphs is not None:
            self.graphs.forget()
        log.info("step %d: images of %d px, %d of %d patches masked", step + 1, wanted.image_size,
                 wanted.masked_patches, wanted.num_patches)  # fmt: skip

    def at_stage(self, *models: Any) -> ExitStack:
        """Context in which models have the side of images and the masks of the present stage."""
        found = ExitStack()
        if self.stage != self.config.model:
            for model in models:
                found.enter_context(model.at(self.stage))
        return found

    @property
    def backward(self) -> Callable[[list[tuple[Batch, Masks]], Any], Losses]:
        """Function that computes losses and gradients of a step: `forward_backward`, or its replay from CUDA graphs."""
        return self.forward_backward if self.graphs is None else self.graphs.run

    @property
    def complete(self) -> bool:
        """True if the last step of the run has been made."""
        return self.step >= self.config.max_steps

    def train(self) -> None:
        """Train to `max_steps` or until a stop is requested, with a checkpoint at the end in either case."""
        config, world = self.config, self.world
        sinks = LogSinks(config, self.step) if world.first else None
        log_row, seconds = (None, 0.0) if sinks is None else (sinks.log, sinks.seconds)
        logger = MetricsLogger(config, world, self.check_skipped_updates, log_row, seconds)
        batches = iter(self.loader)
        if sinks is not None:
            self.writer.finished = partial(self.log_if_best, sinks)
        self.failed_step = self.new_failed_step()
        self.saved_at = time.monotonic()
        with (
            sinks or nullcontext(),
            closing(self.loader),
            self.writer,
            self.watchdog,
            self.stop,
            self.notices,
            TrainingProgress(self.step, config.max_steps, shown=world.first) as progress,
        ):
            while not self.complete:
                figures = self.also_evaluate()  # before the first step; they are in its row
                self.one_step(batches)
                # The previous row. Its numbers arrived while this step was being queued, so nothing waits here.
                logger.write_row(progress)
                save, end = self.exchange.granted(self.requests())
                # Clocks and signals differ between ranks, so these are decided together. Steps (`due`) are the same.
                if self.validation is not None and self.due(config.eval_every_steps):
                    found = self.evaluate(self.validation, sinks)
                    figures, end = figures | found, end or not found
                    save |= config.artefacts and self.is_best()
                figures |= self.also_evaluate()
                if figures or self.due(config.log_every) or end or self.complete:
                    closed, self.metrics = self.metrics, MetricsBuffer()
                    logger.end_row(closed, self.loader.skipped, figures)
                if save or end or self.complete or self.due(config.checkpoint_every_steps):
                    self.write_failed_step()
                    # Rows first: a resume drops the rows after its checkpoint, and never misses one before it.
                    logger.write_row(progress)
                    self.save()
                    self.saved_at = time.monotonic()
                if end:
                    break
            self.watchdog.beat("the last checkpoint")
            self.writer.wait()
            if self.writer.newest != self.writer.path(self.step):
                raise RunError(
                    f"{self.writer.path(self.step)}: could not be written (the reason is above), and the run ends "
                    f"here; older checkpoints are unchanged: remove the cause and continue with --resume"
                )
            if sinks is not None:
                sinks.log_checkpoint(self.writer.path(self.step), "last")
            if not self.complete:
                log.info(
                    "stopped by %s at step %d; saved: continue with --resume",
                    self.stop.reason or "another rank",
                    self.step,
                )

    def is_best(self) -> bool:
        """True if the evaluation of this step was the best so far. Rank 0 decides for all."""
        return self.world.gather_objects(self.best is not None and self.best["step"] == self.step)[0]

    def log_if_best(self, sinks: LogSinks, checkpoint: Path) -> None:
        """Upload a finished checkpoint through `sinks` as the best one, if it is that of the best evaluation."""
        if self.best is not None and step_of(checkpoint) == self.best["step"]:
            sinks.log_checkpoint(checkpoint, "best")

    def due(self, every: int) -> bool:
        """True if this step is a multiple of `every`; never for 0."""
        return every > 0 and self.step % every == 0

    def requests(self) -> tuple[bool, bool]:
        """Requests of this rank, two bools: a checkpoint, because the last one is old, and the end of the run."""
        now, by_time = time.monotonic(), not self.config.checkpoint_every_steps
        return by_time and now - self.saved_at >= CHECKPOINT_SECONDS, self.stop.requested()

    def one_step(self, batches: Iterator[tuple[Batch, Masks]]) -> None:
        """Make one update, or skip it if its loss or its gradient is not finite.

        Its metrics stay on the device, in `self.metrics`.

        On one rank of pretraining the host waits for no more than the step before: it queues the next step while this
        one runs. On several ranks it also waits for the numbers of rows that they exchange.
        """
        self.enter_stage(self.step)
        self.watchdog.beat(f"the data of step {self.step + 1}")
        started = time.perf_counter()
        loaded = [next(batches) for _ in range(self.config.accumulate)]
        samples = [i for batch, _ in loaded for i in batch.sample_id.tolist()]
        tokens = sum(len(batch.tokens) for batch, _ in loaded)
        if self.own_masks is not None:
            shared = self.config, self.world, self.loader, self.parallel
            with self.at_stage(self.model):
                loaded = drawn_by_user(self.own_masks, loaded, self.step, *shared)
        loaded = with_few_shapes(loaded, self.config, self.world)
        microbatches = [(b.to(self.device, non_blocking=True), m.to(self.device, non_blocking=True)) for b, m in loaded]
        waited = time.perf_counter() - started

        self.watchdog.beat(f"step {self.step + 1}")
        self.optimizer.set_learning_rates(learning_rate_factor(self.step, self.config))
        # In compiled code and in CUDA graphs a Python number is a constant.
        step: Any = torch.full((), self.step, device=self.device) if self.config.fixed_shapes else self.step
        generators = None if self.failed_step is None else generator_states(self.device)
        self.parallel.alone.start()
        kept = () if self.keep_start is None else (self.keep_start.start,)
        with using(self.shadows), self.at_stage(self.model, *kept):
            losses = self.backward(microbatches, step)
        figures = waited, self.parallel.alone.seconds(), self.loader.skipped
        self.write_failed_step()  # of the step before, while this one's gradients are computed
        further, ranks = self.update(losses, figures)
        if self.failed_step is not None and generators is not None:
            values = losses | {name: value for name, value in further.items() if name.startswith("grad_norm")}
            good = HostNumbers(further["good"])
            self.failed_step.keep(MadeStep(self.step, microbatches, generators, values, good))
        self.step += 1
        if self.average is not None:
            self.average.update(self.step)
        self.metrics.add(self.step, samples, tokens, {**losses, **further}, waited, ranks)

    def new_failed_step(self) -> FailedStep | None:
        """Make the keeper of the first step that is not finite; None if the run has one already, or wants none."""
        config, folder = self.config, RunFolder(self.config.out).failed_step
        wanted = isinstance(config, PretrainConfig) and config.failed_step_mb > 0
        there = self.world.gather_objects(folder.exists())[0]
        return FailedStep(folder, config.failed_step_mb * 10**6) if wanted and not there else None

    def write_failed_step(self) -> None:
        """Write the last step, if it was not finite and none has been written. Call it before another update."""
        keeper = self.failed_step
        made = None if keeper is None else keeper.failed()
        if keeper is None or made is None:
            return
        assert isinstance(self.config, PretrainConfig)
        self.failed_step = None  # there is one of a run
        samples = [str(self.loader.dataset.keys[i]) for b, _ in made.microbatches for i in b.sample_id.tolist()]
        model, optimizer = self.model, self.optimizer
        keeper.write(made, self.config, self.world, model, optimizer, self.keep_start, samples, self.writer)

    def update(self, losses: Losses, figures: tuple[float, ...]) -> tuple[dict[str, Tensor], Tensor | None]:
        """Clip the gradients and update the weights, if loss and gradients are finite on all ranks.

        figures: this rank's for the step (`mvlm.training.rank_figures`). Returns further metrics, and the figures of
        all ranks, or None with one rank.
        """
        norm, parts = gradient_norms(self.model)
        self.optimizer.clip(norm, self.config.clip_norm)
        good, ranks = self.exchange.send(finite_update(losses.total.detach(), norm), self.requests(), figures)
        # The fused optimizer reads this flag on the device. An `if` here would make the host wait for the step.
        self.optimizer.found_inf = (~good).float()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        values = {"grad_norm": norm, "good": good} | {f"grad_norm_{name}": value for name, value in parts.items()}
        return values | self.after_update(), ranks

    def forward_backward(self, microbatches: list[tuple[Batch, Masks]], step: int | Tensor) -> Losses:
        """Compute the losses of the global batch, scalars without gradient, and the gradients of their total.

        step: number of the update.
        """
        return losses_and_gradients(self.parallel, microbatches, self.world, self.config, self.objectives, step)

    def after_update(self) -> dict[str, Tensor]:
        """Clamp the temperature, after every update. Returns it as a further metric of the step."""
        self.model.clamp_temperature()
        return {"temperature": (-full_tensor(self.model.log_scale.detach()[0])).exp()}

    def check_skipped_updates(self, metrics: MetricsBuffer) -> int:
        """Count the skipped updates among `metrics` and return the run's total.

        Raises:
            NonFiniteLossError: more than `max_bad_steps` updates in a row were skipped.
        """
        beyond_limit = self.skipped.count(metrics)
        if beyond_limit is None:
            return self.skipped.total
        step, row, samples = beyond_limit
        own_keys = [str(self.loader.dataset.keys[i]) for i in samples]
        keys = sorted(key for rank_keys in self.world.gather_objects(own_keys) for key in rank_keys)
        self.writer.wait()
        first = RunFolder(self.config.out).failed_step
        raise self.skipped.error(step, row, keys, self.writer.newest, first if first.exists() else None)

    def evaluate(self, validation: Dataset, sinks: LogSinks | None) -> dict[str, float]:
        """Metrics on the validation split, by the averaged weights if the run has them; empty if a rank is to stop."""
        self.watchdog.beat("the evaluation")
        with self.average.applied() if self.average is not None else nullcontext():
            figures, figure = self.figures(validation, sinks)
        if figure > (self.best["figure"] if self.best else -math.inf):  # never for NaN
            self.best = {"step": self.step, "figure": figure}
        return figures

    def also_evaluate(self) -> dict[str, float]:
        """R@1 by ITC on the split of --also-evaluate, before the first step and after the last.

        Empty at other steps, without that flag, and if a rank is to stop.
        """
        figures, split = {}, self.also_evaluated
        if split is None or not (self.step == 0 or self.complete):
            return figures
        self.watchdog.beat("the evaluation on further data")
        with self.average.applied() if self.average is not None else nullcontext():
            model, precision = unsharded_copy(self.model, self.new_model), self.config.precision
            with evaluation_workspace(self.config, len(split), self.world, self.may_go_on) as workspace:
                figures = evaluate_briefly(model, split, self.tokenizer, precision, workspace, gains=False)
        when = "after" if self.complete else "before"
        return {f"also_{when}_{name}": value for name, value in figures.items() if name.endswith("_r1")}

    def figures(self, validation: Dataset, sinks: LogSinks | None) -> tuple[dict[str, float], float]:
        """Metrics on the validation split with the current weights, and the one by which the best evaluation is chosen.

        Empty, and NaN, if a rank is to stop.
        """
        model = unsharded_copy(self.model, self.new_model)
        figures = {}  # stays empty if a rank is to stop
        with self.at_stage(model):
            with evaluation_workspace(self.config, len(validation), self.world, self.may_go_on) as workspace:
                common = self.tokenizer, self.config.precision, workspace
                found = evaluate_briefly(model, validation, *common)
                figures = found | ({} if self.classes is None else classify_briefly(model, self.classes, *common))
            if not figures:
                return {}, math.nan
            image = reconstruction_strip(model, validation, self.tokenizer, self.config.precision)
        if sinks is not None:
            sinks.log_image(image, self.step)
        return figures, (figures["tr_r1"] + figures["ir_r1"]) / 2

    def new_model(self) -> Any:
        """Make a model of the same architecture with weights of its own."""
        model = MaskVLM(self.model.config)
        adapt(model, self.config)
        return model

    def may_go_on(self) -> bool:
        """Report progress of an evaluation. False if this or another rank is asked to stop."""
        self.watchdog.beat("the evaluation")
        return not self.notices.stop_requested(self.stop.requested())

    def save(self) -> None:
        """Start to write a checkpoint of this step (`mvlm.runs.checkpoint` has the format)."""
        self.watchdog.beat("the previous checkpoint")
        self.check_skipped_updates(self.metrics)  # those of an unfinished row too: a checkpoint has their number
        # Each rank knows the undecodable images of its own batches. A resume may deal the samples out differently.
        loader = merge_states(self.world.gather_objects(self.loader.state_dict()), len(self.loader.dataset))
        state = {"loader": loader, "bad": self.skipped.state(), "best": self.best}
        if self.config.adapted:
            state["adapters"] = {"alpha": self.config.lora_alpha, "start": self.initial_model}
        self.writer.save(self.step, self.model, self.tensors(), state | self.extra_state(), self.tokenizer)

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Tensors of a checkpoint, by part (model, ema, optimizer) and by name."""
        parts = {MODEL: self.model.state_dict()} | ({} if self.average is None else {EMA: self.average.tensors})
        if self.initial_model is not None and self.config.adapted:
            parts = {part: learned(self.model, tensors) for part, tensors in parts.items()}
        return parts | {OPTIMIZER: optimizer_tensors(self.model, self.optimizer)}

    def extra_state(self) -> dict[str, Any]:
        """Further fields of a checkpoint's state.json: with --keep-start, `kept`, the hash of the initial model."""
        if self.keep_start is None or self.initial_model is None:
            return {}
        return {"kept": self.initial_model["sha256"]}

    def restore(self, checkpoint: Path) -> None:
        """Continue from a verified checkpoint. RunError or DataError if its model, tokenizer or data differ.

        RunError too for weights that are not finite.
        """
        state = read_state(checkpoint)
        if self.initial_model is not None and self.config.adapted:
            check_start(self.initial_model, state, checkpoint)
        if state.get("kept") != self.extra_state().get("kept"):
            raise RunError(f"keep_start: wanted the model that {checkpoint} started from, found another; restore it")
        parts = self.tensors()
        for part in [MODEL] + [EMA] * (self.average is not None):
            read_tensors(checkpoint / part, parts[part])
            check_finite(parts[part], checkpoint / part)
        load_optimizer(checkpoint / OPTIMIZER, self.model, self.optimizer)
        set_generators(checkpoint, self.world.rank, self.device)
        self.enter_stage(max(0, state["step"] - 1))  # that of the last step made, which the loader's state is of
        self.loader.load_state_dict(state["loader"])
        own = checkpoint / TOKENIZER
        if load_tokenizer(own).fingerprint != self.tokenizer.fingerprint:
            raise RunError(
                f"{getattr(self.config, 'tokenizer', None) or self.config.data}: wanted the tokenizer that the run "
                f"started with, found another; the run's is {own}: restore it, or choose another --out"
            )
        self.writer.resume_from(checkpoint)
        self.skipped.load(state["bad"])
        self.step, self.best = state["step"], state["best"]


def losses_and_gradients(
    parallel: Parallel,
    microbatches: Sequence[tuple[Batch, Masks]],
    world: World,
    config: RunConfig,
    objectives: Sequence[Objective],
    step: int | Tensor,
) -> Losses:
    """Losses of the global batch, scalars without gradient, and the gradients of their total in the parameters."""
    options = {"seed": config.seed, "step": step, "plan": config.plan, "objectives": objectives}
    # The global pass takes any number of masked patches, and gives weights of an own loss gradients.
    own = config.own_masks is not None or config.own_loss is not None
    if own or not world.size == len(microbatches) == 1:
        context = partial(autocast, world.device, config.precision)
        return backward_global(parallel, microbatches, world, **options, autocast=context)
    with autocast(world.device, config.precision):
        losses: Losses = parallel.model(*microbatches[0], **options)
    losses.total.backward()
    return losses.detach()


# A graph or a compiled step is made for each shape, so there should be few.
_COARSE = 16


def with_few_shapes(loaded: list[tuple[Batch, Masks]], config: RunConfig, world: World) -> list[tuple[Batch, Masks]]:
    """The batches of a step on one rank, padded if few shapes make the step faster; else as they are.

    CUDA graphs and steps compiled as one graph need few shapes, and so does the fast implementation in bf16 on a CPU.
    There oneDNN generates code for each shape of a matrix product and keeps it for 1,024 of them: for the demo 40
    products of a step were new, and 18 ms of it. In fp32 it is another library that multiplies.
    """
    alone = world.size == config.accumulate == 1 and isinstance(config, PretrainConfig)
    buckets = _COARSE if alone and config.fixed_shapes else 0
    if not buckets and alone and config.plan == "fast":
        buckets = eager_buckets(world.device, config.precision)
    if not buckets:
        return loaded
    return [pad_to_bucket(batch, masks, config.model.text_length, buckets) for batch, masks in loaded]


IN_MEMORY = 1 << 30
"""Most bytes of features that each rank keeps in memory during an evaluation."""


@contextmanager
def evaluation_workspace(
    config: RunConfig, images: int, world: World, go_on: Callable[[], bool]
) -> Iterator[Workspace]:
    """Context with a workspace for the features of `images` images. The block ends without an error if it is stopped.

    Features of more than `IN_MEMORY` bytes lie in files that all ranks share, if the run folder's disk has room for
    them. The files are removed at the end, and before the next evaluation if a kill left them.
    """
    # Most of what is kept, in fp32.
    needed = 4 * images * (1 + config.model.num_patches) * config.model.width
    in_files = needed > IN_MEMORY and shutil.disk_usage(config.out).free > 2 * needed
    folder = RunFolder(config.out).evaluation_files if world.gather_objects(in_files)[0] else None

    def empty() -> None:
        if folder is not None and world.first:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()

    run_on_all_ranks(world, empty)
    try:
        # Rows of other ranks are read from the disk, on NFS at least, so they have to be there.
        with closing(Workspace(folder, world, resumable=folder is not None and world.size > 1, go_on=go_on)) as found:
            yield found
        world.gather_objects(None)  # no rank reads the files any more
    except EvaluationStopped:
        pass  # all ranks raise it together
    finally:
        if folder is not None and world.first:
            shutil.rmtree(folder, ignore_errors=True)
