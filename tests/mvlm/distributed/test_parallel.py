"""`mvlm pretrain` on two ranks against `mvlm pretrain` on one."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mvlm.tasks.load import load_model
from mvlm.training.run import pretrain
from support.folders import LOSSES, rows_of
from support.models import micro_config, pretrain_config
from support.towers import tower_config

PAGE = Path(__file__).parents[3] / "docs" / "guides" / "many_gpus.md"


@pytest.fixture(params=["adamw", *(pytest.param(name, marks=pytest.mark.extended) for name in ("muon", "tower"))])
def runs(request, scenes, tmp_path, on_two_ranks) -> tuple[Path, Path]:
    """Runs of two steps: one process, and two ranks with FSDP2 and two microbatches each.

    torchrun starts those of Muon, with the command of docs/guides/many_gpus.md; the others are forked. Those of an
    image tower recompute its blocks.
    """
    folder, optimizer = tmp_path, "muon" if request.param == "muon" else "adamw"
    model = micro_config(image_layers=1, text_layers=1, cross_layers=1, decoder_layers=1)
    if request.param == "tower":
        model = tower_config("test_vit2", image_layers=1)
    settings = {"precision": "fp32", "eval_every_steps": 2, "optimizer": optimizer, "model": model}
    settings["checkpoint_activations"] = request.param == "tower"
    config = pretrain_config(scenes, folder / "one", **settings)
    pretrain(config)
    shown = re.search(
        r"^    torchrun (--standalone.*?) -m mvlm pretrain tiny --data data/emoji --out runs/two (.*)$",
        PAGE.read_text(),
        re.M,
    )
    assert shown is not None
    own = [
        "pretrain",
        "--config",
        str(folder / "one/config.json"),
        "--out",
        str(folder / "two"),
        *shlex.split(shown[2]),
    ]
    if optimizer == "adamw":
        codes, errors = on_two_ranks(*own)
        assert codes == [0, 0], errors
    else:
        command = [sys.executable, "-m", "torch.distributed.run", *shlex.split(shown[1]), "-m", "mvlm", *own]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr
    return folder / "one", folder / "two"


@pytest.mark.slow
def test_two_ranks_log_the_losses_and_save_the_weights_of_one(runs):
    one, two = (rows_of(run) for run in runs)
    assert [row["step"] for row in two] == [1, 2]
    for ours, theirs in zip(two, one, strict=True):
        assert ours["pairs_seen"] == theirs["pairs_seen"]
        for name in LOSSES:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4), name
    for name in ("tr_r10", "ir_r10"):
        assert two[-1][name] == one[-1][name]
    assert two[-1]["gain_text_nats"] == pytest.approx(one[-1]["gain_text_nats"], abs=1e-3)
    one, two = (load_model(run).network for run in runs)  # it is saved whole
    for (name, ours), theirs in zip(two.named_parameters(), one.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-4, msg=name)
    settings = json.loads((runs[1] / "config.json").read_text())
    assert (settings["parallel"], settings["accumulate"]) == ("fsdp", 2)
