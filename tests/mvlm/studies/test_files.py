"""The committed studies: every trial has a valid configuration."""

import gzip
import json
from pathlib import Path

import pytest

from mvlm.studies.study import read_study, stage_config, trial_config
from mvlm.studies.trial import Stage, Trial, settings_of, settings_said

STUDIES = Path(__file__).parents[3] / "studies"
FILES = sorted(STUDIES.glob("*.toml"))


@pytest.mark.parametrize("file", FILES, ids=[file.stem for file in FILES])
def test_a_committed_study_can_run(file: Path) -> None:
    study = read_study(file)
    assert len(study.seeds) >= 5
    arms = [
        (
            trial_config(study, arm, 0, Path("data"), Path("out"), 1_000_000),
            [settings.get(n) for n in ("fraction", "budget")],
        )
        for arm, settings in study.arms.items()
    ]
    assert all(arms.count(arm) == 1 for arm in arms)


TASKS = sorted((STUDIES / "tasks").glob("*.toml"))
RESULTS = STUDIES.parent / "benchmarks/results/tasks"


@pytest.mark.parametrize("file", TASKS, ids=[file.stem for file in TASKS])
def test_committed_trials_of_a_task_have_their_studys_settings(file: Path) -> None:
    """So `make tasks` takes them over, and a changed default changes no study."""
    study = read_study(file)
    trials = [json.loads(line) for line in (RESULTS / f"{file.stem}.jsonl").read_text().splitlines()]
    assert {trial["arm"] for trial in trials} == set(study.arms)
    for trial in trials:
        steps = trial["settings"]["max_steps"]
        config = trial_config(study, trial["arm"], trial["seed"], Path("data"), Path("out"), steps, Path("start"))
        said, wanted = settings_said(trial["settings"], config), settings_of(config)
        assert wanted["batch_size"] == config.batch_size
        assert {name: said.get(name) for name in wanted} == wanted


SCENES = RESULTS.parent / "studies"


@pytest.mark.parametrize("name", ["scenes", "scenes_claim", "scenes_saturation"])
def test_committed_trials_that_were_fine_tuned_are_reused(name: str) -> None:
    """Settings of the fine-tuning that are newer than a trial have their defaults, as those of the training have."""
    study = read_study(STUDIES / f"{name}.toml")
    packed = (SCENES / f"scenes-{name}.jsonl.gz").read_bytes()
    results = [json.loads(line) for line in gzip.decompress(packed).splitlines()]
    assert results
    for result in results:
        arm, seed, settings = result["arm"], result["seed"], result["settings"]
        config = trial_config(study, arm, seed, Path("data"), Path("out"), settings["max_steps"])
        stages = [
            Stage(
                name=task,
                config=stage_config(study, task, seed, Path("start"), Path("then")),
                samples=settings["then"][task]["samples"],
                evaluated=settings["then"][task]["evaluated"],
            )
            for task in study.then
        ]
        trial = Trial(
            arm=arm,
            seed=seed,
            config=config,
            flops=None,
            data=Path("data"),
            samples=settings["samples"],
            splits=(study.split,),
            rerank=settings["rerank"],
            folder=Path("out"),
            then=tuple(stages),
        )
        assert trial.same_settings(result)
