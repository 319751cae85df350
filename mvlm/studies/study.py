"""A study: the TOML file that describes it (docs/guides/studies.md), and the configuration of each of its runs.

An arm is a set of settings that differ from those of the study; names are those of config.json. Three further ones are
`fraction`, the share of the training samples that the arm sees, `against`, the arm to compare it with instead of the
base, and `budget`, in place of the study's. A run of an arm with a seed is a trial. Batches are a function of (seed,
epoch, sample), so trials of two arms with one seed see the same samples in the same order: they are paired.
"""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mvlm.config.finetune import FinetuneConfig
from mvlm.config.json_files import run_config
from mvlm.config.pretrain import PretrainConfig
from mvlm.errors import ConfigError
from mvlm.tasks.recipes import finetune_defaults
from mvlm_dataloading.untrusted import read_regular

_FIELDS = {
    "question": str, "preset": str, "task": str, "base": str, "seeds": list, "measures": list, "budget": dict,
    "primary": str, "effect": float,
    "split": str, "splits": list, "rerank": int, "limits": str, "settings": dict, "arms": dict, "then": dict,
    "paper": dict,
}  # fmt: skip
_REQUIRED = ("question", "base", "seeds", "measures", "budget", "arms")
FIGURES = ("tr", "ir", "itc", "itm", "unseen")
"""Names under which the figures of a trial are grouped."""
OF_ARMS = ("fraction", "against", "budget")
"""Names in an arm of a study's file that are not settings of its runs."""
OF_ANOTHER = ("flops_of", "seconds_of")
"""Kinds of budget of an arm that equal the FLOPs or the time of another arm."""
_OWN = ("data", "out", "resume", "max_steps", "checkpoint", "task")
"""Settings of a run that `mvlm study` sets itself, so that a study's file may not name them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Study:
    """A study, as its file describes it."""

    name: str
    """Name of the file, without its ending."""
    question: str
    """Question of the study, one sentence."""
    base: str
    """Arm that all others are compared with."""
    seeds: list[int]
    measures: list[str]
    """Figures to compare: names of `mvlm eval retrieval`'s JSON, joined by dots, such as tr.r1 or gain_text_nats. Of a
    task: a split, and names of `mvlm eval TASK`'s JSON, such as test.accuracy."""
    budget: dict[str, float]
    """{"steps": number of steps} for all arms, or {"flops": FLOPs}, which buys each arm as many steps as it affords. An
    arm's own may also be {"flops_of": name of an arm} or {"seconds_of": name of an arm}: FLOPs or processor time that
    the other arm spends."""
    arms: dict[str, dict[str, Any]]
    """Name of each arm -> the settings in which it differs."""
    preset: str = ""
    """Recipe of pretraining that all arms start from: a preset of `mvlm pretrain`."""
    task: str = ""
    """Task to fine-tune, in place of a preset: all arms start from its recipe and from one pretrained model."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Settings that all arms share."""
    then: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Name -> a task that each trial's model is then fine-tuned on: its `data`, the `splits` to evaluate it on, and
    the settings in which it differs from the task's recipe. The name is that of the task, or `task` is."""
    primary: str = ""
    """The measure that answers the question, named before the first trial. The others describe."""
    effect: float = 0.0
    """Difference of the primary measure that the study looks for; 0: none is named."""
    split: str = "test"
    """Split that the finished trials are evaluated on."""
    splits: list[str] = field(default_factory=lambda: ["test"])
    """Splits that the finished trials of a task are evaluated on."""
    rerank: int = 32
    """Candidates of each query for ITM to re-rank."""
    limits: str = ""
    """Limits of the study, for its page: questions that it cannot answer."""
    paper: dict[str, dict[str, float]] = field(default_factory=dict)
    """Name of an arm -> figures of the paper, to print beside the study's."""

    def partner(self, arm: str) -> str:
        """The arm that `arm` is compared with."""
        return self.arms[arm].get("against", self.base)


