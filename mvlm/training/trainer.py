"""The training loop: shard -> loader -> batch -> model -> losses -> step."""

import logging
import time
from collections.abc import Iterator
from contextlib import closing, nullcontext
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from mvlm.config.pretrain import PretrainConfig
from mvlm.device import autocast
from mvlm.distributed.coordination import StepDecisions
from mvlm.distributed.global_batch import backward_global
from mvlm.distributed.loss_shares import Microbatch
from mvlm.distributed.parallel import Parallel, unsharded_copy
from mvlm.distributed.world import World
from mvlm.errors import NonFiniteLossError, RunError
from mvlm.evaluation.evaluate import evaluate_briefly
from mvlm.inference.reconstruction import reconstruction_strip
from mvlm.model.packing import pad_to_bucket
from mvlm.objectives.losses import Losses
from mvlm.progress import TrainingProgress
from mvlm.runs.checkpoint import load_optimizer, optimizer_tensors, read_state, read_tensors, set_generators
from mvlm.runs.checkpoint_writer import CheckpointWriter
from mvlm.runs.folder import RunFolder
from mvlm.training.loggers import LogSinks
from mvlm.training.metrics import MetricsBuffer, MetricsLogger, full_tensor, gradient_norms
from mvlm.training.optimizer import ExponentialMovingAverage, GuardedAdamW, learning_rate_factor
from mvlm.training.stop_request import StopRequest
from mvlm.training.update_guard import SkippedUpdates, UpdateGuard
from mvlm.training.watchdog import Watchdog
from mvlm_dataloading import Batch, Dataset, Loader, Masks, Tokenizer, load_tokenizer

log = logging.getLogger(__name__)


