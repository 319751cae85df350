"""Two steps of every arm of the study of newer objectives, with a micro model."""

from dataclasses import replace
from pathlib import Path

import pytest

from mvlm.config.json_files import config_json
from mvlm.config.pretrain import PretrainConfig
from mvlm.runs.folder import read_metrics
from mvlm.studies.study import read_study, trial_config
from mvlm.training.run import pretrain
from support.models import MICRO

STUDY = read_study(Path(__file__).parents[3] / "studies" / "objective_now.toml")
SMALL = {"model": MICRO, "batch_size": 8, "warmup_steps": 1, "eval_every_steps": 2, "device": "cpu"}


@pytest.mark.extended
@pytest.mark.slow
def test_every_arm_trains(scenes, tmp_path, without_tensorboard):
    """Each with losses of its own: an arm whose setting nobody reads would have those of another."""
    study = replace(STUDY, settings=SMALL)
    losses = {}
    for number, arm in enumerate(study.arms):
        config = trial_config(study, arm, 0, scenes, tmp_path / str(number), 2)
        assert config_json(config)["model"]["width"] == MICRO["width"]
        assert isinstance(config, PretrainConfig)
        pretrain(config)
        last = read_metrics(config.out / "metrics.jsonl")[-1]
        assert last["step"] == 2
        assert last["bad_steps"] == 0
        assert last["ir_r1"] >= 0
        losses[arm] = tuple(last[name] for name in ("mlm", "mim", "itc", "itm"))
    assert len(set(losses.values())) == len(study.arms)
