"""`mvlm study`: the trials of a study, one after another or in several processes, then its table and its page."""

import difflib
import json
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from mvlm.config.finetune import FinetuneConfig
from mvlm.config.groups import RunConfig
from mvlm.config.pretrain import PretrainConfig
from mvlm.errors import ConfigError, NonFiniteLossError, RunError
from mvlm.runs.load import load_without_head
from mvlm.studies.page import MEASURES, figure, write_csv, write_study_page
from mvlm.studies.study import OF_ANOTHER, Study, slug, stage_config, trial_config
from mvlm.studies.trial import Stage, Trial, named_files, read_result, remove_checkpoints, run_trial, take_result
from mvlm.studies.update_costs import step_times, steps_and_flops
from mvlm.tasks.finetune import untrained_figures
from mvlm.terminal import say
from mvlm.untrusted import run_errors
from mvlm.weights.start import choose_tokenizer
from mvlm_dataloading import Dataset, open_dataset
from mvlm_dataloading.files import write_file
from mvlm_dataloading.options import ViewOptions
from mvlm_dataloading.tools.view import make_view
from mvlm_dataloading.untrusted import check_links

log = logging.getLogger(__name__)

CAPTIONS = 512
"""Number of a split's first captions from which the mean caption length, for the FLOPs of a step, is estimated."""
SAMPLES = 8
"""Number of a split's first samples that are evaluated to learn the names of a task's figures."""
_OF_OTHERS = ("config.json", "dataset.json", "model.safetensors", "checkpoints")
"""Files that show that a folder belongs to a run, a data set or a model, and not to a study."""


def run_study(
    study: Study,
    data: Path,
    out: Path,
    part: tuple[int, int] = (1, 1),
    reuse: Sequence[Path] = (),
    checkpoint: Path | None = None,
) -> Path | None:
    """Run the trials that are missing, then write `trials.jsonl`, `study.csv` and `study.html` into `out`.

    A trial that was cut off continues from its last checkpoint. A trial that another process works on is left to it.

    Args:
        data: data set with a train split.
        part: (i, n): only every nth trial, beginning with the ith. Each part may run on another machine or GPU with the
            same `out`; whichever ends last finds all results there.
        reuse: folders of other studies, or their files `trials.jsonl`. A trial that is equal to one of theirs takes its
            result. `out` itself is left out, so that arms of one study that are equal are all run.
        checkpoint: pretrained model of a study of a task.

    Returns:
        The page; None if the study was asked to stop (SIGTERM), or if trials are missing that other parts or processes
        have to make.
    """
    if found := [name for name in _OF_OTHERS if (out / name).exists()]:
        raise RunError(f"{out}: wanted a new folder or that of a study, found {found[0]}; choose another one")
    if out.is_dir():
        with run_errors():
            check_links(out)
    others = _others(reuse, out)
    trials = trials_of(study, data, out, checkpoint)
    finished = [read_result(trial) for trial in trials]  # before the first minute is spent
    if None in finished:
        check_measures(study, trials[0])
    number, parts = part
    failed = []
    for trial in trials[number - 1 :: parts]:
        if read_result(trial) is not None:
            remove_checkpoints(trial)  # a kill may have come between
            continue
        trial.folder.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(trial.folder / ".lock", timeout=0):
                if (result := _found(trial, others)) is None:
                    log.info("%s, seed %d: %d steps", trial.arm, trial.seed, trial.config.max_steps)
                    result = run_trial(trial)
        except Timeout:
            log.info("%s, seed %d: another process is at it", trial.arm, trial.seed)
            continue
        except NonFiniteLossError as error:  # of this arm; the others go on
            log.error("%s, seed %d: %s", trial.arm, trial.seed, error)
            failed.append(f"{trial.arm}, seed {trial.seed}")
            continue
        if result is None:
            log.info("stopped; the same command continues")
            return None
        for measure in study.measures:  # one that this arm does not have is known now, and not after the last trial
            figure(result, measure)
    if failed:
        raise RunError(f"{out}: wanted finite losses, found others in {'; '.join(failed)}; leave these arms out")
    results = [result for trial in trials if (result := read_result(trial)) is not None]
    if len(results) < len(trials):
        log.info("%d of %d trials are finished", len(results), len(trials))
        return None
    return _write(study, results, out)


