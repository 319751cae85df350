"""The training loop: shard -> loader -> batch -> model -> losses -> step."""

import logging
import time
from collections.abc import Iterator
from contextlib import closing, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from mvlm import distributed
from mvlm.agreement import Wishes, agree, check_ranks, is_lost_rank
from mvlm.checkpoint import load_optimizer, optimizer_tensors, read_state, read_tensors, set_generators
from mvlm.console import Progress
from mvlm.device import autocast
from mvlm.distributed import World
from mvlm.errors import ConfigError, LostRankError, NonFiniteLossError, RunError
from mvlm.evaluation import evaluate_briefly
from mvlm.global_batch import Microbatch, backward_global
from mvlm.measures import Numbers, gradient_norms, whole
from mvlm.monitor import Lines, Outputs, check_services
from mvlm.objectives import Losses
from mvlm.packing import bucketed
from mvlm.parallel import Parallel, checkpoint_activations, compile_step, parallelize, whole_model
from mvlm.pretrain_config import PretrainConfig
from mvlm.recipe import (
    GuardedAdamW,
    WeightAverage,
    check_attention,
    choose_tokenizer,
    fit_to_tokenizer,
    learning_rate_factor,
    make_loader,
    make_model,
    make_optimizer,
)
from mvlm.run_folder import RunLock, open_run, write_config
from mvlm.safety import BadSteps, Guard
from mvlm.saver import Saver
from mvlm.signals import StopRequest
from mvlm.strip import strip
from mvlm.utilisation import Utilisation
from mvlm.watchdog import Watchdog
from mvlm_dataloading import Batch, Dataset, Loader, Masks, Tokenizer, load_tokenizer, open_dataset

log = logging.getLogger(__name__)


def pretrain(config: PretrainConfig) -> None:
    """Run, or go on with, one pretraining run. Every file it writes is under `config.out`."""
    world = distributed.start(config.device)
    dataset, validation, tokenizer, config = agree(world, lambda: open_inputs(config))
    check_ranks(world, config, dataset)
    # Rank 0 looks at the folder, keeps it for itself, and reads the checkpoints through, for all ranks.
    with agree(world, lambda: RunLock(config.out) if world.first else nullcontext()):
        found = agree(world, lambda: str(open_run(config) or "") if world.first else "")
        checkpoint = world.gather(found)[0]
        run = agree(world, lambda: start_run(config, world, dataset, tokenizer, checkpoint))
        agree(world, lambda: write_config(config) if world.first else None)
        if run.step >= config.max_steps:
            log.info("%s is complete: %d of %d steps", config.out, run.step, config.max_steps)
        else:
            try:
                run.train(validation)
            except RuntimeError as error:
                if world.size == 1 or not is_lost_rank(error):
                    raise
                raise LostRankError(
                    f"rank {world.rank} lost another rank after step {run.step}, and ends too; that one's log tells "
                    f"why. Go on from the last checkpoint with --resume ({str(error).splitlines()[0]})"
                ) from error
    world.close()


def open_inputs(config: PretrainConfig) -> tuple[Dataset, Dataset | None, Tokenizer, PretrainConfig]:
    """The data, the tokenizer, and the configuration with what the tokenizer decides."""
    notice = config.preemption_file
    if notice is not None and notice.exists():  # one of the last time, most likely: the run would end with every step
        raise ConfigError(f"preemption_file: {notice} is there before the run begins; remove it to train")
    check_services(config)
    dataset = open_dataset(config.data, "train")
    evaluates = config.eval_every_steps or config.eval_every_minutes
    validation = open_dataset(config.data, "validation") if evaluates else None
    if validation is not None and config.eval_pictures:
        validation = validation.head(config.eval_pictures)
    tokenizer = choose_tokenizer(config, dataset)
    config = replace(config, model=fit_to_tokenizer(config, tokenizer))
    check_attention(config)
    if (config.image_weights or config.text_weights) and not (config.out / "config.json").exists():
        make_model(config, fresh=True)  # weights that do not fit are told of before there is a folder
    return dataset, validation, tokenizer, config


