"""Configurations from the JSON files that runs and models carry, every value checked against the type of its field."""

import difflib
import json
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from mvlm.config import MaskVLMConfig
from mvlm.errors import ConfigError, RunError
from mvlm.pretrain_config import FORMAT_VERSION, PretrainConfig


def model_config(values: Any, where: str) -> MaskVLMConfig:
    """The model configuration that `asdict` wrote to the file `where`.

    ConfigError for a name that this version does not know (with the nearest one it does) and for values that cannot be.
    """
    return _from_plain(MaskVLMConfig, values, where, "model setting")


def read_config(file: Path) -> dict[str, Any]:
    """The settings in a run's config.json; RunError when it cannot be read."""
    try:
        values = json.loads(file.read_text())
    except FileNotFoundError:
        raise RunError(f"{file}: wanted the configuration of a run, found no such file; check the path") from None
    except IsADirectoryError:
        raise RunError(f"{file}: wanted the configuration of a run, found a folder; name a config.json") from None
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"{file}: wanted the configuration of a run, got {error}") from None
    if not isinstance(values, dict):
        raise RunError(f"{file}: wanted the configuration of a run, got {type(values).__name__}")
    if values.get("format_version") != FORMAT_VERSION:
        raise RunError(
            f"{file}: wanted a configuration of version {FORMAT_VERSION}, got version {values.get('format_version')}; "
            f"use the mvlm that wrote it"
        )
    return values


def run_config(values: Any, where: str) -> PretrainConfig:
    """The configuration of a run, as its config.json `where` has it; ConfigError as for `model_config`."""
    if isinstance(values, dict):
        values = {name: value for name, value in values.items() if name != "format_version"}
        values |= {"model": model_config(values.get("model"), where)}
    return _from_plain(PretrainConfig, values, where, "setting")


def _from_plain(kind: type, values: Any, where: str, what: str) -> Any:
    """A dataclass from the plain values of a JSON file, each checked against the type of its field."""
    if not isinstance(values, dict):
        raise ConfigError(f"{where}: wanted the {what}s as a JSON object, got {values!r}")
    types = get_type_hints(kind)
    for name in values:
        if name not in types:
            near = difflib.get_close_matches(name, types, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(f"{where}: unknown {what} {name!r}{hint}")
    missing = [f.name for f in fields(kind) if f.name not in values and f.default is f.default_factory is MISSING]
    if missing:
        raise ConfigError(f"{where}: wanted the {what}s {', '.join(missing)}, found none")
    return kind(**{name: _of_type(types[name], value, f"{where}: {name}") for name, value in values.items()})


def _of_type(wanted: Any, value: Any, where: str) -> Any:
    """`value` as JSON has it, as the type `wanted` of a field; ConfigError where it is of another."""
    choices = get_args(wanted)
    if get_origin(wanted) is Literal:
        fits = value in choices
    elif type(None) in choices:  # Path | None
        return None if value is None else _of_type(choices[0], value, where)
    elif get_origin(wanted) is tuple:
        fits = isinstance(value, list | tuple) and len(value) == len(choices)
        value = tuple(_of_type(of, part, where) for of, part in zip(choices, value, strict=True)) if fits else value
    elif wanted is float:
        fits = isinstance(value, int | float) and not isinstance(value, bool)
    elif wanted is Path:
        fits = isinstance(value, str | Path)
        value = Path(value) if fits else value
    else:
        fits = type(value) is wanted
    if not fits:
        name = getattr(wanted, "__name__", str(wanted)) if not choices else str(wanted).replace("typing.", "")
        raise ConfigError(f"{where}: wanted {name}, got {value!r}")
    return value
