"""`mvlm bench run`: the real training loop against the bare step, in one process.

The contenders take turns on one model (`turns`). A ratio is the median of the ratios within a round, because the
machine's speed changes little during a round. Evaluations and checkpoints are too rare for turns: each is timed alone,
and its share is added to the loop's time as often as the run makes one.
"""

import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mvlm.config.pretrain import PretrainConfig
from mvlm.device import has_fast_bf16
from mvlm.distributed.world import World, join_ranks
from mvlm.errors import ConfigError
from mvlm.training.freed_memory import keep_freed_memory
from mvlm.training.run import build_run, build_trainer, open_inputs
from mvlm.training.trainer import CHECKPOINT_SECONDS, Trainer
from mvlm_benchmarks.intervals import ratio
from mvlm_benchmarks.machine import describe
from mvlm_benchmarks.results import heading, write_csv
from mvlm_benchmarks.run.turns import LEAD, LOOP, NO_LOADER, STEP, Turns, first_batches, measure_turns
from mvlm_benchmarks.run.usage import GROUPS
from mvlm_dataloading.files import write_json

RUN = "run"
"""Name of the contender that is the whole training loop, with evaluations and checkpoints."""
PACKAGES = ["numpy", "nvidia-dali-cuda130", "safetensors"]
Row = dict[str, Any]


def run(
    preset: str,
    data: Path,
    rounds: int,
    steps: int,
    *,
    eval_every_steps: int,
    threads: int = 0,
    json: Path | None = None,
    csv: Path | None = None,
) -> dict[str, Any]:
    """Measure, print a table and write files. Returns the content of the JSON file.

    `mvlm_benchmarks.cli.run` describes the arguments.

    Raises:
        ConfigError: a number is too small, or the recipe does not run here.
    """
    for option, value, least in (
        ("rounds", rounds, 1), ("steps", steps, 1), ("eval-every-steps", eval_every_steps, 1), ("threads", threads, 0),
    ):  # fmt: skip
        if value < least:
            raise ConfigError(f"{option}: wanted at least {least}, got {value}")
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        world = join_ranks("auto")
        keep_freed_memory(world.device.type)  # as `mvlm pretrain` does
        about = describe(world.device.type, PACKAGES) | {"figures": f"the training loop on {world.device.type}"}
        with tempfile.TemporaryDirectory(prefix="mvlm-bench-run-") as folder:
            config = PretrainConfig.preset(preset, data=data, out=Path(folder) / "run")
            setup = {
                "preset": preset, "data": data.name, "batch": config.batch_size, "rounds": rounds, "steps": steps,
                "threads": torch.get_num_threads(), "bf16": has_fast_bf16(world.device),
                "eval_every_steps": eval_every_steps, "checkpoint_minutes": CHECKPOINT_SECONDS / 60,
            }  # fmt: skip
            print(heading(about), flush=True)
            turns, rare = measure(config, world, rounds, steps)
    finally:
        torch.set_num_threads(before)
    rows = make_rows(turns, rare, config, eval_every_steps)
    print(table(rows), flush=True)
    result = {
        "machine": about, "setup": setup, "rows": rows, **rare, "run_over_step": rows[-1]["over_step"],
        "run_over_step_interval": [rows[-1]["over_step_low"], rows[-1]["over_step_high"]],
        "run_over_step_cpu": rows[-1]["cpu_over_step"],
    }  # fmt: skip
    if json is not None:
        write_json(json, result)
    if csv is not None:
        write_csv([setup | row for row in rows], about, csv, list(setup | rows[-1]))
    return result


def measure(
    config: PretrainConfig, world: World, rounds: int, steps: int
) -> tuple[dict[str, list[dict[str, float]]], dict[str, float]]:
    """Run the recipe in turns. Returns the turns' figures per step, and those of `time_rare_work`."""
    length = Turns((), steps, rounds).steps
    # Neither evaluates nor saves during the turns, but opens the validation split.
    config = replace(
        config, max_steps=length, warmup_steps=1, eval_every_steps=length + 1, checkpoint_every_steps=length + 1
    )
    with build_run(config, world, open_inputs, build_trainer) as trainer:
        batches = first_batches(trainer, LEAD + steps)
        turns = measure_turns(trainer, batches, steps, rounds)
        return turns, time_rare_work(trainer)


