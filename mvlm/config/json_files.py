"""JSON files of models and runs: reading and writing configurations, with every value checked against its type."""

import difflib
import json
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, get_args, get_origin, get_type_hints

from mvlm.config.finetune import FinetuneConfig, TaskOptions
from mvlm.config.groups import RunConfig, resume_may_change
from mvlm.config.model import MaskVLMConfig
from mvlm.config.pretrain import PretrainConfig
from mvlm.errors import ConfigError, RunError
from mvlm.untrusted import read_json
from mvlm_dataloading.urls import is_remote, normal_url

Config = TypeVar("Config", bound=RunConfig)
RENAMED_FIELDS = {"eval_pictures": "eval_images"}
"""Settings of version 2 that have another name in version 3."""
FORMAT_VERSION = 3
"""Format of config.json. Version 3 renamed `eval_pictures` to `eval_images` and the backend `products` to `math`."""


class Removed(NamedTuple):
    """A setting that earlier versions had and this one has not."""

    default: Any
    """Default of the setting in those versions, as in JSON."""
    last: str
    """The last version that had it."""
    free: bool = False
    """True if a resumed run could change it. A file is then read whatever value it has."""


REMOVED = {
    "checkpoint_every_minutes": Removed(10.0, "0.2.0", free=True),
    "eval_every_minutes": Removed(0.0, "0.2.0", free=True),
    "keep_every_steps": Removed(0, "0.2.0", free=True),
    "candidates": Removed(128, "0.2.0"),
    "color_jitter": Removed(0.0, "0.2.0"),
    "generate": Removed(False, "0.2.0"),
    "local_negatives": Removed(False, "0.2.0"),
    "low_resolution": Removed(0, "0.2.0"),
    "low_resolution_share": Removed(0.85, "0.2.0"),
    "order": Removed("mask-predict", "0.2.0"),
    "reconstruction_first": Removed(0, "0.2.0"),
    "skip_spikes": Removed(False, "0.2.0"),
    "model.complementary_masks": Removed(False, "0.2.0"),
    "model.extra_captions": Removed(0, "0.2.0"),
    "model.extra_caption_weight": Removed(1.0, "0.2.0"),
    "model.image_masking": Removed("fixed", "0.2.0"),
    "model.partner_image_mask_ratio": Removed(0.0, "0.2.0"),
    "model.partner_text_mask_ratio": Removed(0.0, "0.2.0"),
    "model.pixel_initialization": Removed("normal", "0.2.0"),
    "model.text_masking": Removed("fixed", "0.2.0"),
    "model.text_pooling": Removed(False, "0.2.0"),
}
"""Settings that are gone, by name; those of the model begin with `model.`. A file that has one at its default is read
without it. At another value it is refused, if the run or the model would be another one."""
SERVICES = ("wandb", "trackio")
"""Boolean settings of earlier versions that have become values of `log_to`."""
CAPTURES = {"compile": "compile", "cuda_graphs": "cuda-graphs"}
"""Boolean settings of earlier versions, at most one of which was true, and the value of `capture` that replaces each.
"""
_PRETRAINING = {f.name: f.default for f in fields(PretrainConfig) if f.name not in FinetuneConfig.__dataclass_fields__}
_NOT_OF_TASKS = _PRETRAINING | {"lr_pixels": 0.0, "compile": False, "cuda_graphs": False}
"""Settings that the config.json of a fine-tuning run had, always with these values, although nothing read them."""
_FROZEN = {"none": (), "encoders": ("image", "text"), "all": ("image", "text", "cross")}
"""Values of the setting `freeze` of earlier versions -> the parts of the model that it froze."""
_KEPT = Removed(object(), "")
_DECODER = Removed("decoder", "0.2.0")
"""Value of `answers` that was its default in earlier versions, for another form of vqa. Other tasks do not read the
setting."""


def model_config(values: Any, where: str) -> MaskVLMConfig:
    """Make a model's configuration from the values of a JSON file; `where` names the file in errors.

    ConfigError for an unknown name (with the nearest known one), a missing setting, an invalid value, and for a setting
    that is gone, unless it has its default.
    """
    return _from_json(MaskVLMConfig, values, where, "model setting", "model.")


def read_model_config(file: Path) -> MaskVLMConfig:
    """Read the configuration of a model from its JSON file. RunError, which names the file once, if it is not one."""
    try:
        return model_config(read_json(file, "settings", "the settings of a MaskVLM"), str(file))
    except ConfigError as error:
        raise RunError(str(error)) from None


