"""`mvlm pretrain`: parse the settings; `mvlm.training.run.pretrain` then builds, trains and closes the run."""

import shlex
from collections.abc import Sequence
from dataclasses import fields, make_dataclass, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_type_hints

from mvlm.commands.arguments import parse
from mvlm.config.groups import RunConfig, groups_of
from mvlm.config.model import MaskVLMConfig
from mvlm.config.pretrain import PretrainConfig
from mvlm.config.ranges import NO_FLAG
from mvlm.errors import ConfigError
from mvlm.terminal import say

Config = TypeVar("Config", bound=RunConfig)

# Commands import what they need when they run, so that --help and errors are immediate.


def pretrain(arguments: Sequence[str]) -> None:
    """Pretrain a MaskVLM: `mvlm pretrain PRESET --data SHARDS --out RUN`.

    Presets: tiny, small, base; clip-3m, clip-12m and clip-400m, for millions of pairs. `mvlm doctor --data SHARDS`
    suggests one. `mvlm pretrain --config FILE --out RUN` repeats the run whose config.json is FILE. Further settings
    override it.
    """
    if arguments and arguments[0] in ("-h", "--help"):
        say(f"{pretrain.__doc__}\nAll settings of a preset: mvlm pretrain PRESET --help")
        return
    config = parse_config(arguments)
    from mvlm.training.freed_memory import keep_freed_memory
    from mvlm.training.run import pretrain as run

    keep_freed_memory(config.device)
    run(config)


def parse_config(arguments: Sequence[str]) -> PretrainConfig:
    """The configuration of a preset or of a config.json, overridden by the given settings.

    Raises:
        ConfigError: the preset is unknown, or a setting is misspelt or out of its range.
        RunError: the config.json cannot be read.
    """
    import tyro

    from mvlm.config.json_files import read_config, run_config
    from mvlm.config.pretrain import RECIPES

    source, rest = split_config(arguments)
    first = rest[0] if rest else ""
    if source is not None:
        values = read_config(Path(source))
        if "task" in values:
            raise ConfigError(
                f"{source}: wanted the configuration of a pretraining run, found one of fine-tuning; give it to "
                "`mvlm finetune --config`"
            )
        defaults = run_config(values, source)
    elif first.startswith("-") or not first:
        got = repr(first) if first else "nothing"
        raise ConfigError(f"wanted a preset after `mvlm pretrain`: {', '.join(RECIPES)}, or --config FILE; got {got}")
    else:
        defaults = PretrainConfig.preset(first, data=tyro.MISSING, out=tyro.MISSING)
        source, rest = first, arguments[1:]
        defaults = with_trained_model(defaults, rest)
    defaults = with_tower(defaults, rest)
    description = f"Pretrain with the `{source}` recipe. The defaults below are that recipe's."
    named = {name: getattr(defaults, name) for name in ("own_loss", "own_masks")}
    # A config.json may be somebody else's, and names no code to run: the user names it again.
    defaults = replace(defaults, **dict.fromkeys(named))
    found = parse_settings(rest, f"mvlm pretrain {source}", description, defaults, with_model=True)
    for name, before in named.items():
        given = getattr(found, name)
        if before is not None and given is None:
            flag = f"--{name.replace('_', '-')}"
            raise ConfigError(f"{source}: wanted {flag}, as its run has, found none; give {flag} {shlex.quote(before)}")
        if given != before:
            found = replace(found, **{f"{name}_sha256": None})
    return found


def split_config(words: Sequence[str]) -> tuple[str | None, Sequence[str]]:
    """Split off a leading `--config FILE` from arguments: (FILE, the other arguments), or (None, all of them).

    ConfigError for the flag without a file.
    """
    if words and words[0].startswith("--config="):
        words = ["--config", words[0].removeprefix("--config="), *words[1:]]
    if not words or words[0] != "--config":
        return None, words
    if not "".join(words[1:2]):
        raise ConfigError("config: wanted the config.json of a run behind --config, found none; name it")
    return words[1], words[2:]