def time_rare_work(trainer: Trainer, repeats: int = 3) -> dict[str, float]:
    """Seconds and processor seconds of an evaluation and of a whole checkpoint, medians.

    The loop waits for an evaluation. Most of a checkpoint is written beside it.
    """
    validation = trainer.validation
    assert validation is not None

    def save() -> None:
        trainer.save()
        trainer.writer.wait()

    found = {}
    for name, work in (("evaluation", lambda: trainer.evaluate(validation, None)), ("checkpoint", save)):
        seconds, cpu = [], []
        for _ in range(repeats):
            started, started_cpu = time.perf_counter(), time.process_time()
            work()
            seconds.append(time.perf_counter() - started)
            cpu.append(time.process_time() - started_cpu)
        found |= {f"{name}_s": statistics.median(seconds), f"{name}_cpu_s": statistics.median(cpu)}
    return found


def make_rows(
    turns: dict[str, list[dict[str, float]]], rare: dict[str, float], config: PretrainConfig, eval_every_steps: int
) -> list[Row]:
    """One row per contender, and one for the whole run with its evaluations and checkpoints.

    Columns: `contender`; `pairs_per_s`; `over_step`, the speed over the bare step's, with a 95 % interval;
    `cpu_over_step`, the bare step's processor time over the contender's; and medians per step of all figures of the
    turns.
    """

    # A checkpoint is counted as if nothing trained beside it, which is the most that it can cost.
    def whole(row: dict[str, float], key: str, suffix: str) -> float:
        checkpoints = row["seconds"] / CHECKPOINT_SECONDS * rare[f"checkpoint_{suffix}"]
        return row[key] + checkpoints + rare[f"evaluation_{suffix}"] / eval_every_steps

    run_turns = [
        row | {"seconds": whole(row, "seconds", "s"), "cpu_s": whole(row, "cpu_s", "cpu_s")} for row in turns[LOOP]
    ]
    rows = []
    for name, figures in ((STEP, turns[STEP]), (NO_LOADER, turns[NO_LOADER]), (LOOP, turns[LOOP]), (RUN, run_turns)):
        over = ratio([[row["seconds"]] for row in turns[STEP]], [[row["seconds"]] for row in figures])
        medians = {key: statistics.median(row[key] for row in figures) for key in figures[0]}
        rows.append(
            {
                "contender": name,
                "pairs_per_s": config.batch_size / medians["seconds"],
                "over_step": over.value,
                "over_step_low": over.low,
                "over_step_high": over.high,
                "cpu_over_step": statistics.median(
                    mine["cpu_s"] / other["cpu_s"] for mine, other in zip(turns[STEP], figures, strict=True)
                ),
                **medians,
            }
        )
    return rows


def table(rows: list[Row]) -> str:
    """Table of speeds and, per step, of processor milliseconds by group of threads, page faults and switches."""
    heads = ("contender", "pairs/s", "over step", "95 %", "by cpu", "ms", "cpu ms", *GROUPS, "faults", "switches")
    lines = [f"{heads[0]:<20}" + "".join(f"{head:>{14 if head == '95 %' else 10}}" for head in heads[1:])]
    for row in rows:
        cells = [
            f"{row['pairs_per_s']:.1f}", f"{row['over_step']:.3f}",
            f"{row['over_step_low']:.3f}-{row['over_step_high']:.3f}", f"{row['cpu_over_step']:.3f}",
            *(f"{1e3 * row[name]:.1f}" for name in ("seconds", "cpu_s", *(f"cpu_{group}_s" for group in GROUPS))),
            f"{row['page_faults']:.0f}", f"{row['switches']:.0f}",
        ]  # fmt: skip
        widths = (10, 10, 14, *(10,) * (len(cells) - 3))
        lines.append(f"{row['contender']:<20}" + "".join(f"{cell:>{w}}" for cell, w in zip(cells, widths, strict=True)))
    return "\n".join(lines)
