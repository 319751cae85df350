"""Processor time of a step of some arms of a study, in turns in one process, beside their FLOPs.

    OMP_NUM_THREADS=1 python studies/arm_seconds.py studies/scenes.toml data/masking/mix ARM ARM ...

The first arm is the one that the others are compared with.
"""

import argparse
import statistics
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from mvlm.config.pretrain import PretrainConfig
from mvlm.distributed.world import join_ranks
from mvlm.studies.run import trials_of
from mvlm.studies.study import read_study, trial_config
from mvlm.training.run import build_run, build_trainer, open_inputs

WARM, TURNS, STEPS = 20, 8, 5
"""Steps of each arm before the measurement, turns, and steps of a turn."""


def main() -> None:
    """Print a row for each arm."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("arms", nargs="+")
    options = parser.parse_args()
    study = read_study(options.study)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        planned = {t.arm: t.flops / t.config.max_steps for t in trials_of(study, options.data, Path(folder)) if t.flops}
        runs = []
        for number, arm in enumerate(options.arms):
            config = trial_config(study, arm, 0, options.data, Path(folder, str(number)), 10_000)
            assert isinstance(config, PretrainConfig)
            trainer = stack.enter_context(build_run(config, join_ranks("cpu"), open_inputs, build_trainer))
            stack.enter_context(trainer.watchdog)
            runs.append((trainer, iter(trainer.loader)))
        seconds: list[list[float]] = [[] for _ in runs]
        for turn in range(WARM // STEPS + TURNS):
            for (trainer, batches), found in zip(runs, seconds, strict=True):
                begun = time.process_time()
                for _ in range(STEPS):
                    trainer.one_step(batches)
                if turn >= WARM // STEPS:
                    found.append((time.process_time() - begun) / STEPS)
        medians = [statistics.median(found) for found in seconds]
        for arm, median in zip(options.arms, medians, strict=True):
            flops = planned[arm] / planned[options.arms[0]]
            print(f"{median:.3f} s a step, {median / medians[0]:.2f} of the first, FLOPs {flops:.2f}: {arm}")


if __name__ == "__main__":
    main()