def read_study(file: Path) -> Study:
    """Read a study's TOML file. ConfigError for a missing file, an unknown name, a missing or an invalid value."""
    try:
        values = tomllib.loads(read_regular(file, "study").decode())
    except OSError as error:
        raise ConfigError(f"{file}: wanted a study, could not read it ({error.strerror}); check the path") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{file}: wanted a study as TOML, found no text; name a TOML file") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{file}: wanted a study as TOML, got {error}; correct it") from None
    for name, value in values.items():
        if name not in _FIELDS:
            raise ConfigError(f"{file}: unknown name {name!r}; a study has {', '.join(_FIELDS)}")
        if not isinstance(value, _FIELDS[name]) and not (name == "effect" and type(value) is int):
            raise ConfigError(f"{file}: {name}: wanted a {_FIELDS[name].__name__}, got {value!r}")
    missing = [name for name in _REQUIRED if name not in values]
    if missing:
        raise ConfigError(f"{file}: wanted {', '.join(missing)}, found none")
    study = Study(name=file.stem, **values)
    _check(study, file)
    return study


def _check(study: Study, file: Path) -> None:
    if bool(study.preset) == bool(study.task):
        raise ConfigError(
            f"{file}: wanted either a preset to pretrain or a task to fine-tune, got preset {study.preset!r} and "
            f"task {study.task!r}"
        )
    if study.task and "flops" in study.budget:
        raise ConfigError(f"{file}: budget: wanted {{steps = N}} for a task, got {study.budget}")
    if study.base not in study.arms:
        raise ConfigError(f"{file}: base: wanted one of the arms {', '.join(study.arms)}, got {study.base!r}")
    if not study.seeds or len(set(study.seeds)) < len(study.seeds) or any(type(s) is not int for s in study.seeds):
        raise ConfigError(f"{file}: seeds: wanted different integers, got {study.seeds}")
    if not study.measures or any(type(name) is not str for name in study.measures):
        raise ConfigError(f"{file}: measures: wanted names of figures, got {study.measures}")
    if study.primary and study.primary not in study.measures:
        raise ConfigError(f"{file}: primary: wanted one of the measures, got {study.primary!r}")
    if study.effect < 0 or (study.effect and not study.primary):
        raise ConfigError(f"{file}: effect: wanted a positive difference of the primary measure, got {study.effect}")
    if not _is_amount(study.budget):
        raise ConfigError(f"{file}: budget: wanted {{steps = N}} or {{flops = N}}, got {study.budget}")
    for name, arm in study.arms.items():
        if not isinstance(arm, dict):
            raise ConfigError(f"{file}: arms.{name}: wanted a table of settings, got {arm!r}")
        if arm.get("against", study.base) not in study.arms:
            raise ConfigError(f"{file}: arms.{name}: against: wanted one of the arms, got {arm['against']!r}")
        fraction = arm.get("fraction", 1.0)
        if type(fraction) not in (int, float) or not 0 < fraction <= 1:
            raise ConfigError(f"{file}: arms.{name}: fraction: wanted more than 0 and at most 1, got {fraction!r}")
        own = arm.get("budget", study.budget)
        if not (_is_amount(own) or _is_of_another(own, study.arms)) or (study.task and "steps" not in own):
            raise ConfigError(
                f"{file}: arms.{name}: budget: wanted {{steps = N}}, {{flops = N}}, {{flops_of = NAME}} or "
                f"{{seconds_of = NAME}} of an arm with a number of its own, got {own!r}"
            )
    if study.then and not study.preset:
        raise ConfigError(f"{file}: then: wanted a preset to pretrain, found none; a task has no further stage")
    for name, stage in study.then.items():
        if not isinstance(stage, dict) or "data" not in stage or not isinstance(stage.get("splits", []), list):
            raise ConfigError(f"{file}: then.{name}: wanted a table with data, and splits as a list, got {stage!r}")
        if name in FIGURES:
            raise ConfigError(f"{file}: then.{name}: wanted another name, this is that of a figure")
    for settings, further in ((study.settings, ("seed",)), *((arm, ()) for arm in study.arms.values())):
        own = [name for name in (*_OWN, *further) if name in settings]
        if own:
            raise ConfigError(f"{file}: {own[0]}: wanted no such setting, the study sets it; remove it")
    slugs = {slug(name): name for name in study.arms}
    if len(slugs) < len(study.arms):
        raise ConfigError(f"{file}: arms: wanted names that differ in letters or digits, got {', '.join(study.arms)}")


