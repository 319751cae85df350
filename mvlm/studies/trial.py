"""A trial: one run of one arm with one seed, its evaluation, and the file that keeps what it found."""

import logging
import shutil
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from mvlm.config.finetune import FinetuneConfig
from mvlm.config.groups import RunConfig, of_recipe
from mvlm.config.json_files import config_json, with_defaults, without_removed
from mvlm.config.pretrain import PretrainConfig
from mvlm.device import choose_device
from mvlm.errors import RunError
from mvlm.evaluation.two_way import edits_of
from mvlm.machine import code_revision, processor_name
from mvlm.report.figures import EVALUATION_CURVES, RUN_CURVES, TASK_CURVES
from mvlm.runs.checkpoint import read_state
from mvlm.runs.folder import RunFolder, find_checkpoint, read_metrics
from mvlm.runs.load import load_without_head
from mvlm.schemas import Result, check
from mvlm.tasks.evaluate import evaluate_task
from mvlm.tasks.finetune import finetune
from mvlm.tasks.load import find_task
from mvlm.training.own_code import SETTINGS, file_of
from mvlm.training.run import pretrain
from mvlm.untrusted import read_json, read_spec
from mvlm_dataloading import open_dataset
from mvlm_dataloading.files import sha256, write_json
from mvlm_dataloading.untrusted import LIMITS, parse_json, read_regular

log = logging.getLogger(__name__)
FORMAT_VERSION = 1
CURVE_POINTS = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """A task that the model of a trial is fine-tuned on, with the same settings in all arms."""

    name: str
    config: FinetuneConfig
    samples: str
    """Fingerprint of its training samples."""
    evaluated: dict[str, str]
    """Fingerprint of each split that it is evaluated on."""

    @property
    def settings(self) -> dict[str, Any]:
        """Settings and fingerprints of data that, with the model, determine the figures of this fine-tuning."""
        return {"samples": self.samples, "evaluated": self.evaluated, **settings_of(self.config)}


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """One run of an arm with one seed: its configuration, data and folder."""

    arm: str
    seed: int
    config: PretrainConfig | FinetuneConfig
    flops: float | None
    """FLOPs of its training, the optimizer's included; None for a task, whose FLOPs are not counted."""
    data: Path
    """Data set that it is evaluated on. It is trained on `config.data`, which may be a part of it."""
    samples: str
    """Fingerprint of its training samples."""
    splits: tuple[str, ...]
    """Splits that it is evaluated on; one for pretraining."""
    rerank: int
    """Candidates of each query for ITM to re-rank."""
    folder: Path
    step_seconds: float | None = None
    """Measured time of a step, where the study has arms of equal time."""
    start: str = ""
    """Hash of the pretrained model that a task starts from."""
    files: dict[str, str] = field(default_factory=dict)
    """SHA-256 of each file and model that settings name by a path, by the name of the setting."""
    evaluated: dict[str, str] = field(default_factory=dict)
    """Fingerprint of each split that it is evaluated on."""
    then: tuple[Stage, ...] = ()

    @property
    def file(self) -> Path:
        """Path of result.json, which the trial has once it is finished."""
        return self.folder / "result.json"

    @property
    def settings(self) -> dict[str, Any]:
        """Settings and data that determine the trial's figures."""
        settings: dict[str, Any] = {"samples": self.samples, "rerank": self.rerank}
        if isinstance(self.config, FinetuneConfig):
            settings |= {"splits": list(self.splits), "start": self.start}
        else:
            settings["split"] = self.splits[0]
        settings |= {"files": self.files} if self.files else {}
        settings |= {"then": {stage.name: stage.settings for stage in self.then}} if self.then else {}
        return settings | settings_of(self.config)

    def same_settings(self, result: dict[str, Any]) -> bool:
        """True if a result is of a trial with the same settings. Results of older versions lack the hashes of files."""
        settings, wanted = self.said(result), self.settings
        if "files" not in settings:
            wanted.pop("files", None)
        return result.get("format_version") == FORMAT_VERSION and settings == wanted

    def said(self, result: dict[str, Any]) -> dict[str, Any]:
        """Settings that a result states, and those of its fine-tuning, brought to this version by `settings_said`."""
        settings = settings_said(result.get("settings", {}), self.config)
        then = settings.get("then", {})
        configs = {stage.name: stage.config for stage in self.then}
        for name in configs.keys() & then.keys():
            settings["then"] = settings["then"] | {name: settings_said(then[name], configs[name])}
        return settings

    def same_images(self, result: dict[str, Any]) -> bool:
        """True if a result was found on the images that this trial is evaluated on.

        A split for which the result names no images counts as equal.
        """
        about = result.get("data", {})
        known = about.get("splits", {self.splits[0]: about.get("test")})  # older results tell of the first split only
        return all(known.get(split) in (None, fingerprint) for split, fingerprint in self.evaluated.items())


