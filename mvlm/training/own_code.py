"""Python code of the user's own that a run calls: a function or objective named as `FILE.py:NAME`, or `MODULE:NAME`.

NOTE: naming it runs it. So a name comes from the user of this process, as a flag, an argument or a study's file, and
never from a config.json alone, which may be somebody else's.
"""

import importlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from mvlm.config.groups import RunConfig
from mvlm.errors import ConfigError, RunError
from mvlm.objectives.pretraining import OwnLoss
from mvlm.objectives.step import Objective
from mvlm_dataloading.files import sha256

SETTINGS = ("own_loss", "own_masks")
"""Settings that name a function. `NAME_sha256` is the hash of its file."""
Config = TypeVar("Config", bound=RunConfig)


def run_file(file: Path) -> ModuleType:
    """Run a Python file and return it as a module. ConfigError if there is no such file."""
    if not file.is_file():
        raise ConfigError(f"{file}: wanted a Python file with a task, found no such file; check the path")
    spec = importlib.util.spec_from_file_location(f"task file {file.resolve()}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module  # dataclasses look their annotations up there
    spec.loader.exec_module(module)
    return module


def file_of(setting: str, name: str) -> Path:
    """File in which the function `FILE.py:NAME` or `MODULE:NAME` is defined. ConfigError if there is none.

    The file is not run, but the packages around a module are. setting: for messages.
    """
    place, _, function = name.rpartition(":")
    if not place or not function.isidentifier():
        raise ConfigError(f"{setting}: wanted FILE.py:NAME or MODULE:NAME, got {name}")
    if place.endswith(".py"):
        found = Path(place)
    else:
        try:
            spec = importlib.util.find_spec(place)
        except (ImportError, ValueError):
            spec = None
        found = Path((spec and spec.origin) or "")
    if not found.is_file():
        raise ConfigError(f"{setting}: wanted a Python file or a module, found no {place}; name FILE.py:{function}")
    return found


def find_own(setting: str, name: str) -> Any:
    """Function or objective that `FILE.py:NAME` or `MODULE:NAME` names; the file is run. ConfigError if there is none.

    setting: for messages, and "own_loss" allows an objective.
    """
    file, (place, _, function) = file_of(setting, name), name.rpartition(":")
    module = run_file(file) if place.endswith(".py") else importlib.import_module(place)
    found = getattr(module, function, None)
    good = isinstance(found, Objective) if setting == "own_loss" else False
    if not good and (not callable(found) or isinstance(found, type)):
        kinds = "a function, or an objective such as Mine(0.5)," if setting == "own_loss" else "a function"
        what = "nothing" if found is None else f"a {type(found).__name__}"
        raise ConfigError(f"{setting}: wanted {kinds} of the name {function} in {file}, found {what}; define it there")
    return found


def with_hashes(config: Config) -> Config:
    """The configuration with the SHA-256 of the files of the user's own functions.

    The files are run: errors show early. ConfigError for a function that is not there, or a file with another hash than
    the configuration has.
    """
    hashes: dict[str, str | None] = {}
    for setting in SETTINGS:
        name, known = getattr(config, setting), getattr(config, f"{setting}_sha256")
        hashes[f"{setting}_sha256"] = found = None if name is None else sha256(file_of(setting, name))
        if name is not None and known not in (None, found):
            raise ConfigError(
                f"{setting}: wanted the file of the run, sha256 {known[:12]}, found {found and found[:12]} in {name}; "
                f"restore the file"
            )
        if name is not None:
            find_own(setting, name)
    return replace(config, **hashes)


def with_named(config: Config, place: Path, named: dict[str, str | None]) -> Config:
    """Put the functions that the user has named into the settings of a run, in place of those of its config.json.

    A config.json alone names no code to run. RunError unless the functions are those that the run has.

    Args:
        place: folder of the config.json, for messages.
        named: setting -> name of the function, or None.
    """
    for setting, given in named.items():
        wanted, flag = getattr(config, setting), f"--{setting.replace('_', '-')}"
        if (wanted is None) != (given is None):
            raise RunError(
                f"{place}: wanted {flag} {wanted or ''}, as its config.json has, to make its steps again, "
                f"found {given or 'none'}; {'leave it out' if wanted is None else 'give it, if you trust that file'}"
            )
        if given is not None and wanted is not None:
            hashed = getattr(config, f"{setting}_sha256") is not None
            if not hashed or given.rpartition(":")[2] != wanted.rpartition(":")[2]:
                raise RunError(f"{place}: wanted {flag} {wanted} with its hash, found {given}; give that one")
    return replace(config, **named)


def own_objective(config: RunConfig) -> tuple[Objective, ...]:
    """The objective of --own-loss, if the run has one."""
    if config.own_loss is None:
        return ()
    found = find_own("own_loss", config.own_loss)
    return (found if isinstance(found, Objective) else OwnLoss(function=found),)


def own_masks(config: RunConfig) -> Callable[..., Any] | None:
    """The function of --own-masks, if the run has one."""
    return None if config.own_masks is None else find_own("own_masks", config.own_masks)
