"""A run that goes on behind its end, or to a later end: `--extend-to` of a resumed run.

A step's learning rate is a function of the settings alone. So config.json gets the new end, and `extensions` the old
one if the rate falls before it.
"""

import logging
from dataclasses import replace
from typing import TypeVar

from mvlm.config.groups import RunConfig
from mvlm.config.json_files import read_config, run_config
from mvlm.errors import ConfigError
from mvlm.runs.checkpoint import step_of
from mvlm.runs.folder import RunFolder
from mvlm.runs.resume import checkpoint_to_resume
from mvlm.training.optimizer import cooldown_start

log = logging.getLogger(__name__)
Config = TypeVar("Config", bound=RunConfig)


def extended(config: Config) -> Config:
    """Settings of a resumed run whose end `--extend-to` moves; the settings as they are without that flag.

    A line of the log says how the learning rate goes on. The same command again, as torchrun gives it after a restart,
    extends nothing. ConfigError if there is no such run to extend, or if it ends later.
    """
    end = config.extend_to
    if end is None:
        return config
    folder = RunFolder(config.out)
    if not config.resume or not folder.config.is_file():
        raise ConfigError(f"extend_to: wanted a run in {config.out} to extend, with --resume; give both")
    found = run_config(read_config(folder.config), str(folder.config), type(config))
    before = replace(config, max_steps=found.max_steps, extensions=found.extensions)
    if before.max_steps == end:
        return before
    if config.max_steps not in (before.max_steps, *before.extensions) or end < before.max_steps:
        raise ConfigError(
            f"extend_to: wanted more steps than the {before.max_steps} of the run in {config.out}, and its own "
            f"--max-steps, got {end} and {config.max_steps}"
        )
    checkpoint = checkpoint_to_resume(folder, before.max_steps)
    reached = 0 if checkpoint is None else step_of(checkpoint)
    # Until it falls, the rate of wsd is the same for any end. So a run that is not so far has the longer run's rates.
    last = max(before.extensions, default=0)
    falls = config.schedule == "cosine" or reached > cooldown_start(before, last, before.max_steps)
    ends = (*before.extensions, before.max_steps) if falls else before.extensions
    longer = replace(before, max_steps=end, extensions=ends)
    log.info("%s: goes on to step %d with its moments; %s", config.out, end, describe(longer))
    return longer


def describe(config: RunConfig) -> str:
    """Say in words how the learning rate goes in the last part of a run."""
    start, end = max(config.extensions, default=0), config.max_steps
    last = f"to {100 * config.lr_end:g} % of it at step {end}"
    rises = f"the learning rate rises again to its peak in steps {start + 1} to {start + config.warmup_steps}"
    rises = rises if start else "the learning rate stays on its course"
    if config.schedule == "cosine":
        return f"{rises}, then falls along a cosine {last}"
    return f"{rises}, stays at its peak until step {cooldown_start(config, start, end)}, then falls {last}"