def _is_amount(budget: Any) -> bool:
    """True if a budget in a study's file is {steps = N} or {flops = N}, with N of 1 or more."""
    if not isinstance(budget, dict) or len(budget) != 1 or not budget.keys() <= {"steps", "flops"}:
        return False
    (amount,) = budget.values()
    return type(amount) in (int, float) and amount >= 1


def _is_of_another(budget: Any, arms: Mapping[str, Any]) -> bool:
    """True if a budget is {flops_of = NAME} or {seconds_of = NAME}, of an arm whose own budget names no other arm."""
    if not isinstance(budget, dict) or len(budget) != 1 or not budget.keys() <= {*OF_ANOTHER}:
        return False
    (name,) = budget.values()
    return name in arms and not {*OF_ANOTHER} & arms[name].get("budget", {}).keys()


def slug(name: str) -> str:
    """Folder name for an arm's name: its letters, digits and dots in lower case, all else as hyphens."""
    words = "".join(c if c.isalnum() or c == "." else " " for c in name).lower().split()
    return "-".join(words)


def merged(*tables: Mapping[str, Any]) -> dict[str, Any]:
    """Merge dicts of settings, nested ones too; values of later ones replace those of earlier ones."""
    found: dict[str, Any] = {}
    for table in tables:
        for name, value in table.items():
            old = found.get(name)
            found[name] = merged(old, value) if isinstance(old, dict) and isinstance(value, Mapping) else value
    return found


def trial_config(
    study: Study, arm: str, seed: int, data: Path, out: Path, steps: int, checkpoint: Path | None = None
) -> PretrainConfig | FinetuneConfig:
    """Configuration of a trial. ConfigError for an unknown setting or an invalid value.

    Args:
        checkpoint: pretrained model of a study of a task.

    An arm's own `seed` is added to the trial's: such an arm differs from the base in its random draws alone.
    """
    if study.task:
        if checkpoint is None:
            raise ConfigError("checkpoint: wanted a pretrained model to fine-tune, found none; give --checkpoint RUN")
        recipe, kind = finetune_defaults(study.task, checkpoint, data, out).to_dict(), FinetuneConfig
    else:
        if checkpoint is not None:
            raise ConfigError(
                "checkpoint: a study of pretraining begins from random weights; set initial_model in its settings"
            )
        recipe, kind = PretrainConfig.preset(study.preset, data=data, out=out).to_dict(), PretrainConfig
    own = {name: value for name, value in study.arms[arm].items() if name not in OF_ARMS}
    values = merged(recipe, study.settings, own)
    values |= {"seed": seed + own.get("seed", 0), "max_steps": steps, "resume": True}
    return run_config(values, f"study {study.name}, arm {arm}", kind)


def stage_config(study: Study, name: str, seed: int, checkpoint: Path, out: Path) -> FinetuneConfig:
    """Configuration of fine-tuning a trial's model on a task of `Study.then`. ConfigError as for `trial_config`.

    Args:
        name: key of the task in `Study.then`.
        checkpoint: model of the trial.
    """
    stage = study.then[name]
    recipe = finetune_defaults(stage.get("task", name), checkpoint, Path(stage["data"]), out).to_dict()
    own = {key: value for key, value in stage.items() if key not in ("task", "data", "splits")}
    values = merged(recipe, own) | {"seed": seed, "resume": True}
    return run_config(values, f"study {study.name}, then {name}", FinetuneConfig)