class Trainer:
    """One rank's part of a pretraining run: model, optimizer, loader, and what guards and saves them."""

    def __init__(
        self,
        config: PretrainConfig,
        world: World,
        parallel: Parallel,
        optimizer: GuardedAdamW,
        loader: Loader,
        tokenizer: Tokenizer,
        validation: Dataset | None = None,
    ) -> None:
        self.config, self.world, self.parallel, self.optimizer = config, world, parallel, optimizer
        self.model = model = parallel.model
        self.loader, self.tokenizer, self.device = loader, tokenizer, world.device
        self.validation = validation
        self.average = ExponentialMovingAverage(model, config.ema_decay) if config.ema_decay else None
        self.guard = UpdateGuard(world, config.skip_spikes)
        self.skipped = SkippedUpdates(config.max_bad_steps)
        folder = RunFolder(config.out)
        self.writer = CheckpointWriter(folder.checkpoints, world, config.keep_checkpoints, config.keep_every_steps)
        self.watchdog = Watchdog(folder.stalled(world.rank), world.rank, config.stall_minutes)
        self.metrics = MetricsBuffer()
        """Metrics of the steps since the last row."""
        self.step = 0
        """Updates made or skipped."""
        self.best: dict[str, float] | None = None
        """Step of the best evaluation and its figure, the mean of both R@1."""

    @property
    def complete(self) -> bool:
        """True when no step is left."""
        return self.step >= self.config.max_steps

    def train(self) -> None:
        """Train to `max_steps`, or until asked to stop, with checkpoints on the way and at the end."""
        config, world = self.config, self.world
        sinks = LogSinks(config, self.step) if world.first else None
        logger = MetricsLogger(config, world, sinks, self.check)
        batches = iter(self.loader)
        decisions = StepDecisions(world)
        saved_at = evaluated_at = time.monotonic()
        with (
            sinks or nullcontext(),
            closing(self.loader),
            self.writer,
            self.watchdog,
            StopRequest(config.preemption_file) as stop,
            TrainingProgress(self.step, config.max_steps, shown=world.first) as progress,
        ):
            while not self.complete:
                self.one_step(batches)
                logger.write(progress)  # the previous row: its numbers have arrived while this step was queued
                now = time.monotonic()
                save, evaluate, end = decisions.decide(
                    0 < 60 * config.checkpoint_every_minutes <= now - saved_at,
                    0 < 60 * config.eval_every_minutes <= now - evaluated_at,
                    stop.asked(),
                )
                figures = {}
                if self.validation is not None and (evaluate or self.due(config.eval_every_steps)):
                    figures = self.evaluate(self.validation, sinks)
                    evaluated_at = time.monotonic()
                if figures or self.due(config.log_every) or self.complete:
                    closed, self.metrics = self.metrics, MetricsBuffer()
                    logger.close(closed, self.loader.skipped, figures)
                if save or end or self.due(config.checkpoint_every_steps) or self.complete:
                    logger.write(progress)  # a checkpoint never overtakes the rows of its steps
                    self.save()
                    saved_at = time.monotonic()
                if end:
                    break
            self.watchdog.beat("the last checkpoint")
            decisions.close()
            self.writer.wait()
            if self.writer.newest != self.writer.path(self.step):
                raise RunError(
                    f"{self.writer.path(self.step)}: could not be written (the reason is above), and the run ends "
                    f"here; older checkpoints are unchanged: mend the cause and continue with --resume"
                )
            if not self.complete:
                log.info("%s: saved at step %d, and stopped", stop.reason or "another rank", self.step)

    def due(self, every: int) -> bool:
        """True after every `every`th step; never for 0."""
        return every > 0 and self.step % every == 0

    def one_step(self, batches: Iterator[tuple[Batch, Masks]]) -> None:
        """One update, or none where the guard forbids it. Its metrics stay on the device, in `self.metrics`."""
        self.watchdog.beat(f"the data of step {self.step + 1}")
        started = time.perf_counter()
        loaded = [next(batches) for _ in range(self.config.accumulate)]
        samples = [i for batch, _ in loaded for i in batch.sample_id.tolist()]
        tokens = sum(len(batch.tokens) for batch, _ in loaded)
        if self.config.compile:
            loaded = [pad_to_bucket(batch, masks, self.config.model.text_length) for batch, masks in loaded]
        micro = [(b.to(self.device, non_blocking=True), m.to(self.device, non_blocking=True)) for b, m in loaded]
        waited = time.perf_counter() - started
        self.watchdog.beat(f"step {self.step + 1}")
        factor = learning_rate_factor(self.step, self.config)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        losses = self.forward_backward(micro)
        norm, parts = gradient_norms(self.model)
        nn.utils.clip_grads_with_norm_(self.model.parameters(), self.config.clip_norm, norm)
        if self.step == self.config.reconstruction_first:  # ITC and ITM are in the loss from here on
            self.guard.reset()
        good = self.guard.judge(losses.total.detach(), norm)
        self.optimizer.found_inf = (~good).float()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.model.clamp_temperature()
        self.step += 1
        if self.average is not None:
            self.average.update(self.step)
        values: dict[str, Tensor] = {**losses._asdict(), "grad_norm": norm, "good": good}
        values |= {f"grad_norm_{name}": value for name, value in parts.items()}
        values["temperature"] = (-full_tensor(self.model.log_scale.detach()[0])).exp()
        self.metrics.add(self.step, samples, tokens, values, waited)

    def forward_backward(self, micro: list[Microbatch]) -> Losses:
        """The losses of the global batch, scalars; leaves the gradients of their total in the parameters' `grad`."""
        config = self.config
        # A Python number would be a constant of the compiled code, and every step would compile again.
        step = torch.full((), self.step, device=self.device) if config.compile else self.step
        reconstruction_only = self.step < config.reconstruction_first
        if self.world.size == len(micro) == 1:
            batch, masks = micro[0]
            with autocast(self.device, config.precision):
                losses: Losses = self.model(
                    batch,
                    masks,
                    seed=config.seed,
                    step=step,
                    reconstruction_only=reconstruction_only,
                    plan=config.plan,
                )
            losses.total.backward()
            return Losses(*(loss.detach() for loss in losses))
        return backward_global(
            self.parallel,
            micro,
            self.world,
            seed=config.seed,
            step=step,
            plan=config.plan,
            reconstruction_only=reconstruction_only,
            local_negatives=config.local_negatives,
            autocast=partial(autocast, self.device, config.precision),
        )

    def check(self, metrics: MetricsBuffer) -> int:
        """Count the skipped updates among `metrics` and return the run's total.

        Raises:
            NonFiniteLossError: more than --max-bad-steps of them in a row.
        """
        past = self.skipped.count(metrics)
        if past is None:
            return self.skipped.total
        step, row, samples = past
        mine = [str(self.loader.dataset.keys[i]) for i in samples]
        keys = sorted(key for its in self.world.gather_objects(mine) for key in its)
        more = f" and {len(keys) - 8} more" if len(keys) > 8 else ""
        self.writer.wait()
        raise NonFiniteLossError(
            f"step {step}: {self.skipped.reason(row)}; the update was not made ({self.skipped.in_a_row} in a row, "
            f"--max-bad-steps is {self.config.max_bad_steps}). Its samples: {', '.join(keys[:8])}{more}. "
            f"Last good checkpoint: {self.writer.newest or 'none'}; no checkpoint holds such an update. "
            f"Try a lower learning rate or --precision fp32"
        )

    def evaluate(self, validation: Dataset, sinks: LogSinks | None) -> dict[str, float]:
        """Figures on the validation split, with the averaged weights if the run keeps them."""
        self.watchdog.beat("the evaluation")
        with self.average.applied() if self.average is not None else nullcontext():
            model = unsharded_copy(self.model)
            figures = evaluate_briefly(model, validation, self.tokenizer, self.config.precision)
            image = reconstruction_strip(model, validation, self.tokenizer, self.config.precision)
        if sinks is not None:
            sinks.log_image(image, self.step)
        figure = (figures["tr_r1"] + figures["ir_r1"]) / 2
        if self.best is None or figure > self.best["figure"]:
            self.best = {"step": self.step, "figure": figure}
        return figures

    def save(self) -> None:
        """Start to write a checkpoint of this step."""
        self.watchdog.beat("the checkpoint before")
        self.check(self.metrics)
        parts = {"model": self.model.state_dict(), "optimizer": optimizer_tensors(self.model, self.optimizer)}
        if self.average is not None:
            parts["ema"] = self.average.tensors
        loader = self.loader.state_dict()
        loader["skipped"] = sorted(set().union(*self.world.gather_objects(loader["skipped"])))
        loader["met"] = loader["epoch"] * len(self.loader.dataset) + loader["position"]  # all ranks together
        state = {"loader": loader, "guard": self.guard.state(), "bad": self.skipped.state(), "best": self.best}
        self.writer.save(self.step, self.model, parts, state, self.tokenizer)

    def restore(self, checkpoint: Path) -> None:
        """Continue from a verified checkpoint. RunError or DataError where its model, tokenizer or data differ."""
        state = read_state(checkpoint)
        read_tensors(checkpoint / "model", self.model.state_dict())
        load_optimizer(checkpoint / "optimizer", self.model, self.optimizer)
        if self.average is not None:
            read_tensors(checkpoint / "ema", self.average.tensors)
        set_generators(checkpoint, self.world.rank, self.device)
        self.loader.load_state_dict(state["loader"])
        own = checkpoint / "tokenizer.json"
        if load_tokenizer(own).fingerprint != self.tokenizer.fingerprint:
            raise RunError(
                f"{self.config.tokenizer or self.config.data}: wanted the tokenizer that the run started with, found "
                f"another; the run's is {own}: restore it, or choose another --out"
            )
        self.writer.resume_from(checkpoint)
        self.guard.load(state["guard"])
        self.skipped.load(state["bad"])
        self.step, self.best = state["step"], state["best"]