def read_config(file: Path) -> dict[str, Any]:
    """Read a run's config.json of version 2 or 3, without settings that are gone and have their default.

    RunError for a file that is missing, not readable or of another version.
    """
    from mvlm.schemas import RunSettings

    try:
        values = read_json(file, "settings", "the configuration of a run", RunSettings)
    except OSError as error:
        raise RunError(
            f"{file}: wanted the configuration of a run, could not read it ({error.strerror}); check the path"
        ) from None
    version = values["format_version"]
    if version == 2:
        values = upgrade_version_2(values)
    elif version != FORMAT_VERSION:
        raise RunError(
            f"{file}: wanted a configuration of version 2 or {FORMAT_VERSION}, got version {version}; "
            f"use the mvlm that wrote it"
        )
    for name in ("data", "also_evaluate"):  # versions before 0.4 kept passwords there
        if isinstance(values.get(name), str) and is_remote(values[name]):
            values[name] = normal_url(values[name])
    model = values.get("model")
    return without_removed(values) | ({"model": without_removed(model, "model.")} if isinstance(model, dict) else {})


def without_removed(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A copy of `values`, settings of an older file, without those that are gone and have their default.

    Settings of fine-tuning, which name a `task`, also lose those of pretraining that such files had and nothing read.
    `wandb` and `trackio` become `log_to`; `compile` and `cuda_graphs` become `capture`; `freeze` becomes `train_image`
    and so on. A partner that was masked by the same ratio as the masks becomes `mask_partner`.

    prefix: `model.` if these are the settings of a model, else empty.
    """
    if not prefix and isinstance(values.get("freeze"), str) and values["freeze"] in _FROZEN:
        values = dict(values)
        values |= {f"train_{part}": "frozen" for part in _FROZEN[values.pop("freeze")]}
    if "task" in values:
        values = {n: v for n, v in values.items() if n not in _NOT_OF_TASKS or v != _NOT_OF_TASKS[n]}
    if not prefix and any(isinstance(values.get(name), bool) for name in SERVICES):
        log_to = [name for name in SERVICES if values.get(name) is True]
        values = {n: v for n, v in values.items() if n not in SERVICES} | {"log_to": log_to}
    if not prefix and any(isinstance(values.get(name), bool) for name in CAPTURES):
        chosen = [capture for name, capture in CAPTURES.items() if values.get(name) is True] or ["none"]
        values = {n: v for n, v in values.items() if n not in CAPTURES} | {"capture": chosen[0]}
    names = ("partner_image_mask_ratio", "partner_text_mask_ratio", "image_mask_ratio", "text_mask_ratio")
    *partners, image, text = (f"model.{name}".removeprefix(prefix) for name in names)
    if values.get(image) and [values.get(name) for name in partners] == [values.get(image), values.get(text)]:
        values = {name: value for name, value in values.items() if name not in partners}
        values |= {"model.mask_partner".removeprefix(prefix): True}
    if values.get("answers") == _DECODER.default and values.get("task", "vqa") != "vqa":
        values = {name: value for name, value in values.items() if name != "answers"}
    found = {name: REMOVED.get(f"{prefix}{name}", _KEPT) for name in values}
    return {name: v for name, v in values.items() if not found[name].free and found[name].default != v}


def check_removed(values: dict[str, Any], where: str, prefix: str = "") -> None:
    """Raise ConfigError for a setting that is gone. where: name of the file, for the message.

    values: as `without_removed` returns them.
    """
    for name, value in values.items():
        if (gone := REMOVED.get(f"{prefix}{name}")) is not None:
            raise ConfigError(
                f"{where}: {prefix}{name}: wanted its default, {json.dumps(gone.default)}, as the setting is gone, got "
                f"{json.dumps(value, default=str)}; mvlm {gone.last} is the last version that has it"
            )
    if not prefix and values.get("answers") == _DECODER.default:
        raise ConfigError(
            f"{where}: answers: wanted classifier or masked, got decoder, which is gone; mvlm {_DECODER.last} is the "
            f"last version that has it"
        )


def upgrade_version_2(values: dict[str, Any]) -> dict[str, Any]:
    """Rename the settings and values of a config.json of version 2 as in version 3."""
    values = {RENAMED_FIELDS.get(name, name): value for name, value in values.items()}
    for name in ("self_attention", "cross_attention"):
        if values.get(name) == "products":
            values[name] = "math"
    return values | {"format_version": FORMAT_VERSION}


def run_config(values: Any, where: str, kind: type[Config] = PretrainConfig) -> Config:
    """Make a run's configuration from the values of a config.json; `where` and errors are as for `model_config`.

    Args:
        kind: class of the configuration: that of pretraining or of fine-tuning.
    """
    if isinstance(values, dict):
        values = {name: value for name, value in values.items() if name != "format_version"}
        values |= {"model": model_config(values.get("model"), where)}
    return _from_json(kind, values, where, "setting")


def task_options(values: dict[str, Any], task: str, where: str) -> TaskOptions:
    """Make the options of a task from those in a checkpoint; `where` and errors are as for `model_config`."""
    values = without_removed(values | {"task": task})
    return _from_json(TaskOptions, {name: x for name, x in values.items() if name != "task"}, where, "option")


def _from_json(kind: type, values: Any, where: str, what: str, prefix: str = "") -> Any:
    """Make a dataclass of settings from the values of a JSON file, each checked against the type of its field.

    Args:
        kind: the dataclass.
        where: name of the file, for errors.
        what: noun for one of its fields, for errors.
        prefix: as for `without_removed`.
    """
    if not isinstance(values, dict):
        raise ConfigError(f"{where}: wanted the {what}s as a JSON object, got {values!r}")
    values, types = without_removed(values, prefix), get_type_hints(kind)
    check_removed(values, where, prefix)
    for name in values:
        if name not in types:
            raise ConfigError(f"{where}: unknown {what} {name!r}{_meant(name, kind)}")
    missing = [f.name for f in fields(kind) if f.name not in values and f.default is f.default_factory is MISSING]
    if missing:
        raise ConfigError(f"{where}: wanted the {what}s {', '.join(missing)}, found none")
    checked = {name: _checked(types[name], value, f"{where}: {name}") for name, value in values.items()}
    try:
        return kind(**checked)
    except ConfigError as error:  # of a range, or of settings that do not fit each other
        raise ConfigError(f"{where}: {error}") from None


def _meant(name: str, kind: type) -> str:
    """Hint for an unknown setting of a dataclass, in messages: the nearest known name, or where it belongs."""
    known = {f.name: f.name for f in fields(kind)}
    if "model" in known:
        known = {f.name: f"model.{f.name}" for f in fields(MaskVLMConfig)} | known
    elif name in PretrainConfig.__dataclass_fields__:
        return "; it is a setting of the run, not of the model"
    near = difflib.get_close_matches(name, known, 1)
    return f"; did you mean {known[near[0]]}?" if near else "; remove it"


def _checked(wanted: Any, value: Any, where: str) -> Any:
    """Convert a JSON value to the type `wanted` of a field. ConfigError if it is of another type.

    Types of fields: int, float, bool, str, Path, Literal, a tuple, and `X | None` for one of these.
    """
    choices = get_args(wanted)
    if get_origin(wanted) is Literal:
        fits = value in choices
    elif type(None) in choices:  # Path | None
        return None if value is None else _checked(choices[0], value, where)
    elif get_origin(wanted) is tuple:
        fits = isinstance(value, list | tuple) and (... in choices or len(value) == len(choices))
        choices = choices[:1] * len(value) if fits and ... in choices else choices
        value = tuple(_checked(of, part, where) for of, part in zip(choices, value, strict=True)) if fits else value
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


def config_json(config: RunConfig) -> dict[str, Any]:
    """Contents of a run's config.json: its settings and the version of the format."""
    return {"format_version": FORMAT_VERSION, **json.loads(json.dumps(config.to_dict()))}


def with_defaults(values: dict[str, Any], kind: type[RunConfig]) -> dict[str, Any]:
    """Values of a config.json, with the defaults of settings that are newer than the file and missing in it."""
    model = values.get("model")
    complete = _defaults(kind) | values
    return complete | {"model": _defaults(MaskVLMConfig) | model} if isinstance(model, dict) else complete


def _defaults(kind: type) -> dict[str, Any]:
    found = {f.name: f.default for f in fields(kind) if f.default is not MISSING}
    return json.loads(json.dumps(found, default=str))


def differing_settings(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[tuple[str, Any, Any]]:
    """Settings that differ and that a resumed run may not change: (name, value before, value now).

    None stands for the value of a setting that is missing on one side.
    """
    found = []
    for name in sorted(set(before) | set(now)):
        if not prefix and resume_may_change(name):
            continue
        a, b = before.get(name), now.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            found += differing_settings(a, b, f"{prefix}{name}.")
        elif a != b:
            found.append((f"{prefix}{name}", a, b))
    return found