def check_measures(study: Study, trial: Trial) -> None:
    """Raise ConfigError if a study names a measure that its trials will not have.

    For a study of a task, the names are learnt by evaluating random weights on a few samples of each split.

    trial: any trial of the study.
    """
    known = MEASURES
    if isinstance(trial.config, FinetuneConfig):
        few = {split: open_dataset(trial.data, split).head(SAMPLES) for split in trial.splits}
        known = {f"{split}.{name}" for split in few for name in untrained_figures(trial.config, few[split])}
    for measure in study.measures:
        name, _, figure_of = measure.partition(".")
        if name in study.then:
            splits = study.then[name].get("splits", ["test"])
            if figure_of.partition(".")[0] not in splits:
                raise ConfigError(
                    f"measures: wanted {name}, one of its splits {', '.join(splits)}, and a figure, got {measure!r}"
                )
            continue
        first = ".".join(measure.split(".")[:2]) if study.task else measure  # types of questions may be absent here
        if first not in known:
            near = difflib.get_close_matches(measure, known, 1)
            hint = f"did you mean {near[0]}?" if near else f"wanted one of {', '.join(sorted(known))}"
            raise ConfigError(f"measures: wanted figures of `mvlm eval`, got {measure!r}; {hint}")


def report_finished(
    study: Study, data: Path, out: Path, reuse: Sequence[Path] = (), checkpoint: Path | None = None
) -> Path:
    """Write table and page of the trials that are finished, and run none. Returns the page.

    Arguments are those of `run_study`. RunError if no trial is finished.
    """
    others, trials = _others(reuse, out), trials_of(study, data, out, checkpoint)
    found = [result for trial in trials if (result := _found(trial, others)) is not None]
    if not found:
        raise RunError(f"{out}: wanted finished trials of {study.name}, found none; run the study first")
    return _write(study, found, out)


def _found(trial: Trial, others: Sequence[Path]) -> dict[str, Any] | None:
    """Result of a trial if it is finished, here or as an equal trial of another study; None if it has to be run.

    others: folders of other studies, or their files trials.jsonl.
    """
    found = read_result(trial)
    for folder in others:
        found = found or take_result(trial, folder)
    return found


def _others(reuse: Sequence[Path], out: Path) -> list[Path]:
    """Places in `reuse` from which results may be taken: all but the study's own folder `out`.

    A study runs each of its arms, even equal ones.
    """
    for folder in reuse:
        if not folder.exists():
            log.info("%s: no results to take, there is no such place", folder)
    return [place for place in reuse if out.resolve() not in (place.resolve(), place.resolve().parent)]


def _write(study: Study, results: list[dict[str, Any]], out: Path) -> Path:
    """Write trials.jsonl, study.csv and study.html of a study into `out`. Returns the path of study.html."""
    with FileLock(out / ".write.lock"):  # parts may end at one time
        write_file(out / "trials.jsonl", "".join(json.dumps(r, separators=(",", ":")) + "\n" for r in results))
        write_csv(study, results, out / "study.csv")
        return write_study_page(study, results, out / "study.html")