def read_result(trial: Trial) -> dict[str, Any] | None:
    """Result of a trial; None if it is not finished. RunError if it was made with other settings."""
    if not trial.file.exists():
        return None
    result = read_json(trial.file, "figures", "the result of a trial", Result)
    if not trial.same_settings(result):
        settings, wanted = trial.said(result), trial.settings
        names = sorted(name for name in {*settings, *wanted} if settings.get(name) != wanted.get(name))
        raise RunError(
            f"{trial.file}: wanted a trial with this study's settings, found one with another "
            f"{', '.join(names) or 'format'}; choose another --out, or remove the folder"
        )
    if not trial.same_images(result):
        raise RunError(
            f"{trial.file}: wanted a trial evaluated on the images of {trial.data}, found one of others; choose "
            f"another --out, or remove the folder"
        )
    return result


def run_trial(trial: Trial) -> dict[str, Any] | None:
    """Train and evaluate one trial, or continue it. Returns its result; None if it was asked to stop (SIGTERM).

    The result is written whole or not at all. Then the checkpoints are removed.

    RunError if it has begun from another pretrained model or with other files.
    """
    run = RunFolder(trial.config.out)
    _check_begun(trial)
    # What it could say next is done below, and then its checkpoints are gone.
    config = trial.config
    stopped = pretrain(config, False) if isinstance(config, PretrainConfig) else finetune(config, False)
    trained = time.perf_counter()
    checkpoint = find_checkpoint(run.path)
    if stopped or read_state(checkpoint)["step"] < trial.config.max_steps:
        return None
    dataset, train = open_dataset(trial.data, trial.splits[0]), open_dataset(trial.data, "train")
    device = choose_device(trial.config.device)
    ranks: dict[str, Any] = {}
    if isinstance(trial.config, FinetuneConfig):
        precision, kind = trial.config.precision, find_task(trial.config.task)
        figures = {
            split: evaluate_task(checkpoint, trial.data, split, device, kind=kind, precision=precision)[0]
            for split in trial.splits
        }
    else:
        model = load_without_head(checkpoint, device, trial.config.precision)
        # Concepts are those of the whole data set, so that the same ones are unseen in all arms.
        rerank = trial.rerank if model.network.matching_is_trained else 0  # it may continue a model without ITM
        figures, ranks = model.evaluate(dataset, train, rerank, edits=edits_of(dataset))
    for stage in trial.then:
        if finetune(stage.config, say_next=False):
            return None
        figures[stage.name] = {
            split: evaluate_task(find_checkpoint(stage.config.out), stage.config.data, split, device,
                                 kind=find_task(stage.config.task), precision=stage.config.precision)[0]
            for split in stage.evaluated
        }  # fmt: skip
    rows = read_metrics(run.metrics)
    of_tasks = sorted({name for row in rows for name in row if name.startswith("val_")})
    result = {
        "format_version": FORMAT_VERSION,
        "arm": trial.arm,
        "seed": trial.seed,
        "settings": trial.settings,
        "data": {
            "name": dataset.description.get("name"),
            "train": train.fingerprint,
            "test": dataset.fingerprint,
            "splits": trial.evaluated,
        },
        "made_by": made_by(),
        "steps": trial.config.max_steps,
        "flops": trial.flops,
        "step_seconds": trial.step_seconds,
        # Of all processes that trained it, and of the evaluation.
        "seconds": round(rows[-1]["seconds"] + time.perf_counter() - trained, 1),
        "figures": figures,
        "ranks": ranks,
        "curves": {
            n: [[row["step"], row[n]] for row in rows if row.get(n) is not None]
            for n in (*EVALUATION_CURVES, *of_tasks)
        }
        | {n: loss_curve(rows, n) for n in (*RUN_CURVES, *TASK_CURVES)},
    }
    write_json(trial.file, result)
    remove_checkpoints(trial)
    return result


