"""FLOPs and time of an update, which a budget of a study buys: counted, and measured on this machine."""

import logging
import statistics
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import cache
from itertools import zip_longest
from pathlib import Path

import torch
from filelock import FileLock
from torch.utils.flop_counter import FlopCounterMode

from mvlm.config.model import MaskVLMConfig
from mvlm.config.pretrain import PretrainConfig
from mvlm.costs.mfu import flops_per_pair, part_settings
from mvlm.costs.step_cost import StepShape, counted, drawn_tokens, fake_step
from mvlm.distributed.world import join_ranks
from mvlm.errors import ConfigError
from mvlm.machine import processor_name
from mvlm.objectives.pretraining import objectives_of
from mvlm.schemas import StepTimes
from mvlm.training.optimizer import make_optimizer
from mvlm.training.run import build_run, build_trainer, open_inputs
from mvlm.untrusted import read_json
from mvlm_dataloading.files import write_json

log = logging.getLogger(__name__)
FILE = "step_times.json"
WARM, TURNS, STEPS = 20, 8, 5
"""Warm-up steps of each arm, turns that are timed, and steps of a turn; the arms take turns."""


def update_flops(config: PretrainConfig, tokens: float, model: MaskVLMConfig | None = None) -> float:
    """Count the FLOPs of a training step: the whole batch forward and backward, and the optimizer's matrix products.

    Muon multiplies matrices, AdamW does not. Only parameters that the objectives give a gradient are updated.

    Args:
        tokens: mean number of tokens of a caption.
        model: settings of the model in the stage of the update. Default: the run's.
    """
    step = flops_per_pair(config, tokens, model=model) * config.batch_size
    return step + _optimizer_flops(replace(config, seed=0))


def steps_and_flops(config: PretrainConfig, tokens: float, budget: Mapping[str, float]) -> tuple[int, float]:
    """Updates of a run, and their FLOPs: as many as {"steps": N}, or as {"flops": X} pays, stage by stage.

    ConfigError if it pays none, or none of the last stage.
    """
    steps, spent = 0, 0.0
    for stage, following in zip_longest(config.parsed_stages, config.parsed_stages[1:]):
        each = update_flops(config, tokens, stage.model)
        most = int(budget["steps"]) - steps if "steps" in budget else int((budget["flops"] - spent) / each)
        made = max(0, most if following is None else min(most, following.start - steps))
        if not made:
            after = f" behind the {steps} before its stage" if steps else ""
            raise ConfigError(
                f"budget: wanted enough for one step of {each:.3g} FLOPs{after}, got {budget['flops']:.3g}; raise it"
            )
        steps, spent = steps + made, spent + made * each
    return steps, spent


@cache
def _optimizer_flops(config: PretrainConfig) -> int:
    shape = StepShape(pairs=2, parts=part_settings(config))
    with fake_step(config.model, shape, objectives_of(config)) as (model, step):
        counted(model, step, drawn_tokens(config.model, shape), shape)
        optimizer = make_optimizer(model, config, torch.device("cpu"))
        with FlopCounterMode(display=False) as counter:
            optimizer.step()
    return counter.get_total_flops()


def step_times(configs: Mapping[str, PretrainConfig], out: Path) -> dict[str, float]:
    """Seconds of a training step of each arm, read from `out`/step_times.json; missing ones are measured and added.

    Trials are planned with these times, so a time in the file is not measured again. A new arm is measured in turns
    with one of the file; its time is scaled so that their ratio is the measured one.
    """
    out.mkdir(parents=True, exist_ok=True)
    file = out / FILE
    with FileLock(out / f".{FILE}.lock"):
        known: dict[str, float] = {}
        if file.exists():
            known = read_json(file, "figures", "times of steps", StepTimes)["seconds"]
        if missing := [arm for arm in configs if arm not in known]:
            log.info("measuring a step of %s", ", ".join(missing))
            first = next((arm for arm in configs if arm in known), None)
            found = measure_steps({arm: configs[arm] for arm in (*([first] if first else []), *missing)})
            scale = known[first] / found[first] if first else 1.0
            known |= {arm: found[arm] * scale for arm in missing}
            machine = torch.cuda.get_device_name() if torch.cuda.is_available() else processor_name()
            write_json(file, {"machine": machine, "threads": torch.get_num_threads(), "seconds": known})
    return {arm: known[arm] for arm in configs}


def measure_steps(configs: Mapping[str, PretrainConfig]) -> dict[str, float]:
    """Measure the median seconds of a training step of each configuration, in turns in this process.

    Processor time on a CPU, so that neighbours on the machine do not count; time on the clock on a GPU.
    """
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        trainers = []
        for number, config in enumerate(configs.values()):
            alone = replace(config, out=Path(folder, str(number)), max_steps=10_000, resume=False)
            trainer = stack.enter_context(build_run(alone, join_ranks(config.device), open_inputs, build_trainer))
            stack.enter_context(trainer.watchdog)
            trainers.append((trainer, iter(trainer.loader)))
        seconds: list[list[float]] = [[] for _ in trainers]
        clock = time.perf_counter if torch.cuda.is_available() else time.process_time
        for turn in range(WARM // STEPS + TURNS):
            for (trainer, batches), found in zip(trainers, seconds, strict=True):
                begun = clock()
                for _ in range(STEPS):
                    trainer.one_step(batches)
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                if turn >= WARM // STEPS:
                    found.append((clock() - begun) / STEPS)
    return {arm: statistics.median(found) for arm, found in zip(configs, seconds, strict=True)}