def trials_of(study: Study, data: Path, out: Path, checkpoint: Path | None = None) -> list[Trial]:
    """All trials of a study: every arm with the first seed, then with the next.

    The trials that are finished when a study stops early then cover all arms about equally.

    ConfigError for a setting that no run has, before anything is run.
    """
    dataset = open_dataset(data, "train")
    folders = {arm: training_data(settings.get("fraction", 1.0), data, out) for arm, settings in study.arms.items()}
    samples = {arm: open_dataset(folder, "train").fingerprint for arm, folder in folders.items()}
    lengths: dict[tuple[Any, ...], float] = {}
    lengths_of_arms: dict[str, tuple[int, float | None]] = {}
    files: dict[str, dict[str, str]] = {}
    budgets = {arm: settings.get("budget", study.budget) for arm, settings in study.arms.items()}
    times = _times_of_steps(study, budgets, data, out)
    for arm in sorted(study.arms, key=lambda name: bool({*OF_ANOTHER} & budgets[name].keys())):
        budget: dict[str, Any] = budgets[arm]
        if "flops_of" in budget:
            budget = {"flops": lengths_of_arms[budget["flops_of"]][1]}
        elif "seconds_of" in budget:
            other = budget["seconds_of"]
            budget = {"steps": max(1, round(lengths_of_arms[other][0] * times[other] / times[arm]))}
        config = trial_config(study, arm, 0, data, out, int(budget.get("steps", 1_000_000)), checkpoint)
        lengths_of_arms[arm] = _steps_and_flops(budget, config, dataset, lengths)
        files[arm] = named_files(config)
    start = load_without_head(checkpoint, "cpu").sha256 if study.task and checkpoint is not None else ""
    splits = tuple(study.splits) if study.task else (study.split,)
    evaluated = {split: open_dataset(data, split).fingerprint for split in splits}
    stages = {name: _stage_data(stage) for name, stage in study.then.items()}
    trials = []
    for seed in study.seeds:
        for arm in study.arms:
            steps, flops = lengths_of_arms[arm]
            folder = out / "trials" / slug(arm) / f"seed_{seed}"
            config = trial_config(study, arm, seed, folders[arm], folder / "run", steps, checkpoint)
            # An ITM head that was not trained would only spoil the order of ITC. A task says so itself.
            matches = not isinstance(config, PretrainConfig) or config.itm_weight or config.initial_model
            trial = Trial(
                arm=arm,
                seed=seed,
                config=config,
                flops=flops,
                step_seconds=times.get(arm),
                folder=folder,
                data=data,
                samples=samples[arm],
                splits=splits,
                evaluated=evaluated,
                rerank=study.rerank if matches else 0,
                start=start,
                files=files[arm],
                then=tuple(
                    Stage(
                        name=name,
                        config=stage_config(study, name, seed, folder / "run", folder / f"then-{slug(name)}"),
                        samples=train,
                        evaluated=tested,
                    )
                    for name, (train, tested) in stages.items()
                ),
            )
            trials.append(trial)
    return trials


def _times_of_steps(study: Study, budgets: Mapping[str, dict[str, Any]], data: Path, out: Path) -> dict[str, float]:
    """Seconds of a step, measured, of each arm whose budget is `seconds_of` another arm, and of that other arm.

    The steps train on the whole data set. Empty for a study of a task.

    budgets: budget of each arm.
    """
    arms = [name for arm, budget in budgets.items() if "seconds_of" in budget for name in (budget["seconds_of"], arm)]
    for arm in arms:
        if study.arms[arm].get("stages"):  # its steps take several times
            raise ConfigError(f"arms.{arm}: stages: wanted a budget in steps or FLOPs, got seconds_of; give another")
    configs = {arm: trial_config(study, arm, 0, data, out / "unused", 1) for arm in dict.fromkeys(arms)}
    of_pretraining = {arm: config for arm, config in configs.items() if isinstance(config, PretrainConfig)}
    return step_times(of_pretraining, out) if of_pretraining else {}


def _stage_data(stage: dict[str, Any]) -> tuple[str, dict[str, str]]:
    """Fingerprint of the samples that a stage of fine-tuning (`Study.then`) trains on, and of each evaluated split."""
    data = Path(stage["data"])
    splits = {split: open_dataset(data, split).fingerprint for split in stage.get("splits", ["test"])}
    return open_dataset(data, "train").fingerprint, splits