def loss_curve(rows: Sequence[dict[str, Any]], name: str) -> list[list[float]]:
    """Thin out a metric of training to at most `CURVE_POINTS` points (step, value), for a chart.

    The steps are cut into equal parts; a point is a part's last step and the mean over the part.

    Args:
        rows: rows of metrics of the run, in order.
        name: name of the metric.
    """
    kept = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
    size = -(-len(kept) // CURVE_POINTS) or 1
    parts = [kept[i : i + size] for i in range(0, len(kept), size)]
    return [[part[-1][0], float(f"{fmean(value for _, value in part):.5g}")] for part in parts]


def remove_checkpoints(trial: Trial) -> None:
    """Remove the checkpoints of a finished trial, if there are any."""
    for out in (trial.config.out, *(stage.config.out for stage in trial.then)):
        shutil.rmtree(RunFolder(out).checkpoints, ignore_errors=True)


def _check_begun(trial: Trial) -> None:
    """Record the hashes of the model and files that a trial starts from, in its folder.

    RunError if an earlier call recorded others, or if the pretrained model has changed since the study was set up.
    """
    file, wanted = trial.folder / "begun.json", {"start": trial.start, "files": trial.files}
    config = trial.config
    if (begun := read_spec(file)) is None:
        if isinstance(config, FinetuneConfig) and load_without_head(config.checkpoint, "cpu").sha256 != trial.start:
            raise RunError(f"{config.checkpoint}: changed since the study was set up; run the same command again")
        write_json(file, wanted)
    elif begun != wanted:
        raise RunError(
            f"{trial.folder}: the trial has begun from another pretrained model, or with other files that its settings "
            f"name; remove the folder"
        )


def named_files(config: RunConfig) -> dict[str, str]:
    """SHA-256 of each model and file that settings of a run name by a path, by the name of the setting."""
    start = getattr(config, "initial_model", None)
    hashes = {} if start is None else {"initial_model": load_without_head(start, "cpu").sha256}
    for name in ("image_weights", "text_weights", "tokenizer", "answer_list", "task"):
        path = getattr(config, name, None)
        if path is not None and Path(path).is_file():  # a task of the library has a name
            hashes[name] = sha256(Path(path))
    for name in SETTINGS:
        if (own := getattr(config, name)) is not None:
            hashes[name] = sha256(file_of(name, own))
    return hashes


def take_result(trial: Trial, study: Path) -> dict[str, Any] | None:
    """Find the result of an equal trial in another study, and write it as that of `trial` too; None if there is none.

    Equal trials have the same seed, data, files and settings that their results depend on. The names of their arms may
    differ; one of the same name is taken first.

    Args:
        study: folder of the other study, as `mvlm study --out` wrote it, or its file `trials.jsonl`, also with gzip.
    """
    for result in sorted(_results_of(study, trial.seed), key=lambda result: result.get("arm") != trial.arm):
        if trial.same_settings(result) and trial.same_images(result):
            result |= {"arm": trial.arm}
            write_json(trial.file, result)
            log.info("%s, seed %d: taken from another study", trial.arm, trial.seed)
            return result
    return None


def _results_of(study: Path, seed: int) -> Iterator[dict[str, Any]]:
    """Yield the results of a study's finished trials with one seed. RunError if a file holds no results.

    study: folder of the study, or its file trials.jsonl, also with gzip.
    """
    files = [study] if study.is_file() else sorted(study.glob(f"trials/*/seed_{seed}/result.json"))
    for file in files:
        try:
            content = read_regular(file, "figures", within=study if study.is_dir() else None)
            if file.suffix == ".gz":
                content = zlib.decompressobj(wbits=31).decompress(content, LIMITS["figures"])
            results = [parse_json(line) for line in (content.splitlines() if file is study else [content])]
        except (ValueError, OSError, zlib.error) as error:
            raise RunError(f"{file}: wanted results of trials, trials.jsonl, got {error}; leave it out") from None
        for result in results:
            check(result, Result, file, "results of trials, trials.jsonl")
        yield from (result for result in results if result.get("seed") == seed)


def settings_of(config: RunConfig) -> dict[str, Any]:
    """Settings of a run on which its results depend, as plain JSON; those of the model are named `model.NAME`.

    Of a task the model's are left out: it has them from the pretrained model.
    """
    decide = config_json(config).items()
    values = {name: value for name, value in decide if name != "checkpoint" and of_recipe(name)}
    model = values.pop("model")
    if isinstance(config, FinetuneConfig):
        return values
    return values | {f"model.{name}": value for name, value in model.items()}


def settings_said(settings: dict[str, Any], config: RunConfig) -> dict[str, Any]:
    """Settings that a trial's result states, brought to this version for comparison with `settings_of(config)`.

    A setting that did not exist when the result was made gets its default. Removed settings are left out if they had
    their default, as are model settings in older results of a task.
    """
    if isinstance(config, FinetuneConfig):
        settings = {name: value for name, value in settings.items() if not name.startswith("model.")}
    defaults = with_defaults({"model": {}}, type(config))
    defaults |= {f"model.{name}": value for name, value in defaults["model"].items()}
    return {name: defaults[name] for name in settings_of(config) if name in defaults} | without_removed(settings)


def made_by() -> dict[str, Any]:
    """Versions, revision and machine of this process."""
    return {
        "mvlm": version("mvlm"),
        "commit": code_revision(),
        "torch": torch.__version__,
        "machine": torch.cuda.get_device_name() if torch.cuda.is_available() else processor_name(),
        "threads": torch.get_num_threads(),
    }
