"""The committed studies: every trial has a valid configuration."""

from pathlib import Path

import pytest

from mvlm.studies.study import read_study, trial_config

STUDIES = Path(__file__).parents[3] / "studies"
FILES = sorted(set(STUDIES.glob("*.toml")) - {STUDIES / "smoke.toml"})  # which has an arm for a null


@pytest.mark.parametrize("file", FILES, ids=[file.stem for file in FILES])
def test_a_committed_study_can_run(file: Path) -> None:
    study = read_study(file)
    assert len(study.seeds) >= 5
    arms = [
        (trial_config(study, arm, 0, Path("data"), Path("out"), 1), settings.get("fraction", 1.0))
        for arm, settings in study.arms.items()
    ]
    assert all(arms.count(arm) == 1 for arm in arms)