def start_run(config: PretrainConfig, world: World, dataset: Dataset, tokenizer: Tokenizer, checkpoint: str) -> "Run":
    """A run at its first step or, if `checkpoint` is not empty, where that (verified) checkpoint left it."""
    torch.manual_seed(config.seed)
    loader = make_loader(dataset, tokenizer, config, world)
    model = make_model(config, fresh=not checkpoint).to(world.device)
    if config.checkpoint_activations:
        checkpoint_activations(model)
    if config.compile:
        compile_step(model, world)
    parallel = parallelize(model, world, config.parallel)
    run = Run(config, world, parallel, make_optimizer(model, config, world.device), loader, tokenizer)
    if checkpoint:
        run.restore(Path(checkpoint))
        log.info("going on from %s", checkpoint)
    return run


class Run:
    """One run in progress, as one rank sees it."""

    def __init__(
        self,
        config: PretrainConfig,
        world: World,
        parallel: Parallel,
        optimizer: GuardedAdamW,
        loader: Loader,
        tokenizer: Tokenizer,
    ) -> None:
        self.config, self.world, self.parallel, self.optimizer = config, world, parallel, optimizer
        self.model = model = parallel.model
        self.loader, self.tokenizer, self.device = loader, tokenizer, world.device
        self.average = WeightAverage(model, config.ema_decay) if config.ema_decay else None
        self.guard = Guard(world, config.skip_spikes)
        self.bad = BadSteps(config.max_bad_steps)
        self.saver = Saver(config.out / "checkpoints", world, config.keep_checkpoints, config.keep_every_steps)
        self.watchdog = Watchdog(config.out, world.rank, config.stall_minutes)
        self.utilisation = Utilisation(config, world)
        self.numbers = Numbers()
        """Of the steps since the last line."""
        self.step = 0
        """Updates made or skipped."""
        self.best: dict[str, float] | None = None
        """Step and figure (the mean of both R@1) of the best evaluation."""

    def train(self, validation: Dataset | None) -> None:
        """Go on to `max_steps`, or until asked to stop, with checkpoints on the way and at the end."""
        config, world = self.config, self.world
        outputs = Outputs(config, self.step) if world.first else None
        lines = Lines(self, outputs)
        batches = iter(self.loader)
        wishes = Wishes(world)
        saved_at = evaluated_at = time.monotonic()
        with (
            outputs or nullcontext(),
            closing(self.loader),
            self.saver,
            self.watchdog,
            StopRequest(config.preemption_file) as stop,
            Progress(self.step, config.max_steps, shown=world.first) as progress,
        ):
            while self.step < config.max_steps:
                self.one_step(batches)
                lines.write(progress)  # of the step before: its numbers have come while this step was begun
                now = time.monotonic()
                save, evaluate, end = wishes.grant(
                    0 < 60 * config.checkpoint_every_minutes <= now - saved_at,
                    0 < 60 * config.eval_every_minutes <= now - evaluated_at,
                    stop.asked(),
                )
                figures = {}
                if validation is not None and (evaluate or self.due(config.eval_every_steps)):
                    figures = self.evaluate(validation, outputs)
                    evaluated_at = time.monotonic()
                if figures or self.due(config.log_every) or self.step == config.max_steps:
                    lines.close(figures)
                if save or end or self.due(config.checkpoint_every_steps) or self.step == config.max_steps:
                    lines.write(progress)  # a checkpoint never overtakes the lines of its steps
                    self.save()
                    saved_at = time.monotonic()
                if end:
                    break
            self.watchdog.beat("the last checkpoint")
            wishes.close()
            self.saver.wait()
            if self.saver.newest != self.saver.path(self.step):
                raise RunError(
                    f"{self.saver.path(self.step)}: could not be written (the reason is above), and the run ends here; "
                    f"older checkpoints are as they were: mend it and go on with --resume"
                )
            if self.step < config.max_steps:
                log.info("%s: saved at step %d, and stopped", stop.reason or "another rank", self.step)

    def due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    def one_step(self, batches: Iterator[tuple[Batch, Masks]]) -> None:
        """One update, or none where the guard forbids it. Its numbers stay on the device, in `self.numbers`."""
        self.watchdog.beat(f"the data of step {self.step + 1}")
        started = time.perf_counter()
        dealt = [next(batches) for _ in range(self.config.accumulate)]
        samples = [i for batch, _ in dealt for i in batch.sample_id.tolist()]
        tokens = sum(len(batch.tokens) for batch, _ in dealt)
        if self.config.compile:
            dealt = [bucketed(batch, masks, self.config.model.text_length) for batch, masks in dealt]
        micro = [(b.to(self.device, non_blocking=True), m.to(self.device, non_blocking=True)) for b, m in dealt]
        waited = time.perf_counter() - started
        self.watchdog.beat(f"step {self.step + 1}")
        factor = learning_rate_factor(self.step, self.config)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        losses = self.forward_backward(micro)
        norm, parts = gradient_norms(self.model)
        nn.utils.clip_grads_with_norm_(self.model.parameters(), self.config.clip_norm, norm)
        if self.step == self.config.reconstruction_first:  # ITC and ITM are in the loss from here on
            self.guard.begin_anew()
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
        values["temperature"] = (-whole(self.model.log_scale.detach()[0])).exp()
        self.numbers.add(self.step, samples, tokens, values, waited)

    def forward_backward(self, micro: list[Microbatch]) -> Losses:
        """The losses of the global batch, scalars; the gradients of their total are in the parameters' `grad`."""
        config = self.config
        return backward_global(
            self.parallel,
            micro,
            self.world,
            seed=config.seed,
            # As a number the step would be part of the compiled code, and each one compiled anew.
            step=torch.full((), self.step, device=self.device) if config.compile else self.step,
            plan=config.plan,
            reconstruction_only=self.step < config.reconstruction_first,
            local_negatives=config.local_negatives,
            autocast=partial(autocast, self.device, config.precision),
        )

    def check(self, numbers: Numbers) -> None:
        """Count the updates among `numbers` that were skipped. NonFiniteLossError when they are too many in a row."""
        past = self.bad.count(numbers)
        if past is None:
            return
        step, row, samples = past
        mine = [str(self.loader.dataset.keys[i]) for i in samples]
        keys = sorted(key for its in self.world.gather(mine) for key in its)
        more = f" and {len(keys) - 8} more" if len(keys) > 8 else ""
        self.saver.wait()
        raise NonFiniteLossError(
            f"step {step}: {self.bad.reason(row)}; the update was not made ({self.bad.in_a_row} in a row, "
            f"--max-bad-steps is {self.config.max_bad_steps}). Its samples: {', '.join(keys[:8])}{more}. "
            f"Last good checkpoint: {self.saver.newest or 'none'}; no checkpoint holds such an update. "
            f"Try a lower learning rate or --precision fp32"
        )

    def evaluate(self, validation: Dataset, outputs: Outputs | None) -> dict[str, float]:
        """Figures on the validation split, with the averaged weights where there are any."""
        self.watchdog.beat("the evaluation")
        with self.average.applied() if self.average is not None else nullcontext():
            model = whole_model(self.model)
            figures = evaluate_briefly(model, validation, self.tokenizer, self.config.precision)
            picture = strip(model, validation, self.tokenizer, self.config.precision)
        if outputs is not None:
            outputs.picture(picture, self.step)
        figure = (figures["tr_r1"] + figures["ir_r1"]) / 2
        if self.best is None or figure > self.best["figure"]:
            self.best = {"step": self.step, "figure": figure}
        return figures

    def save(self) -> None:
        """Begin a checkpoint of this step."""
        self.watchdog.beat("the checkpoint before")
        self.check(self.numbers)
        parts = {"model": self.model.state_dict(), "optimizer": optimizer_tensors(self.model, self.optimizer)}
        if self.average is not None:
            parts["ema"] = self.average.tensors
        loader = self.loader.state_dict()
        loader["skipped"] = sorted(set().union(*self.world.gather(loader["skipped"])))
        loader["met"] = loader["epoch"] * len(self.loader.dataset) + loader["position"]  # all ranks together
        state = {"loader": loader, "guard": self.guard.state(), "bad": self.bad.state(), "best": self.best}
        self.saver.save(self.step, self.model, parts, state, self.tokenizer)

    def restore(self, checkpoint: Path) -> None:
        """Go on from a verified checkpoint. RunError or DataError where another model, tokenizer or data made it."""
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
                f"{self.config.tokenizer or self.config.data}: wanted the tokenizer that the run was begun with, found "
                f"another; its own is {own}; put that one back in its place, or choose another --out"
            )
        self.saver.go_on_from(checkpoint)
        self.guard.load(state["guard"])
        self.bad.load(state["bad"])
        self.step, self.best = state["step"], state["best"]