def training_data(fraction: float, data: Path, out: Path) -> Path:
    """The data set that holds a fraction of the training samples: a view in the study's folder, made if missing.

    Samples are chosen by a hash of their keys, so smaller fractions are subsets of larger ones. Near-duplicates of
    evaluation images are as frequent in them as in the whole.
    """
    if fraction == 1:
        return data
    source = open_dataset(data, "train").fingerprint  # with the same --out, other data get a view of their own
    view = out / "data" / f"share_{fraction:g}_{source[:8]}"
    view.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{view}.lock"):
        if not view.exists():  # it appears whole
            make_view(view, [data], ViewOptions(fraction=fraction, leaks="keep"))
    return view


def _steps_and_flops(
    budget: dict[str, Any], config: RunConfig, dataset: Dataset, lengths: dict[tuple[Any, ...], float]
) -> tuple[int, float | None]:
    """Number of steps that a budget buys a trial, and their FLOPs; None as FLOPs of a task.

    Args:
        budget: {"steps": number} or {"flops": number}.
        lengths: mean caption length in tokens by the settings that determine the tokenizer; missing ones are added.
    """
    if not isinstance(config, PretrainConfig):
        return int(budget["steps"]), None
    longest = config.model.text_length
    key = longest, config.model.vocab_size, config.tokenizer, config.initial_model  # what the tokenizer follows from
    if key not in lengths:
        tokenizer = choose_tokenizer(config, dataset)
        captions = [dataset.captions(i)[0] for i in range(min(CAPTIONS, len(dataset)))]
        lengths[key] = float(tokenizer.encode(captions, longest)[1].mean())
    return steps_and_flops(config, lengths[key], budget)


def run_jobs(words: Sequence[str], part: tuple[int, int], jobs: int) -> None:
    """Run `mvlm study WORDS` in several processes, each with its share of a part's trials, and wait for all of them.

    On a CPU each process gets an equal share of the cores. On GPUs each gets one of them, in turn. Each line of output
    begins with the number of its process. SIGTERM and Ctrl-C are passed on, so that trials save their state and stop; a
    second one ends them at once.

    Args:
        words: file and options, without --part and --jobs.
        part: (i, n), as for `run_study`.

    Raises:
        RunError: a process failed. The others have ended.
    """
    number, parts = part
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "mvlm", "study", *words, "--part", f"{number + parts * job}/{parts * jobs}"],
            env=_environment(job, jobs),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,  # Ctrl-C reaches this process alone, which passes it on once
        )
        for job in range(jobs)
    ]
    # One that is ignored stays so: SIGHUP under nohup, SIGINT of a script's background job.
    handled = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    stops = [number for number in handled if signal.getsignal(number) is not signal.SIG_IGN]
    before = [signal.signal(number, lambda *_: [process.terminate() for process in running]) for number in stops]
    relays = [threading.Thread(target=_relay, args=(job, process)) for job, process in enumerate(running, 1)]
    try:
        for relay in relays:
            relay.start()
        for relay in relays:
            relay.join()
        codes = [process.wait() for process in running]
    finally:
        for process in running:
            process.terminate()  # does nothing to a process that has ended
        for number, handler in zip(stops, before, strict=True):
            signal.signal(number, handler)
    failed = [job for job, code in enumerate(codes, 1) if code != 0]
    if failed:
        raise RunError(
            f"processes of the study: wanted all {jobs} to end well, found an error in number "
            f"{', '.join(map(str, failed))}; its reason is above, and the same command continues"
        )


def _environment(job: int, jobs: int) -> dict[str, str]:
    """Environment variables of process `job` of `jobs`: an equal share of the cores as threads, and one of the GPUs."""
    threads = str(max(1, len(os.sched_getaffinity(0)) // jobs))
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "PYTHONUNBUFFERED": "1"}
    if torch.cuda.is_available():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
        gpus = visible.split(",")
        environment["CUDA_VISIBLE_DEVICES"] = gpus[job % len(gpus)]
    return environment


def _relay(job: int, process: "subprocess.Popen[str]") -> None:
    """Print the output of a process line by line, each behind the number of the process."""
    assert process.stdout is not None
    with process.stdout as lines:
        for line in lines:
            say(f"[{job}] {line}", end="", flush=True)