def with_trained_model(defaults: PretrainConfig, words: Sequence[str]) -> PretrainConfig:
    """`defaults` with the model settings of the trained model that `--initial-model` names in `words`.

    Other flags are read afterwards and override them. If the run folder `--out` has a config.json, its model settings
    are taken instead: a run that has begun does not need the initial model any more.

    words: arguments of the command line.
    """
    source, out = (_value(words, flag) for flag in ("--initial-model", "--out"))
    if not source:
        return defaults
    from mvlm.config.json_files import read_config, run_config
    from mvlm.runs.folder import RunFolder
    from mvlm.runs.load import read_architecture_of

    begun = RunFolder(Path(out or "")).config
    if out and begun.is_file():
        return replace(defaults, model=run_config(read_config(begun), str(begun)).model)
    return replace(defaults, model=read_architecture_of(Path(source))[0])


def with_tower(defaults: PretrainConfig, words: Sequence[str]) -> PretrainConfig:
    """`defaults` with the settings that suit the image tower named by `--model.image-tower` in `words`.

    Other flags of the command line are read afterwards and override them. Returns `defaults` if no tower is named.

    words: arguments of the command line.
    """
    tower, side = (_value(words, f"--model.{name}") for name in ("image-tower", "image-size"))
    if not tower or tower == defaults.model.image_tower:
        return defaults
    from mvlm.model.towers.timm_tower import tower_settings

    settings = tower_settings(tower, int(side) if side and side.isdecimal() else None)
    return replace(defaults, model=replace(defaults.model, **settings))


def _value(words: Sequence[str], flag: str) -> str | None:
    """Value of a flag in a command's arguments, from FLAG VALUE or FLAG=VALUE; None if the flag is not there."""
    for word, following in pairwise([*words, ""]):
        name, equals, value = word.partition("=")
        if name.replace("_", "-") == flag:
            return value if equals else following
    return None


def parse_settings(
    words: Sequence[str], prog: str, description: str, defaults: Config, with_model: bool = False
) -> Config:
    """Parse a command's arguments as settings that override `defaults`.

    Each group of settings is a box in --help. Settings without a flag keep their defaults. With `with_model`, settings
    of the model have flags too, as --model.NAME.
    """
    import tyro

    boxes: list[tuple[str, Any]] = [
        (_title(group), Annotated[_shown(group), tyro.conf.OmitArgPrefixes]) for group in groups_of(type(defaults))
    ]
    values = {_title(group): _shown(group)(**_values(group, defaults)) for group in groups_of(type(defaults))}
    if with_model:
        boxes.append(("model", _shown(MaskVLMConfig)))
        values["model"] = _shown(MaskVLMConfig)(**_values(MaskVLMConfig, defaults.model))
    grouped = make_dataclass("Settings", boxes, frozen=True, kw_only=True)
    parsed = parse(grouped, words, prog=prog, description=description, default=grouped(**values))
    found: dict[str, Any] = {"model": defaults.model}
    for group in groups_of(type(defaults)):
        found |= _values(group, getattr(parsed, _title(group)))
    if with_model:
        found["model"] = MaskVLMConfig(**_values(MaskVLMConfig, parsed.model))
    try:
        return type(defaults)(**found)
    except ConfigError as error:
        raise ConfigError(f"{error}; see `{prog} --help`") from None


@cache
def _shown(group: type) -> type:
    """Subclass of a dataclass of settings in which tyro hides the settings without a flag and keeps their values."""
    import tyro

    types = get_type_hints(group, include_extras=True)
    hidden = [
        (name, Annotated[kind, tyro.conf.Fixed, tyro.conf.Suppress])
        for name, kind in types.items()
        if NO_FLAG in getattr(kind, "__metadata__", ())
    ]
    return make_dataclass(group.__name__, hidden, bases=(group,), frozen=True, kw_only=True) if hidden else group


def _values(group: type, of: object) -> dict[str, Any]:
    return {field.name: getattr(of, field.name) for field in fields(group)}


def _title(group: type) -> str:
    """Title that a group of settings has in --help, from its class's name: RunSettings -> run, TaskOptions -> task."""
    return group.__name__.removesuffix("Settings").removesuffix("Options").lower()
