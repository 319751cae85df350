"""`mvlm pretrain`: parse the settings; `mvlm.training.run.pretrain` then builds, trains and closes the run."""

from collections.abc import Sequence
from dataclasses import fields, make_dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any

from mvlm.commands.arguments import parse
from mvlm.config.model import MaskVLMConfig
from mvlm.config.pretrain import GROUPS, PretrainConfig

# Commands import what they need when they run, so that --help and errors are immediate.


def pretrain(arguments: Sequence[str]) -> None:
    """Pretrain a MaskVLM: `mvlm pretrain PRESET --data SHARDS --out RUN`. Presets: tiny, small, base.

    `mvlm pretrain --config FILE --out RUN` repeats the run whose config.json is FILE. Further settings override it.
    """
    if arguments and arguments[0] in ("-h", "--help"):
        print(f"{pretrain.__doc__}\nAll settings of a preset: mvlm pretrain PRESET --help")
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
    from mvlm.config.model import PRESETS
    from mvlm.config.recipes import pretrain_defaults
    from mvlm.errors import ConfigError

    if arguments and arguments[0].startswith("--config="):
        arguments = ["--config", arguments[0].removeprefix("--config="), *arguments[1:]]
    first = arguments[0] if arguments else ""
    if first == "--config" and len(arguments) > 1:
        source, rest = arguments[1], arguments[2:]
        values = read_config(Path(source))
        if "task" in values:
            raise ConfigError(f"{source}: wanted the configuration of a pretraining run, found one of fine-tuning")
        defaults = run_config(values, source)
    elif first.startswith("-") or not first:
        got = repr(first) if first else "nothing"
        if first == "--config":
            got = "--config with no file after it"
        raise ConfigError(f"wanted a preset after `mvlm pretrain`: {', '.join(PRESETS)}, or --config FILE; got {got}")
    else:
        defaults, source, rest = pretrain_defaults(first, data=tyro.MISSING, out=tyro.MISSING), first, arguments[1:]
    description = f"Pretrain with the `{source}` recipe. The defaults below are that recipe's."
    settings = parse_settings(rest, f"mvlm pretrain {source}", description, defaults, GROUPS, with_model=True)
    try:
        return PretrainConfig(**settings)
    except ConfigError as error:
        raise ConfigError(f"{error}; see `mvlm pretrain {source} --help`") from None


def parse_settings(
    words: Sequence[str],
    prog: str,
    description: str,
    defaults: PretrainConfig,
    groups: tuple[type, ...],
    with_model: bool = False,
) -> dict[str, Any]:
    """Settings of all groups by name, parsed from the command line. `with_model` adds the model's, as `model`."""
    values, grouped = vars(defaults), _grouped_type(groups, with_model)
    boxes = {_title(group): group(**{f.name: values[f.name] for f in fields(group)}) for group in groups}
    model = {"model": defaults.model} if with_model else {}
    parsed = parse(grouped, words, prog=prog, description=description, default=grouped(**boxes, **model))
    settings = {name: value for group in groups for name, value in vars(getattr(parsed, _title(group))).items()}
    return settings | ({"model": parsed.model} if with_model else {})


@cache
def _grouped_type(groups: tuple[type, ...], with_model: bool) -> type:
    """A dataclass with one field for each group of settings and one for the model. Each becomes a box in --help.

    The flags of a group have no prefix (--seed); those of the model have one (--model.width).
    """
    import tyro

    boxes: list[tuple[str, Any]] = [(_title(group), Annotated[group, tyro.conf.OmitArgPrefixes]) for group in groups]
    model: list[tuple[str, Any]] = [("model", MaskVLMConfig)] if with_model else []
    return make_dataclass("Settings", [*boxes, *model], frozen=True, kw_only=True)


def _title(group: type) -> str:
    """The title of a group's box: RunSettings -> run, TaskOptions -> task."""
    return group.__name__.removesuffix("Settings").removesuffix("Options").lower()
